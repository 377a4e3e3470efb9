"""What is sent to a reader that does not read is held back, and in the memory of neither side."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing

import pytest
from tests.faults.calls import MIB, TRANSPORTS, Stage, beside, memory
from tests.faults.served import MESSAGES, Said, Work, poured
from tests.faults.wire import connected, greeting, http_call, native_call, said

from micro.testing import eventually

#: Streams at once, each of which has 1 GiB to send.
STREAMS = 4
#: Bytes that they may add to the memory of one side, all together; the kernel holds some more.
MOST = 32 * MIB
#: As MOST, of replies that nobody reads: four of the largest may wait, each with its request.
MOST_REPLIES = 96 * MIB
#: How many are sent, of 60 kB each, whose replies nobody reads: 1 GiB.
CALLS = 18_000
#: Seconds without another message after which none comes.
STAYS = 0.5

by_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.mark.asyncio
@by_transport
async def test_client_that_stops_reading_bounds_the_memory_of_the_service(
    stage: Stage, transport: str
) -> None:
    async with AsyncExitStack() as stack:
        asking = await stack.enter_async_context(stage.calling("tcp"))
        work = await stack.enter_async_context(stage.calling(transport, timeout=60))

        async def count() -> int:
            return (await asking.state()).poured

        sides = Sides(stage)
        streams = [work.pour(Said("")) for _ in range(STREAMS)]
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
            await anext(stream)
        held = await sides.settled(count)
        for stream in streams:
            for _ in range(200):
                await anext(stream)
        assert held < await count() < STREAMS * MESSAGES


@pytest.mark.asyncio
@by_transport
async def test_service_that_stops_reading_bounds_the_memory_of_the_client(
    stage: Stage, transport: str
) -> None:
    sent = 0

    async def parts() -> AsyncIterator[str]:
        nonlocal sent
        for text in poured():
            sent += 1
            yield text

    async def count() -> int:
        return sent

    async with AsyncExitStack() as stack:
        asking = await stack.enter_async_context(stage.calling("tcp"))
        work = await stack.enter_async_context(stage.calling(transport, timeout=60))
        sides = Sides(stage)
        for _ in range(STREAMS):
            await stack.enter_async_context(beside(_take(work, parts())))
        held = await sides.settled(count)
        assert held > STREAMS
        await asking.release()
        await eventually(lambda: sent > held + 200 * STREAMS)
        assert sent < STREAMS * MESSAGES


@pytest.mark.asyncio
@by_transport
async def test_client_that_reads_no_replies_bounds_the_memory_of_the_service(
    stage: Stage, transport: str
) -> None:
    address = stage.served.address
    text, sent = said("x" * 60_000), 0
    native = transport == "tcp"

    async def call_on() -> None:
        nonlocal sent
        async with connected(address, greeting() if native else b"", unread=True) as raw:
            for number in range(1, CALLS):
                http = http_call("Work.Echo", text)
                call = native_call("Work.Echo", text, number) if native else http
                await raw.say(call)
                sent += 1

    async def count() -> int:
        return sent

    sides = Sides(stage)
    async with beside(call_on()):
        held = await sides.settled(count, most=MOST_REPLIES)
    assert 10 < held < CALLS / 2
    async with stage.calling(transport) as work:
        assert await work.echo(Said("after")) == Said("after")


async def _take(work: Work, parts: AsyncIterator[str]) -> None:
    await work.take(parts)


class Sides:
    """The memory of the service and of its client, from here on."""

    def __init__(self, stage: Stage) -> None:
        self._before = {pid: memory(pid) for pid in (stage.served.pid, os.getpid())}

    async def settled(self, count: Callable[[], Awaitable[int]], *, most: int = MOST) -> int:
        """What ``count`` stays at; meanwhile neither side's memory may have grown by more."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < STAYS:
            for pid, before in self._before.items():
                held = memory(pid) - before
                assert held < most, f"{held / MIB:.0f} MiB more, with {last} messages"
            now = await count()
            if now != last:
                last, since = now, time.monotonic()
            await asyncio.sleep(0.02)
        return last
