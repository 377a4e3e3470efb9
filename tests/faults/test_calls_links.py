"""Calls end with their own reply, or with an error that says so, whatever their link does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random

import pytest
from tests.faults.calls import TRANSPORTS, Callers, Served, beside, calling, linked, shown
from tests.faults.observers import Journal

from micro.errors import DataLoss, DeadlineExceeded, Internal, MicroError, Unavailable
from micro.testing import FaultProxy, eventually

AT_ONCE = 16
#: Calls between two faults, that each of them befalls traffic.
BETWEEN = 50
#: Links that are spoilt at once, as calls on them wait for their deadlines.
LANES = 8

#: What calls end with when their connection is given up, as it makes no sense.
GIVEN_UP = {"tcp": "DataLoss", "http": "Internal"}

by_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.mark.asyncio
@by_transport
async def test_connections_end_within_frames(
    served: Served,
    journal: Journal,
    chance: Random,
    full: bool,
    transport: str,
    figures: Callable[[object], None],
) -> None:
    async with linked(served, transport, chance) as (link, work):
        callers = Callers(work, journal, chance, expected=(Unavailable,))
        async with beside(callers.run(AT_ONCE)):
            for _ in range(300 if full else 30):
                await callers.succeed(BETWEEN)
                end = chance.choice([link.reset_after, link.cut_after])
                way = chance.choice(["up", "down"])
                end(chance.randrange(1000), direction=way, connections="open")
                await callers.fail(1)
            await callers.succeed(BETWEEN)
        link.heal()
        assert not any(await work.executions(callers.unsent))
    figures(callers)


@pytest.mark.asyncio
@pytest.mark.timeout(280)
@by_transport
async def test_bytes_come_one_by_one(
    served: Served,
    journal: Journal,
    chance: Random,
    full: bool,
    transport: str,
    figures: Callable[[object], None],
) -> None:
    calls = {"tcp": 7500 if full else 300, "http": 2500 if full else 100}[transport]
    async with linked(served, transport, chance, timeout=30) as (link, work):
        callers = Callers(work, journal, chance, timeout=(30, 30))
        for way in ("up", "down"):
            link.slice(1, direction=way)
            await callers.make(calls // 2, at_once=64)
            link.heal()
    assert callers.done == calls
    figures(callers)


class Spoilt(Callers):
    """A bit of what they say, or hear, may be wrong."""

    def compare(self, sent: str, got: str) -> None:
        wrong = sum(one != other for one, other in zip(sent, got, strict=False))
        if len(got) != len(sent) or wrong > 1:
            super().compare(sent, got)


@pytest.mark.asyncio
@by_transport
async def test_bits_are_flipped(
    served: Served,
    journal: Journal,
    chance: Random,
    full: bool,
    transport: str,
    figures: Callable[[object], None],
) -> None:
    rounds = 100 if full else 20
    async with AsyncExitStack() as stack:
        lanes = [FaultProxy(served.address, seed=chance.randrange(10**6)) for _ in range(LANES)]
        for link in lanes:
            await stack.enter_async_context(link)
        spoiling = [spoil(link, transport, journal, chance, rounds) for link in lanes]
        failed = sum(await asyncio.gather(*spoiling), Counter[str]())
    assert failed[GIVEN_UP[transport]]
    figures(f"{LANES * rounds:7} bits, {shown(failed)}")


async def spoil(
    link: FaultProxy, transport: str, journal: Journal, chance: Random, rounds: int
) -> Counter[str]:
    """Spoil one bit after another, each in traffic, on connections of its own: what failed."""
    failed: Counter[str] = Counter()
    for _ in range(rounds):
        async with calling(link.address, transport) as work:
            callers = Spoilt(work, journal, chance, timeout=(0.3, 0.3), expected=(MicroError,))
            if chance.random() < 0.5:
                await callers.make(8, at_once=8)
            link.flip_bit(chance.randrange(1, 200), direction=chance.choice(["up", "down"]))
            await callers.make(16, at_once=8)
        assert "with a wrong bit" in link.log.rpartition("flip_bit")[2]
        failed += callers.failed
        link.heal()
    return failed


@pytest.mark.asyncio
@by_transport
async def test_chunks_come_twice(
    served: Served,
    journal: Journal,
    chance: Random,
    full: bool,
    transport: str,
    figures: Callable[[object], None],
) -> None:
    expected = (DataLoss, DeadlineExceeded, Internal, Unavailable)
    async with linked(served, transport, chance) as (link, work):
        callers = Callers(work, journal, chance, timeout=(1.0, 1.0), expected=expected)
        async with beside(callers.run(AT_ONCE)):
            for _ in range(300 if full else 50):
                await callers.succeed(BETWEEN)
                link.dup_chunk(direction=chance.choice(["up", "down"]), connections="open")
                await eventually(lambda: "twice" in link.log.rpartition("dup_chunk")[2], every=0.001)
            await callers.succeed(BETWEEN)
        if transport == "tcp":  # HTTP cannot tell a request that came twice from two
            assert max(await work.executions(callers.texts)) == 1
    figures(callers)
