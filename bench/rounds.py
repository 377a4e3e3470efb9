"""Rounds in which competitors take turns, and what is told of many rounds."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping

import msgspec
from bench.load import Point

#: What a measurement fails with; the competitor alone has to answer for it.
_FAILURES = (AssertionError, OSError, RuntimeError, ValueError, subprocess.SubprocessError)


class Spread(msgspec.Struct, frozen=True):
    """A figure over all rounds. The median is what is compared; the others tell how it wandered."""

    median: float
    min: float
    max: float


def spread(values: Iterable[float]) -> Spread:
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


def in_turns(
    competitors: Mapping[str, Callable[[], Point]], *, rounds: int, warm_up: int = 0
) -> dict[str, list[Point]]:
    """What each competitor measured, round for round; of one that failed, nothing.

    All take part in every round, in an order drawn anew, so that what disturbs the machine for a
    while disturbs all of them. The rounds of the warm-up are thrown away.
    """
    left = dict(competitors)
    found: dict[str, list[Point]] = {name: [] for name in competitors}
    for turn in range(warm_up + rounds):
        for name in random.sample(list(left), len(left)):
            try:
                point = left[name]()
            except _FAILURES as exc:
                print(f"{name} takes part no longer: {exc}", file=sys.stderr)
                del left[name], found[name]
            else:
                if turn >= warm_up:
                    found[name].append(point)
    return found
