"""What the calls of an endpoint were: how many, how many failed, how long they took."""

from __future__ import annotations

#: A bucket for each doubling of a microsecond: no call outlives the last one.
_BUCKETS = 64


class Stats:
    """Counters of calls; adding to them costs no allocation and no lock.

    ``buckets[n]`` counts the calls that took less than ``2 ** n`` microseconds and no less than
    half of that.
    """

    __slots__ = ("buckets", "calls", "errors", "running")

    def __init__(self) -> None:
        self.calls: int = 0
        self.errors: int = 0
        self.running: int = 0
        self.buckets: list[int] = [0] * _BUCKETS

    def add(self, seconds: float) -> None:
        """Count a call that has ended."""
        self.calls += 1
        self.buckets[int(seconds * 1_000_000).bit_length()] += 1

    def percentile(self, share: float) -> float:
        """The seconds that ``share`` (0 to 1) of the calls took at most; 0 without a call."""
        left = share * self.calls
        for power, count in enumerate(self.buckets):
            left -= count
            if count and left <= 0:
                return float(2**power) / 1_000_000
        return 0.0
