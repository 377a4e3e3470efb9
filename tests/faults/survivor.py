"""A node of a service that has to survive, as a program: ``survivor.py LEDGER [FLAG ...]``.

Its ledger is a file that outlives it, however it ends. Each execution writes a line when it begins
and one when it ends: ``+``, then ``-`` or, when it is cancelled, ``!``, and the text of its call.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import micro
from micro.errors import Unavailable

SERVICE = "survivor"


@dataclass
class Job:
    """``text`` is that of one call alone; it takes so many seconds."""

    text: str
    seconds: float = 0.0
    messages: int = 0


class Work:
    def __init__(self, ledger: int) -> None:
        self._ledger = ledger

    async def change(self, job: Job) -> str:
        """Not to be executed twice."""
        return await self._execute(job)

    async def read(self, job: Job) -> str:
        """As ``change``; who calls it says that it may be."""
        return await self._execute(job)

    async def tell(self, job: Job) -> AsyncIterator[int]:
        """So many messages in so many seconds."""
        self._write("+", job)
        for number in range(job.messages):
            yield number
            await asyncio.sleep(job.seconds / job.messages)
        self._write("-", job)

    async def burn(self, job: Job) -> str:
        """Compute for so many seconds of the processor."""
        end = time.thread_time() + job.seconds
        while time.thread_time() < end:
            pass
        return job.text

    async def fail(self, job: Job) -> str:
        self._write("+", job)
        raise Unavailable("out of order")

    async def _execute(self, job: Job) -> str:
        self._write("+", job)
        try:
            await asyncio.sleep(job.seconds)
        except asyncio.CancelledError:
            self._write("!", job)
            raise
        self._write("-", job)
        return job.text

    def _write(self, mark: str, job: Job) -> None:
        os.write(self._ledger, f"{mark}{job.text}\n".encode())


def main(ledger: str, *flags: str) -> None:
    """One write a line: what is written when the process is killed, stays."""
    file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    service = micro.Service(SERVICE)
    service.handle(Work(file))
    service.run(flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
