"""Churn in simulated time: plans by chance, and the least of what fails."""

from __future__ import annotations

import random

from core.tests.simulated import simulate
from tests.faults.churn import Bounds, Churn, Plan
from tests.faults.faults import Fault
from tests.faults.imagined import Imagined
from tests.faults.observers import Journal

#: Seconds.
_LONGEST = 15.0
#: How many smaller plans are tried when one fails.
_TRIES = 60


def planned(seed: int, nodes: int = 200) -> Plan:
    """Two outages; some are so short that nobody notices, in some all times to live end."""
    chance = random.Random(f"plan {seed}")
    ttl = chance.choice([3.0, 6.0, 24.0])
    return Plan(
        seed,
        nodes,
        rate=chance.choice([0.0, 6.0, 60.0]) / ttl,
        ttl=ttl,
        calm=chance.uniform(0.1, 1.0),
        outages=tuple(_outage(chance, ttl) for _ in range(2)),
    )


def _outage(chance: random.Random, ttl: float) -> tuple[Fault, ...]:
    def seconds() -> float:
        return min(chance.choice([0.1, 0.5, 1.5]) * ttl * chance.uniform(0.2, 1), _LONGEST)

    possible = [
        Fault(chance.choice(["kill", "lose data", "go back", "pause", "compact"]), seconds()),
        Fault(chance.choice(["refuse", "blackhole", "cut"]), seconds(), "nodes"),
        Fault(chance.choice(["refuse", "blackhole", "cut"]), seconds(), "callers"),
    ]
    return tuple(chance.sample(possible, chance.choice([1, 1, 2, 3])))


def live_through(plan: Plan, journal: Journal) -> Churn:
    """Run it; the same happens each time.

    Raises:
        AssertionError: something does not hold.
    """

    async def main() -> Churn:
        world = Imagined(random.Random(f"world {plan.seed}"), plan.ttl)
        await world.start()
        churn = Churn(world, plan, Bounds(), journal)
        try:
            await churn.run()
        finally:
            await world.aclose()
        return churn

    return simulate(main, plan.seed)


def least(plan: Plan) -> tuple[Plan, AssertionError, Journal]:
    """Of the plans inside of this one, which fails, one that fails and has little in it."""
    found = _failure(plan)
    assert found is not None, f"it does not fail when it is repeated: {plan}"
    smaller = plan.smaller()
    for _ in range(_TRIES):
        if (less := next(smaller, None)) is None:
            break
        if (failed := _failure(less)) is not None:
            found, smaller = failed, less.smaller()
    return found


def _failure(plan: Plan) -> tuple[Plan, AssertionError, Journal] | None:
    journal = Journal(f"the least that fails is {plan}")
    try:
        live_through(plan, journal)
    except AssertionError as exc:
        return plan, exc, journal
    return None
