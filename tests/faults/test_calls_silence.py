"""Every call ends, at its deadline or soon after, when the service is silent or talks nonsense."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Literal

import pytest
from tests.faults.babble import SCRIPTS, babbling
from tests.faults.calls import (
    MIB,
    SLACK,
    TRANSPORTS,
    Callers,
    Stage,
    beside,
    calling,
    memory,
    shown,
)
from tests.faults.served import Said, Work

from micro.errors import DeadlineExceeded, MicroError, Unavailable
from micro.testing import eventually

AT_ONCE = 32
#: Answers before a fault, and after it.
ENOUGH = 500
#: Seconds in which a native client gives up a server that says nothing, and a server its client.
GIVEN_UP = 20.0
FORGOTTEN = 40.0
#: Of calls to a server that talks nonsense.
HASTY = 0.2

WAYS: tuple[Literal["up", "down", "both"], ...] = ("up", "down", "both")

by_transport = pytest.mark.parametrize("transport", TRANSPORTS)


@pytest.mark.asyncio
async def test_service_is_stopped_for_a_while(stage: Stage) -> None:
    async with stage.calling("tcp") as native, stage.calling("http") as http:
        both = [
            Callers(stage, work, timeout=(0.2, 2.0), expected=(DeadlineExceeded,))
            for work in (native, http)
        ]
        async with beside(both[0].run(AT_ONCE)), beside(both[1].run(AT_ONCE)):
            for _ in range(5 if stage.full else 1):
                await asyncio.gather(*(callers.succeed(ENOUGH) for callers in both))
                stage.served.pause()
                await asyncio.gather(*(callers.fail(2 * AT_ONCE) for callers in both))
                stage.served.resume()
                await right_again(stage, *both)


@pytest.mark.asyncio
@by_transport
async def test_link_is_silent_for_a_while(stage: Stage, transport: str) -> None:
    expected = (DeadlineExceeded, Unavailable)
    async with stage.linked(transport) as (link, work):
        callers = Callers(stage, work, timeout=(0.2, 1.0), expected=expected)
        async with beside(callers.run(AT_ONCE)):
            for way in WAYS if stage.full else stage.chance.sample(WAYS, 1):
                await callers.succeed(ENOUGH)
                link.blackhole(way)
                await callers.fail(AT_ONCE)
                link.heal()
                await right_again(stage, callers)


@pytest.mark.asyncio
@by_transport
async def test_service_dies_and_nobody_hears_of_it(stage: Stage, transport: str) -> None:
    expected = (DeadlineExceeded, Unavailable)
    async with stage.linked(transport) as (link, work):
        callers = Callers(stage, work, timeout=(0.2, 1.0), expected=expected)
        async with beside(callers.run(AT_ONCE)):
            await callers.succeed(ENOUGH)
            link.half_open()
            stage.served.kill()
            await callers.fail(2 * AT_ONCE)
            await asyncio.to_thread(stage.served.start)
            link.heal()
            await right_again(stage, callers)


async def right_again(stage: Stage, *all_callers: Callers) -> None:
    """They get answers again, and soon."""
    began = time.monotonic()
    await asyncio.gather(*(callers.succeed(ENOUGH) for callers in all_callers))
    took = time.monotonic() - began
    stage.figures = f"{'; '.join(map(str, all_callers))}; right again after {took:.2f} s"
    assert took < SLACK


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.timeout(120)
async def test_silent_peers_are_given_up_without_a_deadline(stage: Stage) -> None:
    async with AsyncExitStack() as stack:
        link, work = await stack.enter_async_context(stage.linked("tcp", timeout=300))
        far = await stack.enter_async_context(stage.calling("tcp"))
        before = (await far.state()).tasks
        waiting = [asyncio.create_task(_wait(work)) for _ in range(50)]
        reading = [asyncio.create_task(_read(work)) for _ in range(50)]

        async def run() -> bool:
            return (await far.state()).tasks >= before + 50

        async def ended() -> bool:
            return (await far.state()).tasks <= before

        await eventually(run)
        link.blackhole()
        began = time.monotonic()
        told = await asyncio.gather(*waiting, *reading, return_exceptions=True)
        assert {type(one) for one in told} == {Unavailable}
        assert time.monotonic() - began < GIVEN_UP + SLACK
        left = FORGOTTEN + SLACK - (time.monotonic() - began)
        await eventually(ended, within=left, every=0.5)


async def _wait(work: Work) -> None:
    await work.wait(Said(""))


async def _read(work: Work) -> None:
    async for _ in work.drip(Said("")):
        pass


class Asker:
    """Somebody who asks a service that talks nonsense; what comes of it, by name."""

    def __init__(self, address: str, transport: str) -> None:
        self.ended: Counter[str] = Counter()
        self._address = address
        self._transport = transport

    async def ask(self, times: int) -> None:
        for _ in range(times):
            async with calling(self._address, self._transport, timeout=HASTY) as work:
                began = time.monotonic()
                self.ended[await self._one(work)] += 1
                self.ended[await self._many(work)] += 1
                assert time.monotonic() - began < 2 * HASTY + SLACK

    async def _one(self, work: Work) -> str:
        try:
            return type(await work.echo(Said("hello"))).__name__
        except MicroError as exc:
            return type(exc).__name__

    async def _many(self, work: Work) -> str:
        try:
            return str([type(said).__name__ async for said in work.drip(Said("hello"))])
        except MicroError as exc:
            return type(exc).__name__


@pytest.mark.asyncio
@by_transport
async def test_service_talks_nonsense(stage: Stage, transport: str) -> None:
    before = memory()
    async with babbling(SCRIPTS[transport], stage.chance) as address:
        askers = [Asker(address, transport) for _ in range(8)]
        await asyncio.gather(*(asker.ask(40 if stage.full else 5) for asker in askers))
    ended = sum((asker.ended for asker in askers), Counter[str]())
    assert memory() - before < 50 * MIB
    assert ended["DataLoss"] + ended["Internal"] > 5
    stage.figures = shown(ended)
