"""A node with three times as much to do as it can does nearly as much as it can, and quickly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from tests.faults.calls import MIB, SLACK
from tests.faults.conftest import FIGURES
from tests.faults.pressure import Phase, Pressure

#: Shares of the node's capacity: what it has to do on a good day, and on a bad one.
USUAL, OVERLOAD = 0.7, 3.0
#: What has to hold in it: goodput, as a share of the capacity; the time of calls that are taken,
#: as a multiple of what it is on a good day; bytes of memory.
GOODPUT = 0.8
SLOWER = 2.0
GROWTH = 64 * MIB
#: Seconds: of the beginning of an overload, before it is known as one; until all is well after it.
ONSET = 1.0
RETURN = 5.0
#: Where others had the cores, it is measured again, so many times in all.
TIMES = 5


@dataclass(frozen=True)
class Times:
    """Seconds: to find the capacity, of a good day, of an overload, of what follows."""

    peak: float
    usual: float
    overload: float
    after: float


@dataclass(frozen=True)
class Day:
    peak: Phase
    usual: Phase
    overload: Phase
    after: Phase
    times: Times

    @property
    def last(self) -> float:
        """Seconds after the overload when all has to be well."""
        return min(RETURN, self.times.after - 1.0)

    @property
    def shared(self) -> bool:
        return any(phase.shared for phase in (self.peak, self.usual, self.overload, self.after))

    def check(self) -> None:
        capacity, quick = self.peak.goodput(), SLOWER * self.usual.p99()
        bad = self.overload
        assert bad.goodput(ONSET) >= GOODPUT * capacity, f"{bad}; capacity {capacity:.0f}/s"
        assert bad.p99(ONSET) <= quick, f"{bad}; on a good day {self.usual}"
        assert bad.grown <= GROWTH, str(bad)
        assert bad.asked > bad.seconds, f"its health was told {bad.asked} times"
        assert bad.slowest < ONSET + SLACK, f"{bad}"
        assert bad.ended().keys() <= {"answered", "refused"}, str(bad)
        assert self.after.ended(self.last).keys() == {"answered"}, f"after it: {self.after}"
        assert self.after.p99(self.last) <= quick, f"after it: {self.after}"

    def __str__(self) -> str:
        bad, usual, peak = self.overload, self.usual.p99(), self.peak.goodput()
        return (
            f"{bad.goodput(ONSET) / peak:.0%} of {peak:.0f} calls/s, "
            f"p99 {bad.p99(ONSET) * 1000:.1f} ms, {bad.p99(ONSET) / usual:.2f} times its usual, "
            f"{bad.ended()['refused']} refused, +{bad.grown / MIB:.1f} MiB, "
            f"health in {bad.slowest * 1000:.0f} ms; "
            f"then p99 {self.after.p99(self.last) * 1000:.1f} ms"
        )


@pytest.fixture
def times(full: bool, patient: bool) -> Times:
    if not full:
        return Times(0.8, 2.5, 2.5, 2.5)
    return Times(3.0, 10.0, 20.0 if patient else 60.0, RETURN + 2)


@pytest.mark.alone
@pytest.mark.asyncio
@pytest.mark.timeout(600)
@pytest.mark.parametrize("patient", [False, True], ids=["callers who insist", "clients of ours"])
async def test_three_times_as_much_as_a_node_can_do(
    request: pytest.FixtureRequest, tmp_path: Path, chance: Random, times: Times, patient: bool
) -> None:
    for left in reversed(range(TIMES)):
        pressure = Pressure(tmp_path, str(chance.random()))
        async with pressure.running():
            day = await measure(pressure, times, patient=patient)
        try:
            day.check()
        except AssertionError:
            if left and day.shared:
                continue
            raise
        request.node.user_properties.append((FIGURES, str(day)))
        return


async def measure(pressure: Pressure, times: Times, *, patient: bool) -> Day:
    peak = await pressure.phase(times.peak, callers=8)
    rate = peak.goodput()
    usual = await pressure.phase(times.usual, rate=USUAL * rate)
    bad = await pressure.phase(times.overload, rate=OVERLOAD * rate, patient=patient)
    after = await pressure.phase(times.after, rate=USUAL * rate)
    return Day(peak, usual, bad, after, times)
