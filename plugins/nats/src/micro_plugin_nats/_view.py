"""What a reader has heard, whom it has yet to ask, and what it has been told."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

from micro.errors import MicroError
from micro.registry import Change, Node, in_order

Key = tuple[str, str]

#: Seconds in which the first answer comes, if there is any, once the server has the question.
_FIRST = 0.5
#: Nobody is thought to answer any more when nothing has come for so long; and whatever comes.
_QUIET = 0.05
_LAST = 1.0
#: Parts of its time to live after which a node that is silent is asked.
_ASK_AT = (0.7, 0.85)
#: Who has slept gives a node so long to answer, instead of taking its own silence for the node's.
_GRACE = 0.5
#: One reader asks for the same service no more than once in so long.
_ASK_EVERY = 0.2
#: A node of Go Micro lives three of the intervals in which it tells of itself; seconds at least
#: and at most, which is Go's own time to live and what counts until two were heard.
_INTERVALS = 3
_GO_TTL = (3.0, 90.0)
#: Who asked hears answers and what is told in two queues: for so long after a node has told of
#: itself, or that it goes, an answer may be older than that.
_OLDER = 2.0
#: Nodes that one reader remembers at most.
_NODES = 16 * 1024


class _Seen:
    """A node that one who listens knows of."""

    __slots__ = ("asks", "node", "told_at", "ttl", "until")

    def __init__(self, node: Node, ttl: float) -> None:
        self.node = node
        self.ttl = ttl
        self.until = 0.0
        self.asks: list[float] = []
        self.told_at = -math.inf

    def renew(self, now: float, *, asked: bool) -> None:
        self.until = now + self.ttl
        self.asks = [now + self.ttl * part for part in _ASK_AT] if asked else []

    @property
    def due(self) -> float:
        return self.asks[0] if self.asks else self.until


class View:
    """What one reader, of one service or of all (None), has heard since it began to ask.

    ``ask`` is called in the waits of the reader, so that a failure of it is raised there.
    """

    def __init__(self, service: str | None, ask: Callable[[str | None], Awaitable[None]]) -> None:
        #: Whether the server says that nobody is there to answer.
        self.is_alone: bool = False
        self._service = service
        self._ask = ask
        self._seen: dict[Key, _Seen] = {}
        #: When somebody told that a node goes, as long as there may be older answers.
        self._gone: OrderedDict[Key, float] = OrderedDict()
        self._told: dict[Key, Node] = {}
        self._changed: dict[Key, None] = {}
        self._asked: dict[str, float] = {}
        self._due = math.inf
        self._woken = asyncio.Event()
        self._error: MicroError | None = None

    # -- what comes in

    def wants(self, node: Node) -> bool:
        return self._service in (None, node.service)

    def take(self, node: Node, ttl: float | None, *, told: bool = False, own: bool = False) -> bool:
        """Know of this node; ``told`` by itself, not asked for. False: there is no room for it."""
        key = key_of(node)
        now = time.monotonic()
        if told or own:
            self._gone.pop(key, None)
        elif now - self._gone.get(key, -math.inf) < _OLDER:
            return True
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= _NODES and not own:
                return False
            seen = self._seen[key] = _Seen(node, _GO_TTL[1])
        if ttl is not None:
            seen.ttl = ttl
        elif told and seen.told_at > -math.inf:
            least, most = _GO_TTL
            seen.ttl = min(most, max(least, _INTERVALS * (now - seen.told_at)))
        if told or own or now - seen.told_at >= _OLDER:
            seen.node = node
        seen.told_at = now if told else seen.told_at
        seen.renew(now, asked=not own)
        self._due = min(self._due, seen.due)
        self._changed[key] = None
        self._woken.set()
        return True

    def forget(self, node: Node) -> None:
        now, key = time.monotonic(), key_of(node)
        self._gone.pop(key, None)
        while self._gone and now - next(iter(self._gone.values())) >= _OLDER:
            self._gone.popitem(last=False)
        if len(self._gone) < _NODES:
            self._gone[key] = now
        self._forget(key)

    def nobody(self) -> None:
        """The server says that nobody listens to questions."""
        self.is_alone = True
        self._woken.set()

    def end(self, error: MicroError) -> None:
        self._error = self._error or error
        self._woken.set()

    # -- what a reader waits for

    async def collect(self, within: float) -> None:
        """Wait for the first answer, then until no more come; so many seconds at most.

        Raises:
            Unavailable: the connection ended meanwhile.
        """
        begun = time.monotonic()
        first, last = begun + min(_FIRST, within), begun + min(_LAST, within)
        while not (self._seen or self.is_alone):
            if not await self._heard(first):
                return
        quiet = 0.0 if self.is_alone else _QUIET
        while (now := time.monotonic()) < last:
            if not await self._heard(min(now + quiet, last)):
                return

    def nodes(self) -> tuple[Node, ...]:
        now = time.monotonic()
        return in_order(seen.node for seen in self._seen.values() if seen.until > now)

    def begin(self) -> tuple[Node, ...]:
        """The nodes; from here on, ``changes`` tells what is different."""
        self._told = {key: seen.node for key, seen in self._seen.items()}
        self._changed.clear()
        return in_order(self._told.values())

    async def changes(self) -> list[Change]:
        """What has changed since, once something has."""
        while True:
            keys, self._changed = self._changed, {}
            changes = [change for key in keys for change in self._difference(key)]
            if changes:
                return changes
            await self._heard(math.inf)

    def _difference(self, key: Key) -> Iterator[Change]:
        before, seen = self._told.pop(key, None), self._seen.get(key)
        if seen is not None:
            self._told[key] = seen.node
            if before != seen.node:
                yield Change(kind="update" if before else "create", node=seen.node)
        elif before is not None:
            yield Change(kind="delete", node=before)

    async def _heard(self, until: float) -> bool:
        """Wait for something new, and ask what there is to ask; False when ``until`` has come."""
        while True:
            if self._error is not None:
                raise type(self._error)(self._error.detail)
            now = time.monotonic()
            if now >= self._due:
                await self._tend(now)
            if self._woken.is_set():
                self._woken.clear()
                return True
            if now >= until:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(min(until, self._due) - now):
                    await self._woken.wait()

    async def _tend(self, now: float) -> None:
        """Forget who was silent for too long; ask who soon will be."""
        silent: set[str] = set()
        for key, seen in tuple(self._seen.items()):
            if seen.asks and seen.asks[0] <= now:
                seen.asks = [at for at in seen.asks if at > now]
                seen.until = seen.until if seen.until > now else now + _GRACE
                silent.add(seen.node.service)
            elif seen.until <= now:
                self._forget(key)
        self._due = min((seen.due for seen in self._seen.values()), default=math.inf)
        for service in silent:
            if now - self._asked.get(service, -math.inf) >= _ASK_EVERY:
                self._asked[service] = now
                await self._ask(service)

    def _forget(self, key: Key) -> None:
        seen = self._seen.pop(key, None)
        if seen is not None:
            self._asked.pop(seen.node.service, None)
            self._changed[key] = None
            self._woken.set()


def key_of(node: Node) -> Key:
    return (node.service, node.id)
