"""What all backends have in common, and the clients that they share."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Generic, TypeVar, cast

import msgspec

from micro.errors import Closed
from micro.url import URL

F = TypeVar("F")
C = TypeVar("C")


class NoOptions(msgspec.Struct, frozen=True):
    """The options of a backend that takes none."""


class Backend(ABC, Generic[F]):
    """Something a service talks to, chosen by the scheme of a URL.

    Its life is: made, connected, closed. Making it does no I/O, starts no task and reads no
    environment.
    """

    #: The schemes it is selected by.
    schemes: ClassVar[tuple[str, ...]]
    #: The query of its URL, typed; a float field takes durations (``5s``).
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    #: What it can do; final once connected.
    features: F

    def __init__(self, url: URL) -> None:
        self.url = url

    @abstractmethod
    async def connect(self, connections: Connections) -> None:
        """Make it usable.

        Cancelled or failed, it leaves nothing open.

        Raises:
            Unavailable: it cannot be reached in time.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Give everything back. A second call does nothing; later use raises Closed."""


class _Shared:
    """One client, how many hold it, and the task that enters it and leaves it."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self.users = 0
        self.ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.ready.add_done_callback(_looked_at)
        self._released = asyncio.Event()
        self._task = asyncio.create_task(self._keep(manager), name="micro.backend client")

    async def aclose(self) -> None:
        """Leave the client; one that is still being entered is cancelled."""
        self._released.set()
        if not self.ready.done():
            self._task.cancel()
        (outcome,) = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(outcome, Exception):
            raise outcome

    async def _keep(self, manager: AbstractAsyncContextManager[Any]) -> None:
        try:
            async with manager as value:
                self.ready.set_result(value)
                await self._released.wait()
        except BaseException as exc:  # whatever it is, those who wait must be told
            if self.ready.done():
                raise
            if isinstance(exc, Exception):
                self.ready.set_exception(exc)
            else:
                self.ready.cancel()


class Connections:
    """Clients shared by the backends of one service: two kinds on one server use one channel.

    ``shared`` is one level up, owned by Plugins and counted: what is taken there is closed when the
    last service that took it closes. Not for use from several event loops.
    """

    def __init__(
        self, entries: dict[Hashable, _Shared] | None = None, *, shared: Connections | None = None
    ) -> None:
        self.shared: Connections = shared or self
        self._entries = {} if entries is None else entries
        self._held: list[tuple[Hashable, _Shared]] = []
        self._closed = False

    async def get(self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[C]]) -> C:
        """The client under ``key``; the first call makes and enters it, however many ask at once.

        It is entered and left in one task of its own. A failure to enter it is told to all who
        wait; who asks later tries again.

        Raises:
            Closed: after ``aclose``, or when it comes before the client is there.
        """
        if self._closed:
            raise Closed("connections: used after they were closed")
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Shared(make())
        entry.users += 1
        self._held.append((key, entry))
        try:
            return cast("C", await asyncio.shield(entry.ready))
        except BaseException as exc:
            if (key, entry) not in self._held:  # aclose gave it back
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise Closed("connections: closed before the client was there") from exc
            self._held.remove((key, entry))
            await self._give_back(key, entry)
            raise

    async def aclose(self) -> None:
        """Close what nobody else holds, the youngest first. A second call does nothing.

        Raises:
            Exception: the first with which a client closed; all are closed nevertheless.
        """
        self._closed = True
        errors: list[Exception] = []
        while self._held:
            try:
                await self._give_back(*self._held.pop())
            except Exception as exc:  # a client that closes badly must not keep the others open
                errors.append(exc)
        if self.shared is not self:
            await self.shared.aclose()
        if errors:
            raise errors[0]

    async def _give_back(self, key: Hashable, entry: _Shared) -> None:
        entry.users -= 1
        failed = entry.ready.done() and (entry.ready.cancelled() or entry.ready.exception())
        if (not entry.users or failed) and self._entries.get(key) is entry:
            del self._entries[key]
        if not entry.users:
            await entry.aclose()


def _looked_at(ready: asyncio.Future[Any]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not ready.cancelled():
        ready.exception()
