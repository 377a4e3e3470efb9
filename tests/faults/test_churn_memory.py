"""200 nodes come and go while an imagined server fails: watches say what reads say, in 2 s."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from tests.faults.churn import Churn, Plan
from tests.faults.conftest import FIGURES, SEED
from tests.faults.faults import Fault
from tests.faults.imagining import least, live_through, planned
from tests.faults.observers import Journal

from micro import follow, registration
from micro.follow import View
from micro.registry import Change, Snapshot

#: So many tests share the seeds.
PARTS = 4


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_churn_in_simulated_time(
    request: pytest.FixtureRequest, memory_seeds: int, part: int
) -> None:
    first = request.config.stash[SEED]
    outages, changes, slowest = 0, 0, 0.0
    for seed in range(first + part, first + memory_seeds, PARTS):
        plan = planned(seed)
        churn = lived_through(plan)
        outages += len(plan.outages)
        changes += churn.changes
        slowest = max(slowest, churn.slowest)
    figures = (
        f"memory: {outages} outages, {changes} changes, no difference for more than {slowest:.2f} s"
    )
    request.node.user_properties.append((FIGURES, figures))


def lived_through(plan: Plan) -> Churn:
    """Run it; a failure is that of the least that fails of it, and tells what happened then."""
    with suppress(AssertionError):
        return live_through(plan, Journal(""))
    smallest, failure, journal = least(plan)
    failure.add_note(
        f"repeat it by: --seed {plan.seed} -k simulated; the least of it is {smallest}"
    )
    failure.add_note(journal.text)
    raise failure


def test_outage_of_an_hour_in_simulated_time() -> None:
    outage = (Fault("kill", 3600.0),)
    plan = Plan(seed=1, nodes=8, rate=0.0, ttl=12.0, calm=0.5, outages=(outage,))

    live_through(plan, Journal(""))


def test_what_a_seed_does_is_the_same_each_time() -> None:
    journals = [Journal("") for _ in range(2)]

    for journal in journals:
        live_through(planned(3), journal)

    # Who watches the same is told in any order.
    assert sorted(journals[0].times) == sorted(journals[1].times)


# -- the checks find what they are for ------------------------------------------------------------


def keeps_its_mark(patch: pytest.MonkeyPatch) -> None:
    class Other(Exception): ...

    patch.setattr(follow, "Gap", Other)


def takes_gaps_for_news(patch: pytest.MonkeyPatch) -> None:
    take = View._take

    def planted(self: View, item: Snapshot | Change | None) -> None:
        take(self, None if self._ready and isinstance(item, Snapshot) else item)

    patch.setattr(View, "_take", planted)


def ignores_deletes(patch: pytest.MonkeyPatch) -> None:
    fold: Any = View._fold

    def planted(self: View, change: Change) -> Change | None:
        told: Change | None = None if change.kind == "delete" else fold(self, change)
        return told

    patch.setattr(View, "_fold", planted)


def tells_twice(patch: pytest.MonkeyPatch) -> None:
    def planted(first: Change | None, then: Change) -> Change:
        return then

    patch.setattr(follow, "_merge", planted)


def never_stale(patch: pytest.MonkeyPatch) -> None:
    failed = View._failed

    def planted(self: View, error: Exception) -> None:
        failed(self, error)
        self._live = True

    patch.setattr(View, "_failed", planted)


def no_doubt(patch: pytest.MonkeyPatch) -> None:
    def planted(self: View, changes: list[Change]) -> None:
        self._apply(changes)

    patch.setattr(View, "_consider", planted)


def waits_for_long(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(follow, "_LAST_DELAY", 8.0)
    patch.setattr(follow, "_DOUBLED", 8)


def retries_no_sooner(patch: pytest.MonkeyPatch) -> None:
    def planted(first: float, second: float) -> float:
        return 10 * second / 3

    patch.setattr(registration, "min", planted, raising=False)


def gives_up(patch: pytest.MonkeyPatch) -> None:
    class Other(BaseException): ...

    patch.setattr(registration, "Exception", Other, raising=False)


@pytest.mark.full
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("plant", "found"),
    [
        pytest.param(keeps_its_mark, "is stale", id="keeps its mark after a gap"),
        pytest.param(takes_gaps_for_news, "the registry has", id="misses what is in a gap"),
        pytest.param(ignores_deletes, "the registry has", id="ignores deletes"),
        pytest.param(tells_twice, "told (create|delete) of", id="tells what undoes itself"),
        pytest.param(never_stale, "nobody to hear from", id="is never stale"),
        pytest.param(no_doubt, "is empty", id="believes an empty server"),
        pytest.param(waits_for_long, "is stale", id="comes back late"),
        pytest.param(retries_no_sooner, "is registered as None", id="retries no sooner"),
        pytest.param(gives_up, "is registered as None|ended badly", id="gives up after an error"),
    ],
)
def test_finds_one_that(
    plant: Callable[[pytest.MonkeyPatch], None], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    with pytest.raises(AssertionError, match=found):
        for seed in range(50):
            live_through(planned(seed), Journal(""))


@pytest.mark.full
@pytest.mark.timeout(120)
def test_tells_the_least_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ignores_deletes(monkeypatch)
    plan = planned(1)

    smallest, _, journal = least(plan)

    assert smallest.nodes < plan.nodes
    assert sum(map(len, smallest.outages)) <= 1
    assert "the least that fails is seed 1: " in journal.text
