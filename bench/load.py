"""What a client does to a server, and what it measures.

It imports little: servers import it too, and how long they take to start is measured.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

R = TypeVar("R")
#: A figure of each measure in bench/rows.py that this load has.
Point = dict[str, float]

#: What is sent, and must come back, in a small call.
NAME = "Alice"
GREETING = "Hello Alice"
#: The lines of an order, which is sent back whole: 10 kB of JSON.
LINES = [
    (
        100_000 + number,
        f"SKU-{number:07}",
        number + 0.25,
        ["blue", "large", "gift", "stock of the last year"],
    )
    for number in range(96)
]
#: A body of 16 MiB, which is sent back whole.
BLOB_SIZE = 16 << 20

#: Seconds: of a call to a server that has stopped, and how many calls each caller makes.
DEADLINE = 0.5
LATE_CALLS = 10
#: Seconds until a server with nothing to do has settled.
_SETTLED = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a client is told, as JSON; ``options`` are those of its peer."""

    kind: str
    port: int
    server_pid: int
    callers: int
    warm_up: float
    seconds: float
    options: Sequence[str] = ()


def is_greeting(reply: Any) -> bool:
    return bool(reply.message == GREETING)


def is_order(reply: Any) -> bool:
    """Whether an order has come back."""
    item, sku, _, tags = LINES[-1]
    last = reply.lines[-1]
    return (
        len(reply.lines) == len(LINES)
        and (last.item, last.sku) == (item, sku)
        and last.tags == tags
    )


async def load(
    job: Job, calls: Sequence[Callable[[], Awaitable[R]]], right: Callable[[R], bool]
) -> Point:
    """Callers that each send one call after another, the first by the first of ``calls``."""
    await _run(calls, right, job.callers, job.warm_up)
    spent = _Spent(job)
    latencies = await _run(calls, right, job.callers, job.seconds)
    point = spent.over(len(latencies))
    latencies.sort()
    return point | {"p50_us": _at(latencies, 0.5) * 1e6, "p99_us": _at(latencies, 0.99) * 1e6}


async def _run(
    calls: Sequence[Callable[[], Awaitable[R]]],
    right: Callable[[R], bool],
    callers: int,
    seconds: float,
) -> list[float]:
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def caller(call: Callable[[], Awaitable[R]]) -> None:
        now = time.perf_counter()
        while now < end:
            reply = await call()
            if not right(reply):
                raise AssertionError(f"the reply is {reply!r:.200}")
            before, now = now, time.perf_counter()
            latencies.append(now - before)

    async with asyncio.TaskGroup() as group:
        for number in range(callers):
            group.create_task(caller(calls[number % len(calls)]))
    return latencies


async def stream(
    job: Job, replies: Callable[[int], AsyncIterable[R]], right: Callable[[R], bool]
) -> Point:
    """One stream of as many messages as last for the time of the job; ``replies(n)`` gives n."""
    count, took = 16, 0.0
    while took < job.warm_up:
        count *= 4
        took = await _read(replies, right, count)
    count = int(count / took * job.seconds) + 1
    spent = _Spent(job)
    await _read(replies, right, count)
    return spent.over(count)


async def _read(
    replies: Callable[[int], AsyncIterable[R]], right: Callable[[R], bool], count: int
) -> float:
    start, got = time.perf_counter(), 0
    async for reply in replies(count):
        if not right(reply):
            raise AssertionError(f"the reply is {reply!r:.200}")
        got += 1
    if got != count:
        raise AssertionError(f"{got} messages instead of {count}")
    return time.perf_counter() - start


async def late(
    job: Job, call: Callable[[], Awaitable[Any]], is_late: Callable[[Exception], bool]
) -> Point:
    """How many milliseconds after DEADLINE calls end while the server is stopped by a signal.

    The callers begin one after another, so that their deadlines are spread evenly: what is asked is
    how late a deadline is noticed, not how long a thousand errors take.
    """
    await call()
    ends: list[float] = []

    async def caller(number: int) -> None:
        await asyncio.sleep(number / job.callers * DEADLINE)
        for _ in range(LATE_CALLS):
            start = time.perf_counter()
            try:
                reply = await call()
            except Exception as exc:
                if not is_late(exc):
                    raise
                ends.append(time.perf_counter() - start - DEADLINE)
            else:
                raise AssertionError(f"a stopped server replied {reply!r}")

    os.kill(job.server_pid, signal.SIGSTOP)
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(job.callers):
                group.create_task(caller(number))
    finally:
        os.kill(job.server_pid, signal.SIGCONT)
    ends.sort()
    shares = {"first_ms": 0.0, "p50_ms": 0.5, "p999_ms": 0.999, "last_ms": 1.0}
    return {name: _at(ends, share) * 1e3 for name, share in shares.items()}


async def idle(job: Job, connect: Callable[[], Awaitable[Any]]) -> Point:
    """KiB of a server's memory for a connection that made one call; ``connect`` opens and calls.

    The first one pays for what all share.
    """
    await connect()
    await asyncio.sleep(_SETTLED)
    before = _pss(job.server_pid)
    for _ in range(job.callers - 1):
        await connect()
    await asyncio.sleep(_SETTLED)
    return {"kib": (_pss(job.server_pid) - before) / (job.callers - 1)}


def cpu_seconds(pid: int) -> float:
    """The CPU time of all threads of a process, to the nanosecond, as the scheduler counts it."""
    # The clock of another process, as clock_getcpuclockid(3) makes it, which Python has not.
    return time.clock_gettime((~pid << 3) | 2)


class _Spent:
    """Time and CPU time from now on."""

    def __init__(self, job: Job) -> None:
        self._pid = job.server_pid
        self._from = self._now()

    def over(self, calls: int) -> Point:
        """The rate and the costs of so many calls."""
        took, client, server = (
            now - then for now, then in zip(self._now(), self._from, strict=True)
        )
        return {
            "calls_per_s": calls / took,
            "client_us": client / calls * 1e6,
            "server_us": server / calls * 1e6,
            "cpu_us": (client + server) / calls * 1e6,
        }

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), cpu_seconds(self._pid)


def _at(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of all values do not pass; ``ordered`` goes up."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _pss(pid: int) -> int:
    """Proportional set size of a process in KiB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:  # noqa: PTH123 - of /proc, read in one go
        (line,) = (line for line in file if line.startswith("Pss:"))
    return int(line.split()[1])
