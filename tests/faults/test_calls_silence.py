"""Every call ends, at its deadline or soon after, when the service is silent or talks nonsense."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from random import Random

import pytest
from tests.faults.babble import SCRIPTS, babbling
from tests.faults.calls import (MIB, SLACK, TRANSPORTS, Callers, Served, beside, calling, linked, memory, shown)
from tests.faults.observers import Journal
from tests.faults.served import Said, Work

from micro.errors import DeadlineExceeded, MicroError, Unavailable
from micro.testing import eventually

AT_ONCE = 32
#: Answers before a fault, and after it.
ENOUGH = 500
#: Seconds in which a native client gives up a server that says nothing, and a server its client.
GIVEN_UP = 20.0
FORGOTTEN = 40.0


@pytest.mark.asyncio
async def test_service_is_stopped_for_a_while(
    served: Served, journal: Journal, chance: Random, full: bool, figures: Callable[[object], None]
) -> None:
    async with calling(served.address, "tcp") as native, calling(served.address, "http") as http:
        callers = [
            Callers(work, journal, chance, timeout=(0.2, 2.0), expected=(DeadlineExceeded,))
            for work in (native, http)
        ]
        async with beside(callers[0].run(AT_ONCE)), beside(callers[1].run(AT_ONCE)):
            for _ in range(5 if full else 1):
                await asyncio.gather(*(one.succeed(ENOUGH) for one in callers))
                served.pause()
                await asyncio.gather(*(one.fail(2 * AT_ONCE) for one in callers))
                served.resume()
                took = await right_again(*callers)
    figures(f"{callers[0]}; http {callers[1]}; right again after {took:.2f} s")


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_link_is_silent_for_a_while(
    served: Served,
    journal: Journal,
    chance: Random,
    full: bool,
    transport: str,
    figures: Callable[[object], None],
) -> None:
    async with linked(served, transport, chance) as (link, work):
        callers = Callers(
            work, journal, chance, timeout=(0.2, 1.0), expected=(DeadlineExceeded, Unavailable)
        )
        async with beside(callers.run(AT_ONCE)):
            for way in ("up", "down", "both") if full else [chance.choice(["up", "down", "both"])]:
                await callers.succeed(ENOUGH)
                link.blackhole(way)
                await callers.fail(AT_ONCE)
                link.heal()
                took = await right_again(callers)
    figures(f"{callers}; right again after {took:.2f} s")


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_service_dies_and_nobody_hears_of_it(
    served: Served,
    journal: Journal,
    chance: Random,
    transport: str,
    figures: Callable[[object], None],
) -> None:
    async with linked(served, transport, chance) as (link, work):
        callers = Callers(
            work, journal, chance, timeout=(0.2, 1.0), expected=(DeadlineExceeded, Unavailable)
        )
        async with beside(callers.run(AT_ONCE)):
            await callers.succeed(ENOUGH)
            link.half_open()
            served.kill()
            await callers.fail(2 * AT_ONCE)
            await asyncio.to_thread(served.start)
            link.heal()
            took = await right_again(callers)
    figures(f"{callers}; right again after {took:.2f} s")


@pytest.mark.asyncio
@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_service_talks_nonsense(
    journal: Journal, chance: Random, full: bool, transport: str, figures: Callable[[object], None]
) -> None:
    before = memory()
    ended: Counter[str] = Counter()

    async def ask(address: str) -> None:
        for _ in range(50 if full else 8):
            async with calling(address, transport, timeout=0.2) as work:
                began = time.monotonic()
                ended[await _asked(work)] += 1
                ended[await _asked_for_many(work)] += 1
                assert time.monotonic() - began < 2 * 0.2 + SLACK

    async with babbling(SCRIPTS[transport], chance) as address:
        await asyncio.gather(*(ask(address) for _ in range(8)))
    assert memory() - before < 50 * MIB
    assert ended["DataLoss"] + ended["Internal"] > 5
    figures(shown(ended))


async def _asked(work: Work) -> str:
    try:
        return type(await work.echo(Said("hello"))).__name__
    except MicroError as exc:
        return type(exc).__name__


async def _asked_for_many(work: Work) -> str:
    try:
        return str([type(said).__name__ async for said in work.drip(Said("hello"))])
    except MicroError as exc:
        return type(exc).__name__


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.timeout(120)
async def test_silent_peers_are_given_up_without_a_deadline(
    served: Served, journal: Journal, chance: Random
) -> None:
    async with AsyncExitStack() as stack:
        link, work = await stack.enter_async_context(linked(served, "tcp", chance, timeout=300))
        far = await stack.enter_async_context(calling(served.address, "tcp"))
        before = await far.state()
        waiting = [asyncio.create_task(_wait(work)) for _ in range(50)]
        reading = [asyncio.create_task(_read(work)) for _ in range(50)]
        await eventually(lambda: _runs(far, before.tasks + 50))
        link.blackhole()
        began = time.monotonic()
        ended = await asyncio.gather(*waiting, *reading, return_exceptions=True)
        assert {type(one) for one in ended} == {Unavailable}
        assert time.monotonic() - began < GIVEN_UP + SLACK
        left = FORGOTTEN + SLACK - (time.monotonic() - began)
        await eventually(lambda: _runs_no_more(far, before.tasks), within=left, every=0.5)


async def _wait(work: Work) -> None:
    await work.wait(Said(""))


async def _read(work: Work) -> None:
    async for _ in work.drip(Said("")):
        pass


async def _runs(work: Work, tasks: int) -> bool:
    return (await work.state()).tasks >= tasks


async def _runs_no_more(work: Work, tasks: int) -> bool:
    return (await work.state()).tasks <= tasks


async def right_again(*callers: Callers) -> float:
    """The seconds until all of them get answers again."""
    began = time.monotonic()
    await asyncio.gather(*(one.succeed(ENOUGH) for one in callers))
    took = time.monotonic() - began
    assert took < SLACK
    return took
