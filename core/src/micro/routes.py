"""Where calls go: the nodes of each service that is called, and the channels to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, cast

from micro._channels import Channels, Way
from micro._targets import TRANSPORTS, Counts, Peer, Pool, Target, Tried, Viewed
from micro.call import Body, Call, Reply
from micro.errors import (
    DeadlineExceeded,
    Internal,
    MicroError,
    ResourceExhausted,
    ServiceNotFound,
    Unavailable,
)
from micro.follow import View
from micro.registry import Node, Registry, check_service
from micro.retries import Retries
from micro.selector import Selector
from micro.transport import Channel, Limits, Transport

__all__ = ["STACK", "TRANSPORTS", "Counts", "Means", "Routes"]

if TYPE_CHECKING:
    from micro.secured import Secured

#: Seconds that calls on the channel of a node that has gone have to end.
_GRACE = 10.0
#: Seconds that looking for similar names may add to the error of an unknown service.
_NEAR_MATCHES = 1.5
#: Seconds that an ejected node has to answer when it is asked whether it lives.
_PROBE = 1.0
#: Addresses that are remembered of the calls to no registered node.
_ADDRESSES = 256

#: Holds what a stream has entered, until its caller leaves it.
STACK: ContextVar[AsyncExitStack] = ContextVar("micro.routes.stack")


class Means(Protocol):
    """What a client needs of the service that owns it; backends open at first use."""

    request_timeout: float
    register_ttl: float
    limits: Limits
    retries: Retries
    selector: Selector
    #: None: calls are not encrypted.
    tls: Secured | None

    async def registry(self) -> Registry: ...

    async def transports(self) -> Sequence[Transport]:
        """The best first; the last is what every node speaks."""
        ...


class Routes:
    """Finds the node and the channel for a call, and another when it fails.

    It watches each service that is called.
    """

    def __init__(self, means: Callable[[], Means]) -> None:
        self.counts: Counts = Counts()
        self._means = means
        self._targets: dict[str, Target] = {}
        #: By address, and the service that is to be there.
        self._direct: dict[tuple[str, str], Target] = {}
        self._views: dict[str | None, tuple[View, int]] = {}
        self._channels = Channels(self._dial)

    async def send(self, call: Call, body: Body) -> Reply:
        """Pick a node and send it the call: the innermost handler of a client.

        What can be repeated without harm is, on another node. What a stream enters is left with the
        stack of its caller.
        """
        address, service = call.address, call.service
        target = self._direct.get((address, service)) if address else self._targets.get(service)
        if target is None:
            target = await self._target(call)
        pool = target.pool
        if call.selector is not None and not address:  # an address is a choice already
            pool = target.pool_of(call.selector)
        if not isinstance(body, bytes):
            return await self._send_stream(call, body, target, pool)
        tried: Tried | None = None
        peers = target.peers(pool) or await self._found(target, pool)
        if target.throttle is not None:
            _hold_back(target, call)
        peer = pool.choose(peers, call)
        while True:
            try:
                target.attempts += 1
                peer.outstanding += 1
                try:
                    channel = peer.channel or await self._channel(peer)
                    reply = await channel.call(call, body)
                finally:
                    peer.outstanding -= 1
            except MicroError as exc:
                tried = tried or Tried()
                other = await target.again(call, pool, tried, peer, exc)
                if other is None:
                    raise
                peer = other
            except asyncio.CancelledError:
                _note_late(target, peer, call)
                raise
            else:
                if peer.failures:
                    target.answered(peer)
                return reply

    async def _send_stream(
        self, call: Call, body: AsyncIterator[bytes], target: Target, pool: Pool
    ) -> Reply:
        """Open a stream, on another node when nothing of it was sent to the first."""
        tried = Tried()
        peers = target.peers(pool) or await self._found(target, pool)
        if target.throttle is not None:
            _hold_back(target, call)
        peer = pool.choose(peers, call)
        while True:
            target.attempts += 1
            try:
                reply = await self._open_stream(call, body, peer)
            except MicroError as exc:
                other = await target.again(call, pool, tried, peer, exc)
                if other is None:
                    raise
                peer = other
            else:
                if call.kind == "client":
                    reply.body = await _collected(call, target, peer, reply)
                return reply

    async def _open_stream(self, call: Call, body: AsyncIterator[bytes], peer: Peer) -> Reply:
        async with AsyncExitStack() as entered:
            peer.outstanding += 1
            entered.callback(peer.release)
            channel = peer.channel or await self._channel(peer)
            reply = await entered.enter_async_context(channel.stream(call, body))
            STACK.get().push_async_exit(entered.pop_all())
            return reply

    async def _answers(self, peer: Peer) -> bool:
        """Whether a node that was ejected is there again."""
        deadline = time.monotonic() + _PROBE
        call = Call(service=peer.node.service, endpoint="Debug.Health", deadline=deadline)
        try:
            async with asyncio.timeout(_PROBE):
                channel = peer.channel or await self._channel(peer)
                await channel.call(call, b"{}")
        except MicroError as exc:
            return exc.remote and not isinstance(exc, Unavailable)
        except Exception:  # whatever a transport raises, the node is asked again
            return False
        return True

    async def _target(self, call: Call) -> Target:
        if call.address:
            return await self._target_at(call.address, call.service)
        return await self._target_of(call.service)

    async def _target_of(self, service: str) -> Target:
        """The nodes of ``service``.

        Raises:
            InvalidArgument: not the name of a service.
            Unavailable: the registry cannot be reached.
        """
        check_service(service)
        transports = await self._means().transports()
        view = await self.hold(service)
        try:
            await view.entered()
        except BaseException:
            await self.release(service)
            raise
        if service in self._targets:  # another call was first
            await self.release(service)
            return self._targets[service]
        names = tuple(transport.features.name for transport in transports)
        target = self._new_target(view, service, names, self._means().selector)
        self._targets[service] = target
        return target

    async def _target_at(self, address: str, service: str) -> Target:
        """The node at ``address``, registered or not; it speaks what every node speaks."""
        transports = await self._means().transports()
        key = (address, service)
        if key not in self._direct:
            if len(self._direct) >= _ADDRESSES:
                self._forget(next(iter(self._direct)))
            names = (transports[-1].features.name,)
            fixed = _Fixed((Node(service=service, id="", address=address),))
            self._direct[key] = self._new_target(fixed, service, names, Selector())
        return self._direct[key]

    def _forget(self, key: tuple[str, str]) -> None:
        """Close the channel to an address that was called long ago, once its calls have ended.

        Its one node is never out, so that there is no task to end.
        """
        target = self._direct.pop(key)
        target.closed = True
        self._gone(target.ways)

    def _new_target(
        self, view: Viewed, service: str, transports: Sequence[str], selector: Selector
    ) -> Target:
        return Target(
            view,
            service,
            transports,
            selector,
            self._means().retries,
            self.counts,
            secure=self._means().tls is not None,
            answers=self._answers,
            gone=self._gone,
        )

    async def _found(self, target: Target, pool: Pool) -> Sequence[Peer]:
        """Nodes that the consistent read finds, or the error that tells why there are none."""
        registry = await self._means().registry()
        # At once, since each may wait for answers from a network.
        hint = asyncio.create_task(_similar(registry, target.service))
        try:
            nodes = await registry.get(target.service)
        except ServiceNotFound:
            if self._targets.get(target.service) is target:
                del self._targets[target.service]
                await target.aclose()
                await self.release(target.service)
            text = f"service {target.service!r} is not registered{await hint}"
            raise ServiceNotFound(text) from None
        finally:
            hint.cancel()
            await asyncio.gather(hint, return_exceptions=True)
        peers = target.reachable(nodes)
        if not peers:
            raise Unavailable(
                f"no node of {target.service!r} speaks {' or '.join(target.transports)}; "
                "choose another with --transport",
                sent=False,
            )
        allowed = pool.allowed(peers)
        if not allowed:
            text = f"of {len(peers)} nodes of {target.service!r} the selector's filters take none"
            raise Unavailable(text, sent=False)
        return allowed

    async def _channel(self, peer: Peer) -> Channel:
        peer.channel = channel = await self._channels.get(peer.way)
        return channel

    async def hold(self, service: str | None) -> View:
        """The view of a service (None: of all), until it is released."""
        registry = await self._means().registry()
        known = self._views.get(service)
        view = known[0] if known else View(registry, service, ttl=self._means().register_ttl)
        self._views[service] = (view, known[1] + 1 if known else 1)
        return view

    async def release(self, service: str | None) -> None:
        known = self._views.get(service)
        if known is None:
            return
        view, users = known
        if users > 1:
            self._views[service] = (view, users - 1)
            return
        del self._views[service]
        await view.aclose()

    async def aclose(self) -> None:
        """End watches and channels; calls that run fail. A second call does nothing."""
        views = [view for view, _ in self._views.values()]
        targets = [*self._targets.values(), *self._direct.values()]
        self._views.clear()
        self._targets.clear()
        self._direct.clear()
        for target in targets:
            await target.aclose()
        for view in views:
            await view.aclose()
        await self._channels.aclose()

    async def _dial(self, way: Way) -> Channel:
        means = self._means()
        name, address, service = way
        tls = None if means.tls is None else means.tls.client(service)
        for transport in await means.transports():
            if transport.features.name == name:
                return await transport.dial(
                    address, means.limits, tls=tls, timeout=means.request_timeout
                )
        raise Unavailable(f"no transport {name} is open", sent=False)

    def _gone(self, ways: set[Way]) -> None:
        """Close the channels of nodes that are registered no more, once their calls have ended."""
        for target in (*self._targets.values(), *self._direct.values()):
            ways = ways - target.ways
        self._channels.leave(ways, grace=_GRACE)


class _Fixed:
    """The nodes of an address."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.nodes = nodes


def _hold_back(target: Target, call: Call) -> None:
    """Refuse a call here, while servers refuse most; what they answer at all times goes on."""
    if not call.endpoint.startswith("Debug.") and target.holds_back():
        text = f"service {target.service!r} refuses most calls, so that this one was not sent"
        raise ResourceExhausted(text, sent=False)


def _note_late(target: Target, peer: Peer, call: Call) -> None:
    """A call whose deadline had come when it was cancelled tells of a node that did not answer."""
    if call.deadline is not None and time.monotonic() >= call.deadline:
        target.failed(peer, DeadlineExceeded())


async def _collected(call: Call, target: Target, peer: Peer, reply: Reply) -> bytes:
    """The one reply to a stream of requests; what becomes of it tells of the node."""
    try:
        body = await _only(cast("AsyncIterator[bytes]", reply.body))
    except MicroError as exc:
        target.failed(peer, exc)
        raise
    except asyncio.CancelledError:
        _note_late(target, peer, call)
        raise
    target.answered(peer)
    return body


async def _only(body: AsyncIterator[bytes]) -> bytes:
    """The one reply to a stream of requests."""
    found: bytes | None = None
    async for message in body:
        if found is not None:
            raise Internal("the server sent two replies where one was to come")
        found = message
    if found is None:
        raise Internal("the server ended without a reply")
    return found


async def _similar(registry: Registry, service: str) -> str:
    """The end of an error text: what is registered and has a similar name, or that nothing is."""
    from difflib import get_close_matches

    try:
        async with asyncio.timeout(_NEAR_MATCHES):
            names = await registry.services()
    except (MicroError, TimeoutError):
        return ""
    near = get_close_matches(service, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    shown = ", ".join(names[:10])
    return f"; registered are {shown}" if names else "; nothing is registered, is it running?"
