"""The nodes of one service as a client sees them: which are up, which may be called, which is."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from micro._channels import Way
from micro.call import Call
from micro.errors import DataLoss, DeadlineExceeded, MicroError, Unavailable
from micro.registry import Node
from micro.retries import (
    Budget,
    Retries,
    Throttle,
    is_overload,
    is_unsent,
    pause,
    repeatable,
)
from micro.selector import Candidate, Selector, Strategy
from micro.transport import Channel

#: The metadata by which a node tells all transports of its port, the best first.
TRANSPORTS = "transports"

#: Failures in a row that eject a node.
_FAILURES = 5
#: Seconds that a node is out the first time, and at most; each further time doubles them.
_OUT = 1.0
_MOST_OUT = 30.0
#: Seconds without an ejection after which a node is out for the first time again.
_FORGIVEN = 60.0
#: Seconds that a node that has too much counts as busier, where it did not say.
_BUSY = 0.1
#: Calls that it counts as busier by, at most.
_MOST_BUSY = 1000
#: Selectors that are remembered of the calls that had one of their own.
_SELECTORS = 64


class Peer(Candidate):
    """A node, the way to it, and its channel once there is one."""

    __slots__ = ("channel", "ejected", "ejections", "failures", "refused", "way")

    def __init__(self, node: Node, way: Way) -> None:
        super().__init__(node)
        self.way: Way = way
        self.channel: Channel | None = None
        #: In a row; back to 0 with each answer.
        self.failures = 0
        #: Calls that it refused a moment ago, since it has too much to do.
        self.refused = 0
        #: When it was out the last time, and how often one after the other.
        self.ejected = -math.inf
        self.ejections = 0


class Tried:
    """The attempts of a call that have failed."""

    __slots__ = ("executed", "peers")

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        #: Whether one of them may have been executed.
        self.executed = False


class Counts(msgspec.Struct, kw_only=True):
    """What a client decided, since it was made."""

    #: Calls that were sent again; that were not since the budget was spent, or no time was left.
    retries: int = 0
    over_budget: int = 0
    #: Nodes that were taken out, and that were taken in again.
    ejections: int = 0
    readmissions: int = 0
    #: Answers that said "too much", and calls that were not sent since there were so many.
    overloads: int = 0
    throttled: int = 0


class Pool:
    """The peers that one Selector allows, and its strategy."""

    __slots__ = ("choose", "peers", "seen", "selector")

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.peers: Sequence[Peer] = ()
        #: The nodes that it was filled from; None when it is to be filled anew.
        self.seen: tuple[Node, ...] | None = None
        self.choose: Callable[[Sequence[Peer], Call], Peer] = _of_peers(selector.strategy())

    def fill(self, peers: Iterable[Peer], out: Iterable[Peer]) -> None:
        """Take those that are allowed and up; if none is up, those that are out."""
        self.peers = self.allowed(peers) or self.allowed(out)

    def other(self, tried: Sequence[Peer], call: Call) -> Peer | None:
        """One that was not tried; None when all were."""
        if not self.has_other(tried):
            return None
        for _ in range(3):
            peer = self.choose(self.peers, call)
            if peer not in tried:
                return peer
        return min(
            (peer for peer in self.peers if peer not in tried),
            key=lambda peer: peer.outstanding,
        )

    def has_other(self, tried: Sequence[Peer]) -> bool:
        return any(peer not in tried for peer in self.peers)

    def allowed(self, peers: Iterable[Peer]) -> Sequence[Peer]:
        return tuple(peer for peer in peers if self.selector.allows(peer.node))


class Viewed(Protocol):
    """Something that knows nodes; the tuple stays the same object until they change."""

    @property
    def nodes(self) -> tuple[Node, ...]: ...


class Target:
    """The nodes of one service, worked out anew only when they change.

    A node that fails is ejected: at once when it cannot be reached, else after five failures in a
    row. It is out for a second, then for twice as long each time, and is back when it answers
    ``Debug.Health``. At most half of the nodes are out; when nodes leave so that more would be, all
    are back (panic mode): then failing calls tell nothing of single nodes. Where a selector takes
    only nodes that are out, they are called all the same.

    ``secure``: connections are for this service alone. ``answers`` asks a node, ``gone`` hears of
    the ways that no node has any more.
    """

    def __init__(
        self,
        view: Viewed,
        service: str,
        transports: Sequence[str],
        selector: Selector,
        retries: Retries,
        counts: Counts,
        *,
        secure: bool,
        answers: Callable[[Peer], Awaitable[bool]],
        gone: Callable[[set[Way]], None],
    ) -> None:
        self.service = service
        self.transports = transports
        self.retries = retries
        self.view = view
        #: It takes no more note of anything.
        self.closed = False
        self._identity = service if secure else ""
        self.ways: set[Way] = set()
        #: All that were made.
        self.attempts: int = 0
        self.budget = Budget(retries)
        #: Only while the service has too much to do.
        self.throttle: Throttle | None = None
        self.pool = Pool(selector)
        self._counts = counts
        self._pools = {selector: self.pool}
        self._answers = answers
        self._gone = gone
        self._seen: tuple[Node, ...] | None = None
        self._peers: dict[Peer, None] = {}
        self._out: dict[Peer, asyncio.Task[None]] = {}
        #: Those of nodes that have left, until they have ended.
        self._ending: set[asyncio.Task[None]] = set()

    def peers(self, pool: Pool) -> Sequence[Peer]:
        """Those that a call may go to."""
        if pool.seen is not self.view.nodes:
            self._fill(pool, self.view.nodes)
        return pool.peers

    def pool_of(self, selector: Selector) -> Pool:
        """The peers for calls with a selector of their own."""
        pool = self._pools.get(selector)
        if pool is None:
            if len(self._pools) > _SELECTORS:  # the first is that of all other calls
                del self._pools[list(self._pools)[1]]
            pool = self._pools[selector] = Pool(selector)
        return pool

    def reachable(self, nodes: Iterable[Node]) -> list[Peer]:
        """Those that speak what we speak; Go's gRPC servers share the registry, not the wire."""
        known = {(peer.node.id, peer.way): peer for peer in self._peers}
        peers: list[Peer] = []
        for node in nodes:
            name = self._best(node)
            if name:
                way = (name, node.address, self._identity)
                peer = known.get((node.id, way)) or Peer(node, way)
                peer.node = node
                peers.append(peer)
        return peers

    # what became of calls

    def answered(self, peer: Peer) -> None:
        """It lives: what failed before was no failure in a row."""
        peer.failures = 0

    def failed(self, peer: Peer, error: MicroError) -> None:
        """Take note of what a call to a node raised; a handler's own errors are answers.

        So is what its handler tells of another service. What was raised on this side, before a node
        was asked, says nothing of it.
        """
        if is_overload(error):
            if error.remote:
                self._overloaded(peer, error)
        elif isinstance(error, Unavailable | DeadlineExceeded | DataLoss) and not error.final:
            peer.failures += 1
            unreachable = error.sent is False and isinstance(error, Unavailable)
            if unreachable or peer.failures >= _FAILURES:
                self._eject(peer)
        elif error.remote:
            self.answered(peer)

    def holds_back(self) -> bool:
        """Whether the next call is not to be sent, since the service has too much to do."""
        if self.throttle is not None and self.throttle.is_over():
            self.throttle = None
        if self.throttle is None or not self.throttle.holds_back():
            return False
        self._counts.throttled += 1
        return True

    async def again(
        self, call: Call, pool: Pool, tried: Tried, peer: Peer, error: MicroError
    ) -> Peer | None:
        """Where to send a call once more that failed at ``peer``; waits until it is to be sent.

        None: not at all, and the caller gets ``error``.

        Raises:
            MicroError: as None; it is ``error``, but tells of all attempts together.
        """
        self.failed(peer, error)
        tried.peers.append(peer)
        # Of a stream's messages some may have gone: another node would miss them.
        in_vain = call.kind != "unary" and not is_unsent(error)
        other, final, sent = None, error.final or len(tried.peers) > 1, error.sent
        if not in_vain and repeatable(call, error):
            other, final = await self._other(call, pool, tried, error), True
        if tried.executed:
            sent = None
        if other is None and (final, sent) != (error.final, error.sent):
            raise _told(error, final=final, sent=sent) from error.__cause__
        tried.executed = tried.executed or not is_unsent(error)
        return other

    async def _other(self, call: Call, pool: Pool, tried: Tried, error: MicroError) -> Peer | None:
        """A node for one more attempt, when there may be one and its time has come."""
        attempt, same = len(tried.peers), is_unsent(error)
        if attempt >= self.retries.attempts:
            return None
        self.peers(pool)
        if not same and not pool.has_other(tried.peers):
            return None
        wait = pause(self.retries, attempt, error)
        in_time = call.deadline is None or time.monotonic() + wait < call.deadline
        if not in_time or not self.budget.take(self.attempts):
            self._counts.over_budget += 1
            return None
        await asyncio.sleep(wait)
        peers = self.peers(pool)  # they may be others now
        if self.closed or not peers or self.holds_back():
            return None
        other = pool.other(tried.peers, call) or (pool.choose(peers, call) if same else None)
        self._counts.retries += other is not None
        return other

    async def aclose(self) -> None:
        """Ask no node any more. A second call does nothing."""
        self.closed = True
        for peer in tuple(self._out):
            self._end(peer)
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _overloaded(self, peer: Peer, error: MicroError) -> None:
        """A busy node is no dead one: it counts as busier for a while, and all slow down."""
        self._counts.overloads += 1
        if self.throttle is None:
            self.throttle = Throttle()
        self.throttle.refused()
        if peer.refused < _MOST_BUSY:
            peer.refused += 1
            peer.outstanding += 1
            asyncio.get_running_loop().call_later(error.retry_after or _BUSY, _less_busy, peer)

    def _eject(self, peer: Peer) -> None:
        most = len(self._peers) // 2
        if len(self._out) >= most or peer in self._out or peer not in self._peers or self.closed:
            return
        now = time.monotonic()
        if now - peer.ejected > _FORGIVEN:
            peer.ejections = 0
        self._counts.ejections += 1
        # In a context of its own: it is not a part of the call that failed.
        work, context = self._until_it_answers(peer), contextvars.Context()
        self._out[peer] = asyncio.create_task(work, context=context)
        self._changed()

    def _end(self, peer: Peer) -> None:
        """Ask a node that is out no more."""
        task = self._out.pop(peer)
        task.cancel()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _until_it_answers(self, peer: Peer) -> None:
        from random import random

        while True:
            out = min(_OUT * 2**peer.ejections, _MOST_OUT)
            peer.ejections = min(peer.ejections + 1, 16)
            await asyncio.sleep(out * (0.9 + 0.2 * random()))
            if await self._answers(peer):
                break
        del self._out[peer]
        self._readmit(peer)
        self._changed()

    def _readmit(self, peer: Peer) -> None:
        peer.failures = 0
        peer.ejected = time.monotonic()
        self._counts.readmissions += 1

    # which there are

    def _renew(self, nodes: tuple[Node, ...]) -> None:
        self._seen = nodes
        self._peers = dict.fromkeys(self.reachable(nodes))
        for peer in [peer for peer in self._out if peer not in self._peers]:
            self._end(peer)
        if len(self._out) * 2 > len(self._peers):
            for peer in tuple(self._out):
                self._end(peer)
                self._readmit(peer)
        before, self.ways = self.ways, {peer.way for peer in self._peers}
        self._changed()
        if before - self.ways:
            self._gone(before - self.ways)

    def _changed(self) -> None:
        """Have each pool filled anew, by its next call: what a filter raises is for its caller."""
        for pool in self._pools.values():
            pool.seen = None

    def _fill(self, pool: Pool, nodes: tuple[Node, ...]) -> None:
        if nodes is not self._seen:
            self._renew(nodes)
        pool.fill((peer for peer in self._peers if peer not in self._out), self._out)
        pool.seen = nodes

    def _best(self, node: Node) -> str:
        """The name of the best transport that both have; "" if there is none."""
        if node.metadata.get("protocol", "mucp") != "mucp":
            return ""
        offered = node.metadata.get("transport", self.transports[-1])
        spoken = {offered, *node.metadata.get(TRANSPORTS, "").split(",")}
        return next((name for name in self.transports if name in spoken), "")


def _told(error: MicroError, *, final: bool, sent: bool | None) -> MicroError:
    """``error`` for this caller alone: all who waited for a connection got the same one."""
    told = type(error).__new__(type(error), *error.args)
    vars(told).update(vars(error))
    told.final, told.sent = final, sent
    return told.with_traceback(error.__traceback__)


def _less_busy(peer: Peer) -> None:
    peer.refused -= 1
    peer.release()


def _of_peers(strategy: Strategy) -> Callable[[Sequence[Peer], Call], Peer]:
    """A strategy gives one of those that it gets, so that of peers it gives a peer."""
    return strategy  # type: ignore[return-value]
