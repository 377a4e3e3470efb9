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
    """One client and how many hold it."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self.manager = manager
        self.users = 0
        self.opening = asyncio.Lock()
        self.value: Any = None
        self.open = False


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
        self._held: list[Hashable] = []
        self._closed = False

    async def get(self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[C]]) -> C:
        """The client under ``key``; the first call makes and enters it, however many ask at once.

        Raises:
            Closed: after ``aclose``.
        """
        if self._closed:
            raise Closed("connections: used after they were closed")
        entry = self._entries.setdefault(key, _Shared(make()))
        entry.users += 1
        try:
            async with entry.opening:
                if not entry.open:
                    entry.value = await entry.manager.__aenter__()
                    entry.open = True
        except BaseException:
            self._forget(key, entry)
            raise
        self._held.append(key)
        return cast("C", entry.value)

    async def aclose(self) -> None:
        """Close what nobody else holds, the youngest first. A second call does nothing."""
        self._closed = True
        while self._held:
            key = self._held.pop()
            entry = self._entries[key]
            if self._forget(key, entry):
                await entry.manager.__aexit__(None, None, None)
        if self.shared is not self:
            await self.shared.aclose()

    def _forget(self, key: Hashable, entry: _Shared) -> bool:
        """Count one user less; True when it was the last."""
        entry.users -= 1
        if not entry.users:
            del self._entries[key]
        return not entry.users
