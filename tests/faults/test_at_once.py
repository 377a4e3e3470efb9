"""A fleet works on, and is right again within 5 s, when several things happen at once."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from tests.faults.faults import OF_LINK, OF_SERVER, Fault
from tests.faults.fleet import Fleet

others = [pytest.param(number, marks=pytest.mark.full) for number in range(2, 6)]


@pytest.mark.asyncio
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [1, *others])
async def test_several_faults_at_once(
    fleet: Fleet, chance: Random, number: int, full: bool
) -> None:
    async with fleet:
        for _ in range(4 if full else 2):
            await fleet.through(*some(chance))


def some(chance: Random) -> Iterator[Fault]:
    """Two or three: of the server, of the links of nodes, of the links of callers."""
    possible = [
        Fault(chance.choice([*OF_SERVER]), chance.uniform(0.1, 3)),
        Fault(chance.choice([*OF_LINK]), chance.uniform(0.1, 2), "nodes"),
        Fault(chance.choice([*OF_LINK]), chance.uniform(0.1, 5), "callers"),
    ]
    yield from chance.sample(possible, chance.choice([2, 3]))
