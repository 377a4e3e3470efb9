"""A great many calls, some of them given up: each gets its own reply, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from random import Random
from typing import Any

import pytest
from tests.faults.calls import MIB, TRANSPORTS, Served, Stage, files, memory, shown
from tests.faults.served import Said, Work

import micro
from micro.errors import DeadlineExceeded
from micro.testing import eventually

#: Callers of each transport. HTTP's calls cost more, and have a connection each to themselves.
NATIVE, HTTP = 48, 16
#: How many of 1,000 calls are plain, large, cancelled, hasty.
WEIGHTS = (960, 1, 20, 20)
#: How many times as long texts are large: most of them do not fit one frame.
LARGE = 4000


@pytest.mark.asyncio
@pytest.mark.timeout(280)
async def test_no_call_gets_the_reply_of_another(stage: Stage) -> None:
    numbers = iter(range(1_000_000 if stage.full else 50_000))
    async with stage.calling("tcp") as native, stage.calling("http") as http:
        ways = [native] * NATIVE + [http] * HTTP
        callers = [Caller(stage, work, numbers) for work in ways]
        await asyncio.gather(*(caller.run() for caller in callers))
    ended = sum((caller.ended for caller in callers), Counter[str]())
    assert ended["cancelled"] > 100
    assert ended["late"] > 100
    answered = ended.pop("answered")
    stage.figures = f"{answered:7} calls, {shown(ended)}"


class Caller:
    """Calls as long as there are numbers; a few calls are large, a few cancelled, a few hasty."""

    def __init__(self, stage: Stage, work: Work, numbers: Iterator[int]) -> None:
        self.ended: Counter[str] = Counter()
        self._work = work
        self._numbers = numbers
        self._chance = stage.chance
        self._journal = stage.journal

    async def run(self) -> None:
        kinds = (self._plain, self._large, self._cancelled, self._hasty)
        for number in self._numbers:
            (call,) = self._chance.choices(kinds, WEIGHTS)
            said = Said("x" * (number % 50), number)
            while not await call(said):
                call = self._plain

    async def _plain(self, said: Said) -> bool:
        self._compare(said, await self._work.echo(said))
        return True

    async def _large(self, said: Said) -> bool:
        said.text *= LARGE
        return await self._plain(said)

    async def _cancelled(self, said: Said) -> bool:
        task = asyncio.create_task(self._plain(said))
        await asyncio.wait([task], timeout=self._chance.random() * 0.004)
        task.cancel()
        await asyncio.wait([task])
        self.ended["cancelled"] += task.cancelled()
        return not task.cancelled() and task.result()

    async def _hasty(self, said: Said) -> bool:
        try:
            got = await micro.using(self._work, timeout=self._chance.random() * 0.004).echo(said)
        except DeadlineExceeded:
            self.ended["late"] += 1
            return False
        self._compare(said, got)
        return True

    def _compare(self, said: Said, got: Said) -> None:
        self.ended["answered"] += 1
        if got != said:
            self._journal.blame(f"{said.number} got the reply {got.number}")


@pytest.mark.asyncio
@pytest.mark.timeout(120)
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_calls_and_streams_that_are_cancelled_leave_nothing(
    stage: Stage, transport: str
) -> None:
    calls, streams = (10_000, 1000) if stage.full or transport == "tcp" else (1000, 100)
    give_up = GivingUp(stage.chance, *{"tcp": (50, 0.01), "http": (20, 0.05)}[transport])
    async with stage.calling(transport, timeout=60) as work:
        await give_up(work, calls // 10, streams // 10)  # what is made once, stays
        before = await in_use(stage.served, work)
        begun = (await work.state()).begun
        await give_up(work, calls, streams)
        assert (await work.state()).begun - begun > (calls + streams) / 4

        async def more() -> dict[str, int]:
            return grown(before, await in_use(stage.served, work), calls)

        async def no_more() -> bool:
            return not await more()

        with contextlib.suppress(AssertionError):  # this one shows no figures
            await eventually(no_more, every=0.2)
        assert await more() == {}


async def in_use(served: Served, work: Work) -> dict[str, int]:
    """What both processes use."""
    state = await work.state()
    gc.collect()
    return {
        "tasks here": len(asyncio.all_tasks()),
        "tasks there": state.tasks,
        "files here": files(),
        "files there": files(served.pid),
        "pieces here": sys.getallocatedblocks(),
        "pieces there": state.blocks,
        "memory here": memory(),
        "memory there": memory(served.pid),
    }


def grown(before: dict[str, int], now: dict[str, int], calls: int) -> dict[str, int]:
    """By how much there is more of what should not be; a call that stays has a dozen pieces."""
    most = {"tasks": 0, "files": 2, "pieces": calls // 2, "memory": 10 * MIB}
    growth = {what: now[what] - before[what] for what in before}
    return {what: more for what, more in growth.items() if more > most[what.split()[0]]}


class GivingUp:
    """Cancels calls as they run, or before, and leaves streams, each after ``patience`` at most."""

    def __init__(self, chance: Random, at_once: int, patience: float) -> None:
        self._chance = chance
        self._at_once = at_once
        self._patience = patience

    async def __call__(self, work: Work, calls: int, streams: int) -> None:
        await self._give_up(lambda: _wait(work), calls)
        await self._give_up(lambda: _read(work, self._chance.choice([1, 2])), streams)

    async def _give_up(self, start: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
        left = iter(range(count))

        async def go_on() -> None:
            for _ in left:
                task = asyncio.create_task(start())
                await asyncio.wait([task], timeout=self._chance.random() * self._patience)
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.result()

        await asyncio.gather(*(go_on() for _ in range(self._at_once)))


async def _wait(work: Work) -> None:
    await work.wait(Said("x" * 100))


async def _read(work: Work, replies: int) -> None:
    """Of the stream, which has one: leaves then, or waits for more."""
    async with aclosing(work.drip(Said("x" * 100))) as said:
        for _ in range(replies):
            await anext(said)
