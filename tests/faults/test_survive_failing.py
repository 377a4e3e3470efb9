"""A service that fails all calls gets little more of them for it."""

from __future__ import annotations

import asyncio

import pytest
from tests.faults.survivors import Survivors

#: How many times as often as they are made, calls may be executed; and seconds for which that holds
#: to the last call: after ten, those that are repeated have their ten a second besides.
MOST = 1.2
LONGEST = 8.0
#: Calls a second: more than fifty, of which a fifth are ten.
RATE = 200


@pytest.mark.asyncio
@pytest.mark.timeout(120)
async def test_repeated_calls_add_a_fifth_to_the_traffic_at_most(
    survivors: Survivors, full: bool
) -> None:
    share = await all_fail(survivors, LONGEST if full else 2.0, idempotent=True)
    assert 1.05 < share <= MOST, f"executed {share:.3f} times as often as they were made"


@pytest.mark.asyncio
async def test_calls_that_must_not_be_repeated_add_nothing(survivors: Survivors) -> None:
    share = await all_fail(survivors, 1.0, idempotent=False)
    assert share == 1.0
    survivors.check_executions()


async def all_fail(survivors: Survivors, seconds: float, *, idempotent: bool) -> float:
    """How many times a call was executed, as the nodes count."""
    async with survivors.running():
        async with survivors.traffic(RATE, endpoint="Fail", idempotent=lambda _: idempotent):
            await asyncio.sleep(seconds)
        assert len(survivors.failed()) == len(survivors.fates)
        share = survivors.executions().total() / len(survivors.fates)
        survivors.told = f"{share:.3f} executions a call"
    survivors.check_times()
    return share
