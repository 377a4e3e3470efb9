"""The channels of a client: dialled once, shared, closed."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import pytest

import micro
from micro._channels import Channels, Way
from micro.call import Call, Reply
from micro.testing import eventually
from micro.transport import Channel

A: Way = ("tcp", "h:1", "")
B: Way = ("tcp", "h:2", "")


class Line(Channel):
    """A channel that remembers how it was closed."""

    def __init__(self) -> None:
        self.closed: list[float] = []

    async def call(self, call: Call, body: bytes) -> Reply:
        raise NotImplementedError

    def stream(self, call: Call, body: AsyncIterator[bytes]) -> AbstractAsyncContextManager[Reply]:
        raise NotImplementedError

    async def aclose(self, *, grace: float = 0) -> None:
        self.closed.append(grace)


class Exchange:
    """Dials when it is let; ``dialled`` are the ways that were asked for."""

    def __init__(self) -> None:
        self.dialled: list[Way] = []
        self.open = asyncio.Event()
        self.error: Exception | None = None
        self.channels = Channels(self._dial)

    async def _dial(self, way: Way) -> Channel:
        self.dialled.append(way)
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return Line()


@pytest.mark.asyncio
async def test_who_asks_first_dials_for_all() -> None:
    exchange = Exchange()
    asking = [asyncio.create_task(exchange.channels.get(A)) for _ in range(10)]
    other = asyncio.create_task(exchange.channels.get(B))
    await eventually(lambda: len(exchange.dialled) == 2)
    exchange.open.set()
    found = await asyncio.gather(*asking)
    assert len(set(map(id, found))) == 1
    assert await exchange.channels.get(A) is found[0]
    assert await other is not found[0]
    assert sorted(exchange.dialled) == [A, B]
    await exchange.channels.aclose()


@pytest.mark.asyncio
async def test_failure_is_told_to_all_who_wait_and_then_forgotten() -> None:
    exchange = Exchange()
    exchange.error = micro.Unavailable("refused", sent=False)
    asking = [asyncio.create_task(exchange.channels.get(A)) for _ in range(3)]
    exchange.open.set()
    for result in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(result, micro.Unavailable)
    await eventually(lambda: not exchange.channels)
    exchange.error = None
    await exchange.channels.get(A)
    assert exchange.dialled == [A, A]
    await exchange.channels.aclose()


@pytest.mark.asyncio
async def test_who_gives_up_ends_the_wait_of_nobody_else() -> None:
    exchange = Exchange()
    first = asyncio.create_task(exchange.channels.get(A))
    second = asyncio.create_task(exchange.channels.get(A))
    await eventually(lambda: exchange.dialled)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    exchange.open.set()
    assert isinstance(await second, Line)
    await exchange.channels.aclose()


@pytest.mark.asyncio
async def test_who_waits_when_all_are_closed_is_told_and_not_cancelled() -> None:
    exchange = Exchange()
    asking = asyncio.create_task(exchange.channels.get(A))
    await eventually(lambda: exchange.dialled)
    await exchange.channels.aclose()
    with pytest.raises(micro.Closed):
        await asking


@pytest.mark.asyncio
async def test_channel_that_is_left_is_closed_after_its_grace_and_dialled_anew() -> None:
    exchange = Exchange()
    exchange.open.set()
    first, kept = await exchange.channels.get(A), await exchange.channels.get(B)
    assert isinstance(first, Line)
    assert isinstance(kept, Line)
    exchange.channels.leave([A, ("tcp", "h:3", "")], grace=7)
    assert await exchange.channels.get(A) is not first
    await eventually(lambda: first.closed == [7])
    await exchange.channels.aclose()
    assert (first.closed, kept.closed) == ([7], [0])


@pytest.mark.asyncio
async def test_channel_that_is_left_while_it_fails_to_come_is_nobodys_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = asyncio.all_tasks()
    exchange = Exchange()
    exchange.error = micro.Unavailable("refused", sent=False)
    asking = asyncio.create_task(exchange.channels.get(A))
    await eventually(lambda: exchange.dialled)
    exchange.channels.leave([A], grace=1)
    exchange.open.set()
    with pytest.raises(micro.Unavailable):
        await asking
    await eventually(lambda: asyncio.all_tasks() <= before)
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
