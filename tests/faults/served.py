"""The service whose calls suffer the faults, as a program.

``served.py PORT [HEAD_TIMEOUT BODY_TIMEOUT]``; without these, in seconds, they are the defaults.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import micro
from micro.transport import Limits

#: How many messages a stream has, of over 1 GiB.
MESSAGES = 12 * 1024
_TICK = 0.005


@dataclass
class Said:
    text: str
    number: int = 0


@dataclass
class Defaults:
    number: int = 7


@dataclass
class State:
    """Of the process: its tasks, and the pieces of memory that Python has given out.

    ``begun`` is how many calls of ``wait`` and ``drip`` there were, ``poured`` how many messages of
    ``pour``. ``blocked`` is the most that its loop has computed without looking at anything else,
    in seconds of the processor: a busy machine adds nothing to it.
    """

    tasks: int
    blocks: int
    begun: int
    poured: int
    blocked: float


def poured() -> Iterator[str]:
    """Over 1 GiB; every other message does not fit one frame of the native protocol."""
    texts = ("x" * 60_000, "x" * 120_000)
    for number in range(MESSAGES):
        yield texts[number % 2]


class Work:
    def __init__(self) -> None:
        self._executed: Counter[str] = Counter()
        self._begun = 0
        self._poured = 0
        self._blocked = 0.0
        self._released = asyncio.Event()

    async def echo(self, said: Said) -> Said:
        return said

    async def record(self, said: Said) -> Said:
        """As ``echo``; each execution is counted."""
        self._executed[said.text] += 1
        return said

    async def executions(self, texts: list[str]) -> list[int]:
        return [self._executed[text] for text in texts]

    async def fill_in(self, given: Defaults) -> Defaults:
        return Defaults(given.number)

    async def wait(self, said: Said) -> Said:
        self._begun += 1
        await asyncio.Event().wait()
        return said

    async def drip(self, said: Said) -> AsyncGenerator[Said, None]:
        """One message, and then nothing."""
        self._begun += 1
        yield said
        await asyncio.Event().wait()

    async def pour(self, said: Said) -> AsyncGenerator[str, None]:
        """Over 1 GiB, if its reader takes it."""
        for text in poured():
            self._poured += 1
            yield text

    async def take(self, parts: AsyncIterator[str]) -> int:
        """Read nothing before ``release``, then all: how many they were."""
        await self._released.wait()
        return len([len(part) async for part in parts])

    async def release(self) -> None:
        self._released.set()

    async def chat(self, said: AsyncIterator[Said]) -> AsyncGenerator[Said, None]:
        async for one in said:
            yield one

    async def state(self) -> State:
        gc.collect()
        return State(
            tasks=len(asyncio.all_tasks()),
            blocks=sys.getallocatedblocks(),
            begun=self._begun,
            poured=self._poured,
            blocked=self._blocked,
        )

    @asynccontextmanager
    async def _watched(self, _: micro.Service) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _watch(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(_TICK)
            self._blocked = max(self._blocked, time.thread_time() - before - _TICK)


def main(port: str, head_timeout: str = "", body_timeout: str = "") -> None:
    limits = Limits()
    if head_timeout:
        limits = Limits(head_timeout=float(head_timeout), body_timeout=float(body_timeout))
    work = Work()
    service = micro.Service(
        "faults",
        registry="memory",
        address=f"127.0.0.1:{port}",
        limits=limits,
        lifespan=work._watched,
    )
    service.handle(work)
    service.run([])


if __name__ == "__main__":
    main(*sys.argv[1:])
