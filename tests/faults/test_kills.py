"""A fleet works on while its registry is dead, and is right again within 5 s of its return."""

from __future__ import annotations

from random import Random

import pytest
from tests.faults.backends import Backend, each
from tests.faults.faults import Fault
from tests.faults.fleet import Fleet


@each
@pytest.mark.asyncio
@pytest.mark.timeout(1800)
async def test_registry_is_killed_again_and_again(
    backend: Backend, fleet: Fleet, chance: Random, kills: int
) -> None:
    async with fleet:
        for _ in range(kills):
            await fleet.through(Fault("kill", chance.uniform(0.1, 3)))


@each
@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.timeout(180)
async def test_registry_is_down_for_a_minute(backend: Backend, fleet: Fleet) -> None:
    async with fleet:
        await fleet.through(Fault("kill", 60))
