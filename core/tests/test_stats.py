"""Counters of calls and of their times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from micro.stats import Stats


def stats_of(*seconds: float) -> Stats:
    stats = Stats()
    for one in seconds:
        stats.add(one)
    return stats


def test_new_ones_count_nothing() -> None:
    stats = Stats()
    assert (stats.calls, stats.errors, stats.running) == (0, 0, 0)
    assert not any(stats.buckets)
    assert stats.percentile(0.5) == 0.0


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [
        (0.0, 0),
        (0.9e-6, 0),
        (1e-6, 1),
        (2e-6, 2),
        (3.9e-6, 2),
        (4e-6, 3),
        (0.001, 10),
        (1.0, 20),
        (13 * 86400.0, 41),
        (1e9, 50),
    ],
)
def test_call_is_in_the_bucket_of_its_time(seconds: float, bucket: int) -> None:
    stats = stats_of(seconds)
    assert stats.calls == 1
    assert [number for number, count in enumerate(stats.buckets) if count] == [bucket]


@given(st.floats(0, 1e12))
def test_time_of_any_length_is_counted(seconds: float) -> None:
    stats = stats_of(seconds)
    (bucket,) = [number for number, count in enumerate(stats.buckets) if count]
    assert seconds <= 2**bucket / 1_000_000


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 1))
def test_percentile_is_the_upper_end_of_its_bucket(seconds: list[float], share: float) -> None:
    """So at most twice the time that it stands for, and never less."""
    told = stats_of(*seconds).percentile(share)
    below = sum(one <= told for one in seconds)
    assert below >= share * len(seconds)
    assert told <= 2 * max(*seconds, 1e-6)


def test_percentiles_of_a_known_mix() -> None:
    stats = stats_of(*[0.000_9] * 90, *[0.009] * 9, 0.9)
    assert stats.percentile(0.5) == 1024 / 1_000_000
    assert stats.percentile(0.9) == 1024 / 1_000_000
    assert stats.percentile(0.99) == 16384 / 1_000_000
    assert stats.percentile(1.0) == 1048576 / 1_000_000
