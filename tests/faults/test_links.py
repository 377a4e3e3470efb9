"""A fleet works on, and is right again within 5 s, whatever becomes of its links to etcd."""

from __future__ import annotations

from random import Random

import pytest
from tests.faults.faults import OF_LINK, Fault, Where
from tests.faults.fleet import Fleet

WHOSE: tuple[tuple[Where, ...], ...] = (("nodes",), ("callers",), ("nodes", "callers"))
#: Seconds. Nodes that are cut off for longer than their time to live are rightly forgotten.
LONGEST = 2.0


@pytest.mark.asyncio
@pytest.mark.timeout(180)
async def test_links_are_bad(fleet: Fleet, chance: Random, full: bool) -> None:
    async with fleet:
        for kind in OF_LINK:
            for whose in WHOSE if full else chance.sample(WHOSE, 1):
                seconds = chance.uniform(LONGEST / 2, LONGEST)
                await fleet.through(*(Fault(kind, seconds, where) for where in whose))


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["refuse", "blackhole"])
async def test_callers_are_cut_off_for_long(fleet: Fleet, kind: str) -> None:
    async with fleet:
        await fleet.through(Fault(kind, 8, "callers"))
