"""A fleet works on, and is right again within 5 s, however its registry returns."""

from __future__ import annotations

from random import Random

import pytest
from tests.faults.faults import Fault
from tests.faults.fleet import Fleet


@pytest.mark.asyncio
async def test_etcd_returns_empty_before_the_nodes_can_reach_it(fleet: Fleet) -> None:
    async with fleet:
        await fleet.through(Fault("lose data", 0.1), Fault("refuse", 2, "nodes"))


@pytest.mark.asyncio
async def test_etcd_returns_empty_and_is_filled_before_the_callers_see_it(fleet: Fleet) -> None:
    async with fleet:  # to them it is then as old, and holds as much, as the one they knew
        await fleet.through(Fault("lose data", 0.1), Fault("refuse", 3, "callers"))


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["lose data", "go back"])
async def test_etcd_returns_with_less_than_it_had(fleet: Fleet, chance: Random, kind: str) -> None:
    async with fleet:
        for _ in range(3):
            await fleet.through(Fault(kind, chance.uniform(0.1, 3)))
