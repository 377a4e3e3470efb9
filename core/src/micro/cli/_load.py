"""A load on a service: its callers, what became of their calls, and how long those took."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate

from micro.errors import MicroError

#: Nanoseconds.
SECOND = 1_000_000_000
#: A bucket keeps so many bits of a value after its first.
_BITS = 7
#: What is above, nearly five hours, shares a bucket.
_MOST = (1 << 44) - 1
#: Ends of the rows of a histogram, in each power of ten: the most that fit are taken.
#: Source: ISO 3, preferred numbers.
_SERIES = ((1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8), (1, 1.6, 2.5, 4, 6.3), (1, 2, 5), (1,))
_ROWS = 16
#: Seconds that a caller waits after a call that did not even leave this process.
_PAUSE = 0.01
#: A timer of an event loop is up to a millisecond late.
_TIMER = 1_200_000

_clock = time.monotonic_ns


class Histogram:
    """How often which time was measured, in a fixed number of buckets.

    Times are in nanoseconds when they are added and in seconds when they are told: never less than
    they were, and at most 1/128 more.

    Source: G. Tene, HdrHistogram.
    """

    __slots__ = ("_buckets", "count", "largest", "smallest", "total")

    def __init__(self) -> None:
        self.count: int = 0
        self.total: int = 0
        self.smallest: int = 0
        self.largest: int = 0
        self._buckets: list[int] = [0] * (_bucket(_MOST) + 1)

    def add(self, nanoseconds: int) -> None:
        self.largest = max(self.largest, nanoseconds)
        if nanoseconds < self.smallest or not self.count:
            self.smallest = nanoseconds
        self.count += 1
        self.total += nanoseconds
        self._buckets[_bucket(min(nanoseconds, _MOST))] += 1

    def percentiles(self, *shares: float) -> list[float]:
        """For each share (0 to 1) the seconds that so many of the times did not pass.

        There has to be at least one.
        """
        counts = list(accumulate(self._buckets))
        ranks = [max(math.ceil(round(share * self.count, 6)), 1) for share in shares]
        tops = [_top(bisect_left(counts, rank)) for rank in ranks]
        return [min(top, self.largest) / SECOND for top in tops]

    def rows(self) -> list[tuple[float, int]]:
        """Seconds, and how many times are up to that and above those of the row before."""
        counts = list(accumulate(self._buckets))
        found = (self._rows(counts, series) for series in _SERIES)
        return next(rows for rows in found if len(rows) <= _ROWS)

    def _rows(self, counts: Sequence[int], series: Sequence[float]) -> list[tuple[float, int]]:
        rows: list[tuple[float, int]] = []
        below = 0
        limits = (round(one * 10**power) for power in range(3, 15) for one in series)
        for limit in limits:
            up_to = counts[min(_bucket(limit + 1), len(counts)) - 1]
            if up_to:
                rows.append((limit / SECOND, up_to - below))
            below = up_to
            if up_to == self.count:
                break
        return rows


def _bucket(value: int) -> int:
    """The number of the bucket of ``value``; those below 256 have one each."""
    shift = max(value.bit_length() - _BITS - 1, 0)
    return (shift << _BITS) + (value >> shift)


def _top(bucket: int) -> int:
    """The largest value of a bucket."""
    shift = max((bucket >> _BITS) - 1, 0)
    return ((bucket - (shift << _BITS) + 1) << shift) - 1


class Failure:
    """Calls that failed alike: ``error`` is that of the first, ``longest`` in nanoseconds."""

    __slots__ = ("calls", "error", "longest")

    def __init__(self, error: MicroError) -> None:
        self.error: MicroError = error
        self.calls: int = 0
        self.longest: int = 0


class Tally:
    """What became of calls; ``latencies`` are those of the calls that succeeded."""

    def __init__(self) -> None:
        self.begun: int = 0
        self.latencies: Histogram = Histogram()
        self.failures: dict[str, Failure] = {}

    @property
    def succeeded(self) -> int:
        return self.latencies.count

    @property
    def failed(self) -> int:
        return sum(failure.calls for failure in self.failures.values())

    @property
    def unfinished(self) -> int:
        return self.begun - self.succeeded - self.failed

    def fail(self, error: MicroError, nanoseconds: int) -> None:
        failure = self.failures.setdefault(type(error).__name__, Failure(error))
        failure.calls += 1
        failure.longest = max(failure.longest, nanoseconds)


class Load:
    """Callers that make calls for ``seconds``, after a warm-up that is counted apart.

    Without ``rate`` each makes one call after another. With it, that many calls are due each
    second, whether or not earlier ones have ended; whoever is free makes the next, and its time is
    counted from when it was due, not from when somebody was free to make it (G. Tene, "How NOT to
    Measure Latency": coordinated omission). No more calls than ``callers`` ever run at once: what
    was due and had not begun when the time was over is ``missed``.
    """

    def __init__(
        self,
        call: Callable[[], Awaitable[object]],
        *,
        callers: int,
        seconds: float,
        warm_up: float = 0.0,
        rate: float | None = None,
    ) -> None:
        self.callers: int = callers
        self.rate: float | None = rate
        self.warm_up: Tally = Tally()
        self.measured: Tally = Tally()
        #: Calls that succeeded between the warm-up and the end, whenever they had begun.
        self.done: int = 0
        self.interrupted: bool = False
        #: The share of a core that this process took until the end; to wait for a rate costs some.
        self.cpu: float = 0.0
        self._call = call
        self._seconds = seconds
        self._warm_up = warm_up
        self._gap = SECOND / (rate or 1.0)
        self._taken = 0
        self._tasks: list[asyncio.Task[None]] = []
        #: Moments of the clock.
        self._origin: int = 0
        self._start: int = 1 << 63
        self._end: int = 1 << 63

    async def once(self) -> MicroError | None:
        """Make one call, which belongs to the warm-up; the error that it got."""
        await self._make(_clock())
        return next((failure.error for failure in self.warm_up.failures.values()), None)

    async def run(self) -> None:
        """Make the calls, until the last has ended; each is bounded by its own deadline."""
        spent = time.process_time_ns()
        self._origin = _clock()
        self._start = self._origin + round(self._warm_up * SECOND)
        self._end = self._start + round(self._seconds * SECOND)
        caller = self._one_after_another if self.rate is None else self._as_due
        async with asyncio.TaskGroup() as group:
            self._tasks = [group.create_task(caller()) for _ in range(self.callers)]
            self._tasks.append(group.create_task(self._last()))
            await asyncio.wait(self._tasks, timeout=(self._end - _clock()) / SECOND)
            took = max(_clock() - self._origin, 1)
            self.cpu = (time.process_time_ns() - spent) / took

    def stop(self) -> None:
        """End now: calls that run are cancelled, and remain unfinished."""
        self.interrupted = True
        self._end = min(self._end, _clock())
        for task in self._tasks:
            task.cancel()

    @property
    def seconds(self) -> float:
        """How long it has measured until now, or in all."""
        return max(min(_clock(), self._end) - self._start, 0) / SECOND

    @property
    def missed(self) -> int:
        if self.rate is None:
            return 0
        due = self._due_before(self._end) - self._due_before(self._start)
        return max(due - self.measured.begun, 0)

    async def _last(self) -> None:
        """See the time out, although the last call may be due before."""
        await asyncio.sleep((self._end - _clock()) / SECOND)
        await _until(self._end)

    async def _one_after_another(self) -> None:
        while (now := _clock()) < self._end:
            await self._make(now)

    async def _as_due(self) -> None:
        while (due := self._due(self._taken)) < self._end:
            self._taken += 1
            now = _clock()
            if now < due:
                await _until(due)
            elif now >= self._end:
                return
            elif due < self._start <= now:  # what the warm-up leaves undone is no load of the rest
                continue
            await self._make(due)

    async def _make(self, since: int) -> None:
        """One call, whose time counts from ``since``."""
        tally = self.measured if since >= self._start else self.warm_up
        tally.begun += 1
        try:
            await self._call()
        except MicroError as exc:
            tally.fail(exc, _clock() - since)
            # What fails at once gives nobody else a turn; of callers alone it would be a storm.
            unsent = exc.sent is False and not exc.remote
            await asyncio.sleep(_PAUSE if unsent and self.rate is None else 0)
        else:
            now = _clock()
            tally.latencies.add(now - since)
            if self._start <= now < self._end:
                self.done += 1

    def _due(self, number: int) -> int:
        return self._origin + int(number * self._gap)

    def _due_before(self, moment: int) -> int:
        """How many calls are due before ``moment``."""
        number = max(int((moment - self._origin) / self._gap) - 1, 0)
        while self._due(number) < moment:
            number += 1
        return number


async def _until(moment: int) -> None:
    """Wait until then, to some microseconds, which takes a millisecond of the processor."""
    ahead = moment - _clock() - _TIMER
    if ahead > 0:
        await asyncio.sleep(ahead / SECOND)
    while _clock() < moment:  # noqa: ASYNC110 - it waits for a time, not for an event
        await asyncio.sleep(0)
