"""What is sent to a reader that does not read is held back, and not in the memory of its sender."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing

import pytest
from tests.faults.calls import MIB, TRANSPORTS, Stage, beside, memory
from tests.faults.served import MESSAGES, SIZE, Said, Work
from tests.faults.wire import connected, greeting, http_call, native_call, said

from micro.testing import eventually

#: Streams at once, each of which has 1 GiB to send.
STREAMS = 4
#: Bytes that they may add to their sender's memory, all together; the kernel holds some more.
MOST = 32 * MIB
#: As MOST, of replies that nobody reads: four of the largest may wait, each with its request.
MOST_REPLIES = 96 * MIB
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

        async def poured() -> int:
            return (await asking.state()).poured

        before = memory(stage.served.pid)
        streams = [work.pour(Said("")) for _ in range(STREAMS)]
        for stream in streams:
            await stack.enter_async_context(aclosing(stream))
            assert len(await anext(stream)) == SIZE
        held = await settled(poured, stage.served.pid, before)
        for stream in streams:
            for _ in range(200):
                assert len(await anext(stream)) == SIZE
        assert held < await poured() < STREAMS * MESSAGES


@pytest.mark.asyncio
@by_transport
async def test_service_that_stops_reading_bounds_the_memory_of_the_client(
    stage: Stage, transport: str
) -> None:
    sent = 0

    async def parts() -> AsyncIterator[str]:
        nonlocal sent
        for _ in range(MESSAGES):
            sent += 1
            yield "x" * SIZE

    async def count() -> int:
        return sent

    async with AsyncExitStack() as stack:
        asking = await stack.enter_async_context(stage.calling("tcp"))
        work = await stack.enter_async_context(stage.calling(transport, timeout=60))
        before = memory()
        for _ in range(STREAMS):
            await stack.enter_async_context(beside(_take(work, parts())))
        held = await settled(count, "self", before)
        assert held > STREAMS
        await asking.release()
        await eventually(lambda: sent > held + 200 * STREAMS)
        assert sent < STREAMS * MESSAGES


@pytest.mark.asyncio
@by_transport
async def test_client_that_reads_no_replies_bounds_the_memory_of_the_service(
    stage: Stage, transport: str
) -> None:
    address, pid = stage.served.address, stage.served.pid
    text, sent = said("x" * 60_000), 0
    native = transport == "tcp"

    async def call_on() -> None:
        nonlocal sent
        async with connected(address, greeting() if native else b"", unread=True) as raw:
            for number in range(1, MESSAGES):
                http = http_call("Work.Echo", text)
                call = native_call("Work.Echo", text, number) if native else http
                await raw.say(call)
                sent += 1

    async def count() -> int:
        return sent

    before = memory(pid)
    async with beside(call_on()):
        held = await settled(count, pid, before, most=MOST_REPLIES)
    assert 10 < held < MESSAGES / 2
    async with stage.calling(transport) as work:
        assert await work.echo(Said("after")) == Said("after")


async def _take(work: Work, parts: AsyncIterator[str]) -> None:
    await work.take(parts)


async def settled(
    count: Callable[[], Awaitable[int]], pid: int | str, before: int, *, most: int = MOST
) -> int:
    """What ``count`` stays at; meanwhile the memory of the process may not have grown by more."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < STAYS:
        held = memory(pid) - before
        assert held < most, f"{held / MIB:.0f} MiB more, with {last} messages"
        now = await count()
        if now != last:
            last, since = now, time.monotonic()
        await asyncio.sleep(0.02)
    return last
