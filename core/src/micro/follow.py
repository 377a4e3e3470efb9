"""Staying informed: the one loop that keeps a view of a registry alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from contextlib import aclosing
from typing import Literal, Self

from micro.errors import Closed, Gap, MicroError, Unavailable
from micro.registry import Change, Node, Registry, Snapshot

_log = logging.getLogger("micro.follow")

_Key = tuple[str, str]
#: Seconds between two attempts; all is right again two seconds after an outage.
_FIRST_DELAY = 0.05
_LAST_DELAY = 1.5
_DOUBLED = 5


class View:
    """What a registry says of one service (None: of all), kept true by one task.

    The task follows, and whatever ends the stream it follows again: from the last mark, or from a
    new snapshot after a Gap. While it cannot, the last nodes stay and ``state`` is stale.

    That no node is left proves nothing right after an outage: their leases may have ended before
    they could renew them, or the server may have lost its data. It is believed when the outage is
    over for ``ttl`` seconds; until then they stay. Who calls a node that is really gone fails, as
    it would with none.
    """

    def __init__(self, registry: Registry, service: str | None, *, ttl: float) -> None:
        self.nodes: tuple[Node, ...] = ()
        self.error: Exception | None = None
        self._registry = registry
        self._service = service
        self._ttl = ttl
        self._known: dict[_Key, Node] = {}
        self._mark: object = None
        self._failures = 0
        self._live = False
        self._last_live = time.monotonic()
        self._ready = False
        self._settled = asyncio.Event()
        self._emptied = False
        self._doubt: asyncio.TimerHandle | None = None
        self._watches: set[Watch] = set()
        self._task = asyncio.create_task(self._run(), name=f"micro.follow {service or 'all'}")

    @property
    def state(self) -> Literal["live", "stale"]:
        return "live" if self._live else "stale"

    @property
    def age(self) -> float:
        return 0.0 if self._live else time.monotonic() - self._last_live

    def watch(self) -> Watch:
        return Watch(self)

    async def entered(self) -> None:
        """Wait for the first snapshot.

        Raises:
            MicroError: the first attempt failed, and none since has succeeded.
        """
        await self._settled.wait()
        if not self._ready:
            if isinstance(self.error, MicroError):
                raise type(self.error)(self.error.detail) from self.error
            raise Unavailable(f"registry {self._registry.url}: {self.error}") from self.error

    async def aclose(self) -> None:
        """End the task and every watch."""
        self._trust()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._live:
            self._live, self._last_live = False, time.monotonic()
        self.error = Closed("watch: used after its client was closed")
        self._settled.set()
        for watch in self._watches:
            watch._end()

    async def _run(self) -> None:
        from random import uniform

        while True:
            try:
                await self._follow()
            except Gap as exc:
                self._mark = None
                self._failures = 0  # the server answers
                self._failed(exc)
            except Exception as exc:  # whatever a backend does, the view goes on with what it has
                self._failed(exc)
            delay = min(_LAST_DELAY, _FIRST_DELAY * 2 ** min(self._failures, _DOUBLED))
            self._failures += 1
            await asyncio.sleep(uniform(0, delay))

    async def _follow(self) -> None:
        """One attempt; it ends with an error."""
        async with aclosing(self._registry.follow(self._service, self._mark)) as stream:
            async for mark, item in stream:
                self._take(item)
                self._mark = mark
                self._failures = 0
        raise Unavailable("the stream of changes ended")

    def _failed(self, error: Exception) -> None:
        if self._live or not self._ready:
            name = self._service or "all services"
            _log.warning("registry: watch of %s is stale: %s", name, error)
        if self._live:
            self._last_live = time.monotonic()
        self._live = False
        self.error = error
        self._settled.set()

    def _proven(self) -> None:
        if self._ready and not self._live:
            _log.info("registry: watch of %s is live again", self._service or "all services")
        self._live = self._ready = True
        self.error = None
        self._settled.set()

    def _take(self, item: Snapshot | Change | None) -> None:
        if self._ready and not self._live:
            self._mistrust()
        if isinstance(item, Change):
            self._consider([item])
        elif item is not None:
            self._consider(list(self._difference(item.nodes)))
        self._proven()
        if self._emptied and self._doubt is None:  # the doubt ended within the outage
            self._empty()

    def _consider(self, changes: list[Change]) -> None:
        """Apply changes, unless they leave nothing and this is not to be believed yet."""
        there = {_key(change.node) for change in changes if change.kind != "delete"}
        gone = {_key(change.node) for change in changes} - there
        if self._emptied and there:
            self._emptied = False
            changes = [*self._deletes(self._known.keys() - there), *changes]
        elif not there and gone >= self._known.keys() and (self._doubt or not self._live):
            self._emptied = bool(self._known)
            return
        self._apply(changes)

    def _mistrust(self) -> None:
        """Begin the doubt that an outage leaves; where it has kept nodes already, it goes on."""
        if not self._emptied:
            self._trust()
            self._doubt = asyncio.get_running_loop().call_later(self._ttl, self._believe)

    def _trust(self) -> None:
        if self._doubt is not None:
            self._doubt.cancel()
            self._doubt = None

    def _believe(self) -> None:
        self._trust()
        if self._emptied and self._live:
            self._empty()

    def _empty(self) -> None:
        self._emptied = False
        self._apply(self._deletes(self._known))

    def _deletes(self, keys: Iterable[_Key]) -> list[Change]:
        return [Change(kind="delete", node=self._known[key]) for key in keys]

    def _difference(self, nodes: Iterable[Node]) -> Iterable[Change]:
        now = {_key(node): node for node in nodes}
        yield from self._deletes(self._known.keys() - now.keys())
        for node in now.values():
            yield Change(kind="create", node=node)

    def _apply(self, changes: Iterable[Change]) -> None:
        told = [change for change in map(self._fold, changes) if change is not None]
        if told:
            self.nodes = tuple(self._known[key] for key in sorted(self._known))
        for watch in self._watches:
            watch._tell(told)

    def _fold(self, change: Change) -> Change | None:
        """The change as this view sees it, None when it says nothing new."""
        key = _key(change.node)
        before = self._known.get(key)
        if change.kind == "delete":
            if before is None:
                return None
            return Change(kind="delete", node=self._known.pop(key))
        self._known[key] = change.node
        if before == change.node:
            return None
        return Change(kind="update" if before else "create", node=change.node)


class Watch:
    """A live view of a service's nodes: ``async with client.watch(service) as watch``.

    Once entered, the first snapshot is in: ``nodes`` is what the registry says, by id. Iterating
    gives each Change from then on; changes of one node that the reader is too slow for are merged,
    so that applying what is read always leads to ``nodes``. During an outage ``state`` is
    ``stale``, ``nodes`` are the last known, ``age`` is how many seconds old they are and ``error``
    is the cause; right after one, that no node is left is believed only when a time to live is
    over. The iterator ends when the watch or its client is closed.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._pending: dict[_Key, Change] = {}
        self._wake = asyncio.Event()
        self._ended = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self._view.nodes

    @property
    def state(self) -> Literal["live", "stale"]:
        return self._view.state

    @property
    def age(self) -> float:
        return self._view.age

    @property
    def error(self) -> Exception | None:
        return self._view.error

    async def __aenter__(self) -> Self:
        await self._view.entered()
        self._view._watches.add(self)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._view._watches.discard(self)
        self._end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        while not self._pending:
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._pending.pop(next(iter(self._pending)))

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            key = _key(change.node)
            merged = _merge(self._pending.pop(key, None), change)
            if merged is not None:
                self._pending[key] = merged
        self._wake.set()

    def _end(self) -> None:
        self._ended = True
        self._wake.set()


def _key(node: Node) -> _Key:
    return (node.service, node.id)


def _merge(first: Change | None, then: Change) -> Change | None:
    """One change that does what two in a row do; None when they undo each other."""
    if first is None:
        return then
    if first.kind == "create":
        return None if then.kind == "delete" else Change(kind="create", node=then.node)
    if first.kind == "delete":
        return Change(kind="update", node=then.node)
    return then
