"""What a service tells of itself: the handler that every server has, as Go Micro's had."""

from __future__ import annotations

import gc
import mmap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec

from micro.stats import Stats

_STATM = Path("/proc/self/statm")


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of ``Debug.Health``."""

    status: str


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of ``Debug.Stats``: the fields of Go Micro's, in its units, and no other.

    ``timestamp`` and ``started`` are seconds since 1970, ``uptime`` seconds, ``memory`` resident
    bytes (0 where the system does not tell), ``gc`` nanoseconds of garbage collection.

    Source: debug/proto/debug.proto of go-micro.dev/v4; its client refuses unknown fields.
    """

    timestamp: int
    started: int
    uptime: int
    memory: int
    threads: int
    gc: int
    requests: int
    errors: int


class EndpointStats(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of one endpoint that have ended, that failed and that run; percentiles in seconds."""

    name: str
    calls: int
    errors: int
    running: int
    p50: float
    p99: float


class EndpointsStats(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of ``Debug.Endpoints``, by name."""

    endpoints: list[EndpointStats]


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of ``Debug.Counters``: what the process decided about calls, since it started."""

    counters: dict[str, int]


class Debug:
    """Answers ``Debug.Health`` and ``Debug.Stats`` as Go Micro does, and two endpoints of ours.

    It tells numbers only: nothing of settings, of messages or of callers. ``stats`` gives those of
    each endpoint, by name, ``counters`` the decisions. Garbage collection counts while it is
    entered.
    """

    def __init__(
        self,
        stats: Callable[[], Mapping[str, Stats]],
        counters: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._stats = stats
        self._counters = counters
        self._started = time.time()
        self._since = time.monotonic()
        self._collecting_since = 0
        self._collected = 0

    def __enter__(self) -> Self:
        gc.callbacks.append(self._on_collection)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._on_collection)

    async def health(self, service: str = "") -> Health:
        """Say that the service answers."""
        return Health(status="ok")

    async def stats(self, service: str = "") -> Totals:
        """Tell what the process uses, and how many calls there were."""
        told = self._stats().values()
        return Totals(
            timestamp=int(time.time()),
            started=int(self._started),
            uptime=int(time.monotonic() - self._since),
            memory=_memory(),
            threads=threading.active_count(),
            gc=self._collected,
            requests=sum(one.calls for one in told),
            errors=sum(one.errors for one in told),
        )

    async def endpoints(self, service: str = "") -> EndpointsStats:
        """Tell how many calls each endpoint had, and how long they took."""
        return EndpointsStats(
            endpoints=[
                EndpointStats(
                    name=name,
                    calls=one.calls,
                    errors=one.errors,
                    running=one.running,
                    p50=one.percentile(0.5),
                    p99=one.percentile(0.99),
                )
                for name, one in sorted(self._stats().items())
            ]
        )

    async def counters(self, service: str = "") -> Counters:
        """Tell how often calls were repeated, held back or shed, and nodes ejected."""
        return Counters(counters=dict(self._counters()))

    def _on_collection(self, phase: str, _: Mapping[str, int]) -> None:
        now = time.perf_counter_ns()
        if phase == "start":
            self._collecting_since = now
        elif self._collecting_since:  # else it began before we listened
            self._collected += now - self._collecting_since


def _memory() -> int:
    """Bytes of this process that are in memory. Source: proc(5), the second number of statm."""
    try:
        return int(_STATM.read_bytes().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0
