"""A node that is asked to end cuts nothing that runs on it, and ends soon."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.faults.calls import SLACK, TRANSPORTS
from tests.faults.survivors import Fate, Survivors

from micro.errors import Unavailable
from micro.retries import Retries
from micro.testing import eventually

#: Seconds in which a node ends that was asked to.
DRAINED = 10.0
#: A client that repeats nothing suffers from a node that goes before all have heard of it.
ONCE = Retries(attempts=1)
#: Long calls, and streams, of two nodes; so many of each have to be on the one that ends.
LONG, STREAMS = 60, 40
ENOUGH = 10


@pytest.mark.asyncio
@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_sigterm_cuts_neither_calls_nor_streams(
    survivors: Survivors, full: bool, transport: str
) -> None:
    longest = 6.0 if full else 2.5
    async with survivors.running(2, transport=transport, retries=ONCE):
        node = survivors.nodes[0]
        async with survivors.traffic(200):
            running = [
                *(begun(survivors.call(seconds=longest, timeout=15)) for _ in range(LONG)),
                *(begun(survivors.listen(50, longest)) for _ in range(STREAMS)),
            ]
            await eventually(lambda: survivors.running_now() >= LONG + STREAMS, within=10)
            calls, streams = survivors.on(node)
            assert min(calls, streams) >= ENOUGH, f"too little on it: {calls}, {streams} streams"
            node.signal(signal.SIGTERM)
            began = time.monotonic()
            assert await node.ended(within=DRAINED + SLACK) == 0
            took = time.monotonic() - began
            await asyncio.gather(*running)
        survivors.told = f"{calls} calls and {streams} streams on it, ended in {took:.1f} s"
    survivors.check_none_failed()
    survivors.check_executions()
    survivors.check_times()


@pytest.mark.full
@pytest.mark.asyncio
async def test_what_does_not_end_by_itself_does_not_hold_a_node(survivors: Survivors) -> None:
    async with survivors.running(1):
        (node,) = survivors.nodes
        endless = begun(survivors.call(seconds=50, timeout=55))
        stream = begun(survivors.listen(5000, 50))
        await eventually(lambda: survivors.running_now() == 2)
        node.signal(signal.SIGTERM)
        assert await node.ended(within=DRAINED + SLACK) == 0
        for fate in (await endless, await stream):
            assert isinstance(fate.error, Unavailable), repr(fate)


@pytest.mark.asyncio
async def test_second_signal_ends_a_node_at_once(survivors: Survivors) -> None:
    async with survivors.running(1):
        (node,) = survivors.nodes
        endless = begun(survivors.call(seconds=50, timeout=55))
        await eventually(lambda: survivors.running_now() == 1)
        node.signal(signal.SIGTERM)
        await eventually(lambda: "stopping" in node.log.read_text())
        node.signal(signal.SIGTERM)
        assert await node.ended(within=SLACK) == 128 + signal.SIGTERM
        assert isinstance((await endless).error, Unavailable)


def begun(work: Coroutine[Any, Any, Fate]) -> asyncio.Task[Fate]:
    return asyncio.create_task(work)
