"""The checks of these tests find what they are for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from tests.faults import fleet as engine
from tests.faults.faults import Fault
from tests.faults.fleet import Fleet
from tests.faults.observers import Observed

from micro import _targets
from micro.errors import Gap, ServiceNotFound, Unavailable
from micro.registry import Change, Node, Snapshot

pytestmark = pytest.mark.full

GAP = [Fault("compact", 1.5), Fault("refuse", 2, "callers")]
Items = AsyncGenerator[tuple[object, Snapshot | Change | None], None]


class GivesUp(Observed):
    """A heartbeat that failed is the last one."""

    failed = False

    async def register(self, node: Node, *, ttl: float) -> None:
        try:
            if not self.failed:
                await super().register(node, ttl=ttl)
        except Unavailable:
            self.failed = True


class TellsNothing(Observed):
    """An outage is an empty answer."""

    async def get(self, service: str) -> tuple[Node, ...]:
        try:
            return await super().get(service)
        except Unavailable as exc:
            raise ServiceNotFound("none") from exc

    async def follow(self, service: str | None, mark: object) -> Items:
        try:
            async with aclosing(super().follow(service, mark)) as items:
                async for mark, item in items:  # noqa: PLR1704 - to go on from the last one
                    yield mark, item
        except Unavailable:
            yield mark, Snapshot(nodes=())
            raise


class GoesOnAfterAGap(Observed):
    """What was missed stays so."""

    async def follow(self, service: str | None, mark: object) -> Items:
        try:
            async with aclosing(super().follow(service, mark)) as items:
                async for at, item in items:
                    yield at, item
        except Gap:
            async with aclosing(super().follow(service, None)) as items:
                async for at, item in items:
                    yield at, None if isinstance(item, Snapshot) else item


class HangsAfterAnOutage(Observed):
    """A watch that broke is never live again."""

    async def follow(self, service: str | None, mark: object) -> Items:
        if mark is not None:
            await asyncio.Event().wait()
        async with aclosing(super().follow(service, mark)) as items:
            async for item in items:
                yield item


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("observed", "faults", "found"),
    [
        pytest.param(GivesUp, [Fault("lose data", 2)], "registered are", id="gives up"),
        pytest.param(TellsNothing, [Fault("kill", 1)], "is empty", id="tells nothing"),
        pytest.param(GoesOnAfterAGap, GAP, "the registry has", id="goes on after a gap"),
        pytest.param(HangsAfterAnOutage, [Fault("kill", 1)], "is stale", id="hangs"),
    ],
)
async def test_finds_a_registry_that(
    fleet: Fleet, faults: list[Fault], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RETURN", 1.0)

    with pytest.raises(AssertionError, match=found) as caught:
        await live_through(fleet, fleet.through(*faults))

    assert "outage 1: server: " in caught.value.__notes__[0]


@pytest.mark.asyncio
async def test_finds_calls_that_fail(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_targets, "repeatable", lambda call, error: False)  # another node saves it

    async def kill_a_node() -> None:
        fleet.processes[0].popen.kill()
        await fleet.through(Fault("pause", 0.5))

    with pytest.raises(AssertionError, match="a call failed"):
        await live_through(fleet, kill_a_node())


@pytest.mark.asyncio
async def test_finds_too_little_traffic(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "RATE", 100_000)

    with pytest.raises(AssertionError, match="too little traffic"):
        await live_through(fleet, fleet.through(Fault("pause", 0.5)))


@pytest.mark.asyncio
async def test_finds_errors_of_tasks_that_nobody_awaits(fleet: Fleet) -> None:
    async def fail() -> None:
        raise ValueError("lost")

    async def lose_a_task() -> None:
        await asyncio.wait([asyncio.create_task(fail())])

    with pytest.raises(AssertionError, match="never retrieved"):
        await live_through(fleet, lose_a_task())


async def live_through(fleet: Fleet, what: Coroutine[Any, Any, None]) -> None:
    async with fleet:
        await what
