"""A call whose caller cannot be heard any more ends at its deadline, on its node too."""

from __future__ import annotations

import asyncio

import pytest
from tests.faults.calls import SLACK, TRANSPORTS
from tests.faults.survivors import Survivors

from micro.errors import DeadlineExceeded
from micro.testing import FaultProxy, eventually

#: Seconds that callers wait, and that the calls would take.
TIMEOUT, TAKES = 0.5, 8.0


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_node_gives_up_a_call_at_the_deadline_of_its_caller(
    survivors: Survivors, transport: str
) -> None:
    async with survivors.running(1, transport=transport):
        (address,) = await survivors.addresses()
        async with FaultProxy(address) as link:
            call = survivors.call(seconds=TAKES, timeout=TIMEOUT, address=link.address)
            calling = asyncio.create_task(call)
            await eventually(lambda: survivors.running_now() == 1, every=0.002)
            link.blackhole("up")
            fate = await calling
            assert isinstance(fate.error, DeadlineExceeded), repr(fate)
            await eventually(lambda: survivors.marked("!", fate), within=SLACK)
            assert not survivors.marked("-", fate)
    survivors.check_times()
