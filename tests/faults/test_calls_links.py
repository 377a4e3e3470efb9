"""Calls end with their own reply, or with an error that says so, whatever their link does."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from typing import Literal, TypeAlias

import pytest
from tests.faults.calls import TRANSPORTS, Callers, Stage, beside, calling, shown

from micro.errors import DataLoss, DeadlineExceeded, Internal, MicroError, Unavailable
from micro.testing import FaultProxy, eventually

AT_ONCE = 16
#: Answers between two faults, so that each of them befalls traffic.
BETWEEN = 50
#: Links that are spoilt at once, as calls on them wait for their deadlines.
LANES = 8
#: How often calls are made until one of them passed the place of the wrong bit.
TRIES = 20
#: What calls end with as their connection is given up, when the service cannot make sense of what
#: goes up, and when they cannot of what comes down.
GIVEN_UP = {
    "tcp": {"up": "DataLoss", "down": "DataLoss"},
    "http": {"up": "InvalidArgument", "down": "Internal"},
}

Way: TypeAlias = Literal["up", "down"]
WAYS: tuple[Way, ...] = ("up", "down")

by_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.mark.asyncio
@by_transport
async def test_connections_end_within_frames(stage: Stage, transport: str) -> None:
    chance = stage.chance
    async with stage.linked(transport) as (link, work):
        callers = Callers(stage, work, expected=(Unavailable,))
        async with beside(callers.run(AT_ONCE)):
            for _ in range(150 if stage.full else 30):
                await callers.succeed(BETWEEN)
                end = chance.choice([link.reset_after, link.cut_after])
                end(chance.randrange(1000), direction=chance.choice(WAYS), connections="open")
                await callers.fail(1)
            await callers.succeed(BETWEEN)
        link.heal()
        assert not any(await work.executions(callers.unsent))
    stage.figures = str(callers)


@pytest.mark.asyncio
@pytest.mark.timeout(280)
@by_transport
async def test_bytes_come_one_by_one(stage: Stage, transport: str) -> None:
    sample, full = {"tcp": (300, 8000), "http": (100, 2000)}[transport]
    calls = full if stage.full else sample
    async with stage.linked(transport, timeout=30) as (link, work):
        callers = Callers(stage, work, timeout=(30, 30))
        for way in WAYS:
            link.slice(1, direction=way)
            await callers.make(calls // 2, at_once=64)
            link.heal()
    assert callers.done == calls
    stage.figures = str(callers)


class Spoilt(Callers):
    """A bit of what they say, or hear, may be wrong."""

    def compare(self, sent: str, got: str) -> None:
        wrong = sum(one != other for one, other in zip(sent, got, strict=False))
        if len(got) != len(sent) or wrong > 1:
            super().compare(sent, got)


@pytest.mark.asyncio
@pytest.mark.timeout(120)
@by_transport
async def test_bits_are_flipped(stage: Stage, transport: str) -> None:
    rounds = (60 if transport == "tcp" else 30) if stage.full else 12
    async with AsyncExitStack() as stack:
        lanes = [await stack.enter_async_context(stage.link()) for _ in range(LANES)]
        failed: dict[str, Counter[str]] = {}
        for way in WAYS:
            spoiling = [spoil(stage, link, transport, way, rounds // 2) for link in lanes]
            failed[way] = sum(await asyncio.gather(*spoiling), Counter[str]())
    for direction, error in GIVEN_UP[transport].items():
        assert failed[direction][error], f"{direction}: {shown(failed[direction])}"
    stage.figures = f"{LANES * rounds:7} bits, {shown(failed['up'] + failed['down'])}"


async def spoil(
    stage: Stage, link: FaultProxy, transport: str, way: Way, rounds: int
) -> Counter[str]:
    """Spoil one bit after another, each in traffic, on connections of its own: what failed."""
    failed: Counter[str] = Counter()
    for _ in range(rounds):
        async with calling(link.address, transport) as work:
            callers = Spoilt(stage, work, timeout=(0.3, 0.3), expected=(MicroError,))
            if stage.chance.random() < 0.5:
                await callers.make(8, at_once=8)  # else it is in the first that each side says
            link.flip_bit(stage.chance.randrange(1, 200), direction=way)
            for _ in range(TRIES):
                await callers.make(16, at_once=8)
                if "with a wrong bit" in link.log.rpartition("flip_bit")[2]:
                    break
            else:
                raise AssertionError(f"too little traffic: {callers}")
        failed += callers.failed
        link.heal()
    return failed


@pytest.mark.asyncio
@by_transport
async def test_chunks_come_twice(stage: Stage, transport: str) -> None:
    expected = (DataLoss, DeadlineExceeded, Internal, Unavailable)
    async with stage.linked(transport) as (link, work):
        callers = Callers(stage, work, timeout=(1.0, 1.0), expected=expected)
        async with beside(callers.run(AT_ONCE)):
            for _ in range(100 if stage.full else 30):
                await callers.succeed(BETWEEN)
                link.dup_chunk(direction=stage.chance.choice(WAYS), connections="open")
                await eventually(
                    lambda: "twice" in link.log.rpartition("dup_chunk")[2], every=0.001
                )
            await callers.succeed(BETWEEN)
        if transport == "tcp":  # HTTP cannot tell a request that came twice from two
            assert max(await work.executions(callers.texts)) == 1
    stage.figures = str(callers)
