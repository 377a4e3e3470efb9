"""What the tests of nodes that have to survive find: planted bugs, each of them caught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.faults import survivors as engine
from tests.faults import test_calls_inputs as inputs
from tests.faults import test_survive_deadlines as deadlines
from tests.faults import test_survive_drain as drain
from tests.faults import test_survive_failing as failing
from tests.faults import test_survive_nodes as nodes
from tests.faults.calls import TRANSPORTS, Served, Stage
from tests.faults.observers import Journal
from tests.faults.pressure import Pressure
from tests.faults.survivors import Survivors
from tests.faults.test_survive_overload import Times, measure

from micro import _targets, retries
from micro._targets import Pool, Target
from micro.call import Call
from micro.errors import MicroError, Unavailable


@pytest.mark.asyncio
async def test_finds_a_retry_of_calls_that_must_not_be_executed_twice(
    survivors: Survivors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeatable(call: Call, error: MicroError) -> bool:
        return isinstance(error, Unavailable)

    monkeypatch.setattr(_targets, "repeatable", repeatable)
    with pytest.raises(AssertionError, match="executed twice"):
        await nodes.test_node_that_is_killed_fails_only_what_may_have_been_executed_on_it(
            survivors, full=False
        )


@pytest.mark.full
@pytest.mark.asyncio
async def test_finds_a_retry_on_the_same_node(
    survivors: Survivors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(self: Pool, tried: Any, call: Call) -> Any:
        return tried[-1]

    monkeypatch.setattr(Pool, "other", other)
    with pytest.raises(AssertionError, match="it could have been repeated"):
        await nodes.test_node_that_is_killed_fails_only_what_may_have_been_executed_on_it(
            survivors, full=False
        )


@pytest.mark.asyncio
async def test_finds_a_budget_that_is_ignored(
    survivors: Survivors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(self: retries.Budget, attempts: int) -> bool:
        return True

    monkeypatch.setattr(retries.Budget, "take", take)
    with pytest.raises(AssertionError, match="times as often as they were made"):
        await failing.test_repeated_calls_add_a_fifth_to_the_traffic_at_most(survivors, full=False)


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.parametrize("scenario", ["killed", "stopped"])
async def test_finds_a_dead_node_that_is_called_on(
    survivors: Survivors, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    def eject(self: Target, peer: object) -> None:
        pass

    monkeypatch.setattr(Target, "_eject", eject)
    with pytest.raises(AssertionError, match=r"it got calls for|not within"):
        if scenario == "killed":
            await nodes.test_node_that_is_killed_fails_only_what_may_have_been_executed_on_it(
                survivors, full=False
            )
        else:
            await nodes.test_node_that_is_stopped_is_left_and_found_again(survivors, full=False)


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.parametrize("bug", ["drain_first", "no_grace"])
async def test_finds_a_drain_that_fails_calls(survivors: Survivors, bug: str) -> None:
    survivors.bug = bug
    with pytest.raises(AssertionError, match="calls failed"):
        await drain.test_sigterm_cuts_neither_calls_nor_streams(
            survivors, full=False, transport="tcp"
        )


@pytest.mark.full
@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_finds_deadlines_that_a_node_does_not_hear(
    survivors: Survivors, transport: str
) -> None:
    survivors.bug = "no_deadline"
    with pytest.raises(AssertionError, match="not within"):
        await deadlines.test_node_gives_up_a_call_at_the_deadline_of_its_caller(
            survivors, transport
        )


class Unlimited(Served):
    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        python, *program = super().command(data, ports)
        return [python, Path(__file__).with_name("planted.py"), "no_limit", *program]


@pytest.mark.full
@pytest.mark.asyncio
async def test_finds_a_limit_that_is_looked_at_too_late(
    tmp_path: Path, journal: Journal, chance: Random
) -> None:
    with Unlimited(tmp_path) as served:
        others = inputs.Others(Stage(served, journal, chance, full=False))
        with pytest.raises((AssertionError, TimeoutError)):
            await inputs.test_3_a_length_of_4_gib(served, others)


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.asyncio
async def test_finds_a_node_that_sheds_nothing(tmp_path: Path) -> None:
    pressure, times = Pressure(tmp_path, "any", "no_shedding"), Times(1.0, 3.0, 3.0, 2.0)
    async with pressure.running():
        day = await measure(pressure, times, patient=False)
    with pytest.raises(AssertionError, match="on a good day"):
        day.check()


@pytest.mark.asyncio
async def test_finds_too_little_traffic(
    survivors: Survivors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "ENOUGH", 2.0)
    with pytest.raises(AssertionError, match="too little traffic"):
        await failing.test_calls_that_must_not_be_repeated_add_nothing(survivors)
