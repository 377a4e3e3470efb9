"""A fleet works on, and is right again within 5 s, whatever its etcd does not tell."""

from __future__ import annotations

from random import Random

import pytest
from tests.faults.backends import BACKENDS
from tests.faults.faults import Fault
from tests.faults.fleet import Fleet

TTL = BACKENDS["etcd"].ttl


@pytest.mark.asyncio
async def test_etcd_pauses(fleet: Fleet, chance: Random, full: bool) -> None:
    async with fleet:
        for _ in range(3 if full else 1):
            await fleet.through(Fault("pause", chance.uniform(0.1, TTL - 1.5)))


@pytest.mark.asyncio
async def test_etcd_ends_all_leases_before_the_nodes_can_reach_it(fleet: Fleet) -> None:
    async with fleet:
        await fleet.through(Fault("pause", TTL + 2), Fault("refuse", TTL + 3, "nodes"))


@pytest.mark.full
@pytest.mark.asyncio
async def test_etcd_pauses_until_all_leases_have_ended(fleet: Fleet, chance: Random) -> None:
    async with fleet:
        for _ in range(3):
            await fleet.through(Fault("pause", TTL + chance.uniform(1, 2)))


@pytest.mark.asyncio
async def test_etcd_forgets_what_a_watch_that_is_cut_off_has_missed(fleet: Fleet) -> None:
    async with fleet:
        await fleet.through(Fault("compact", 1.5), Fault("refuse", 2, "callers"))

        assert "compacted" in fleet.journal.text  # else there was no gap


@pytest.mark.full
@pytest.mark.asyncio
async def test_etcd_forgets_its_history_while_it_is_watched(fleet: Fleet) -> None:
    async with fleet:
        await fleet.through(Fault("compact", 0.5))
