"""The load of a client: callers that each send one call after another."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

import msgspec
from bench.processes import cpu_seconds
from bench.rounds import percentile

#: What a peer's client sends and must get, in every call.
NAME = "Alice"
GREETING = "Hello Alice"


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is told, as JSON in its only argument."""

    port: int
    server_pid: int
    callers: int
    warm_up: float
    seconds: float


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What a client measured: latencies and CPU time in microseconds."""

    calls_per_s: float
    p50_us: float
    p99_us: float
    client_cpu_us: float
    server_cpu_us: float


def job() -> Job:
    return msgspec.json.decode(sys.argv[-1], type=Job)


async def load(job: Job, call: Callable[[], Awaitable[str]]) -> None:
    """Measure ``call``, which returns the greeting, and print the Point."""
    await _run(call, job.callers, job.warm_up)
    server, client, start = cpu_seconds(job.server_pid), time.process_time(), time.perf_counter()
    latencies = await _run(call, job.callers, job.seconds)
    took = time.perf_counter() - start
    client, server = time.process_time() - client, cpu_seconds(job.server_pid) - server
    calls = len(latencies)
    latencies.sort()
    point = Point(
        calls_per_s=calls / took,
        p50_us=percentile(latencies, 0.5) * 1e6,
        p99_us=percentile(latencies, 0.99) * 1e6,
        client_cpu_us=client / calls * 1e6,
        server_cpu_us=server / calls * 1e6,
    )
    print(msgspec.json.encode(point).decode())


async def _run(call: Callable[[], Awaitable[str]], callers: int, seconds: float) -> list[float]:
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def caller() -> None:
        now = time.perf_counter()
        while now < end:
            greeting = await call()
            if greeting != GREETING:
                raise AssertionError(f"the reply is {greeting!r}")
            before, now = now, time.perf_counter()
            latencies.append(now - before)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return latencies
