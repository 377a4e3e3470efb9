"""The channels of a client: one to each node, whoever calls it, dialled once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeAlias

from micro.errors import Closed
from micro.transport import Channel

#: The transport's name, the address, and under TLS the service that has to be there.
Way: TypeAlias = tuple[str, str, str]


class Channels:
    """Dials when a channel is asked for, and closes it when nobody needs it any more."""

    def __init__(self, dial: Callable[[Way], Awaitable[Channel]]) -> None:
        self._dial = dial
        self._dialled: dict[Way, asyncio.Task[Channel]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._dialled)

    async def get(self, way: Way) -> Channel:
        """The channel of this way; whoever asks first dials for all.

        Raises:
            Closed: they were closed meanwhile.
            MicroError: it cannot be dialled.
        """
        dialled = self._dialled.get(way)
        if dialled is None:
            dialled = asyncio.create_task(self._made(way))
            self._dialled[way] = dialled
            dialled.add_done_callback(partial(self._made_or_not, way))
        try:
            return await asyncio.shield(dialled)
        except asyncio.CancelledError:
            if dialled.cancelled():  # nobody asked this call to end
                raise Closed("the client was closed while it called") from None
            raise

    def leave(self, ways: Iterable[Way], *, grace: float) -> None:
        """Close these, after calls that run had ``grace`` seconds to end."""
        for way in ways:
            dialled = self._dialled.pop(way, None)
            if dialled is not None:
                task = asyncio.create_task(_close(dialled, grace))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Close all; calls that run fail."""
        channels = tuple(self._dialled.values())
        self._dialled.clear()
        for dialled in channels:
            dialled.cancel()
            if not dialled.cancelled() and dialled.done() and dialled.exception() is None:
                await dialled.result().aclose()
        await asyncio.gather(*channels, *self._closing, return_exceptions=True)

    async def _made(self, way: Way) -> Channel:
        return await self._dial(way)

    def _made_or_not(self, way: Way, dialled: asyncio.Task[Channel]) -> None:
        """Forget a failure, so that the next call dials again, whoever still waits for this one."""
        failed = dialled.cancelled() or dialled.exception() is not None
        if failed and self._dialled.get(way) is dialled:
            del self._dialled[way]


async def _close(dialled: asyncio.Task[Channel], grace: float) -> None:
    try:
        channel = await dialled
    except Exception:  # those who dialled have been told; there is nothing to close
        return
    await channel.aclose(grace=grace)
