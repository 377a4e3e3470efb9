"""Rounds in which competitors take turns, and what is told of many rounds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

T = TypeVar("T")


class Spread(msgspec.Struct, frozen=True):
    """A figure over all rounds. The median is what is compared; the others tell how it wandered."""

    median: float
    min: float
    max: float


class Effort(msgspec.Struct, frozen=True):
    """How long to measure: rounds of processes, rounds of load and the seconds of each."""

    process_rounds: int
    load_rounds: int
    load_seconds: float


def spread(values: Iterable[float]) -> Spread:
    found = sorted(values)
    return Spread(statistics.median(found), found[0], found[-1])


def in_turns(
    competitors: Mapping[str, Callable[[], T]], *, rounds: int, warm_up: int = 0
) -> dict[str, list[T]]:
    """What each competitor returned, round for round.

    All take part in every round, in an order drawn anew, so that what disturbs the machine for a
    while disturbs all of them. The rounds of the warm-up are thrown away.
    """
    found: dict[str, list[T]] = {name: [] for name in competitors}
    for turn in range(warm_up + rounds):
        for name in random.sample(list(competitors), len(competitors)):
            result = competitors[name]()
            if turn >= warm_up:
                found[name].append(result)
    return found


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that ``share`` of all values do not pass; ``ordered`` goes up."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
