"""What every registry promises to who follows it, as tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import ClassVar

import msgspec
import pytest

from micro.errors import Closed, Gap, Unavailable
from micro.follow import Watch
from micro.registry import Change, Node, Registry
from micro.testing._nodes import (
    Changing,
    Reader,
    RegistryClients,
    apply,
    converge,
    first,
    found,
    new_node,
    new_service,
    registers,
    watching,
)
from micro.testing.lifecycle import RECOVERY, SLACK, needed, stopped
from micro.testing.proxy import FaultProxy
from micro.testing.servers import Server
from micro.testing.waiting import eventually


class WatchCases(RegistryClients):
    """The part of the contract that ``follow`` is."""

    #: Seconds after which a stream that says nothing has to be proven alive, or is Unavailable.
    silence: ClassVar[float] = 10.0
    #: Whether the server keeps the nodes, and one that lost its data has lost them. Otherwise those
    #: who registered them do.
    kept_by_server: ClassVar[bool] = True

    @pytest.fixture
    def compact(self) -> Callable[[], Awaitable[None]] | None:
        """Has the server forget all changes so far, for the tests of ``history``."""
        return None

    @pytest.mark.asyncio
    async def test_watch_create_update_delete(self, registry: Registry, other: Registry) -> None:
        node = new_node()
        changed = msgspec.structs.replace(node, address="127.0.0.1:2")
        async with watching(other, node.service) as watch, asyncio.timeout(converge(other) * 3):
            await registry.register(node, ttl=30)
            assert await anext(watch) == Change(kind="create", node=node)
            await registry.register(changed, ttl=30)
            assert await anext(watch) == Change(kind="update", node=changed)
            await registry.deregister(changed)
            assert await anext(watch) == Change(kind="delete", node=changed)

    @pytest.mark.asyncio
    async def test_watch_filter(self, registry: Registry, other: Registry) -> None:
        here, there = new_node(), new_node()
        async with watching(other, here.service) as one, watching(other, None) as every:
            for node in (there, here):
                await registry.register(node, ttl=30)
            for node in (there, here):
                await _shows(every, node, within=converge(other))
            async with asyncio.timeout(converge(other)):
                assert await anext(one) == Change(kind="create", node=here)
            assert one.nodes == (here,)

    @pytest.mark.asyncio
    async def test_watch_before_first_register(self, registry: Registry, other: Registry) -> None:
        node = new_node()
        async with watching(other, node.service) as watch, asyncio.timeout(converge(other)):
            assert watch.nodes == ()
            await registry.register(node, ttl=30)
            assert await anext(watch) == Change(kind="create", node=node)

    @pytest.mark.asyncio
    async def test_two_watchers(self, registry: Registry, other: Registry) -> None:
        service = new_service()
        slow = Reader(other, service)
        async with aclosing(other.follow(service, None)) as stream, watching(other, service) as one:
            slow.take(*await anext(stream))
            for step in range(300):
                await registry.register(_large(service, step), ttl=60)
            last = _large(service, 299)
            await eventually(lambda: one.nodes == (last,), within=converge(other))
            async with asyncio.timeout(converge(other)):
                while slow.nodes != [last]:
                    try:
                        slow.take(*await anext(stream))
                    except (Gap, Unavailable):  # it may be told that it was too slow
                        break

    @pytest.mark.asyncio
    async def test_watch_fold_equals_get(
        self, registry: Registry, other: Registry, chance: random.Random
    ) -> None:
        changing = Changing(registry, chance)
        async with watching(other, changing.service) as watch:
            for _ in range(500):
                await changing.step()
            await _agree(watch, changing, within=converge(other))
            assert await found(other, changing.service) == changing.nodes

    @pytest.mark.asyncio
    async def test_watch_stop(self, registry: Registry, other: Registry) -> None:
        node = new_node()
        await registry.register(node, ttl=30)
        before = asyncio.all_tasks()
        async with watching(other, node.service) as watch:
            reading = asyncio.create_task(_all(watch))
            await eventually(lambda: watch.nodes == (node,), within=converge(other))
        assert {change.kind for change in await asyncio.wait_for(reading, SLACK)} <= {"create"}
        await eventually(lambda: asyncio.all_tasks() <= before)

    @pytest.mark.asyncio
    async def test_close_ends_who_follows(self, registry: Registry, other: Registry) -> None:
        node = new_node()
        await registry.register(node, ttl=30)
        readers = [Reader(other, node.service) for _ in range(2)]
        reading = [asyncio.create_task(reader.read(lambda: False)) for reader in readers]
        await eventually(lambda: all(reader.nodes for reader in readers), within=converge(other))
        await other.aclose()
        outcomes = await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), SLACK)
        assert [type(outcome) for outcome in outcomes] == [Closed, Closed]

    # -- going on from a mark

    @pytest.mark.asyncio
    async def test_history_resumes(
        self, registry: Registry, other: Registry, chance: random.Random
    ) -> None:
        if not registry.features.history:
            pytest.skip("it declares no history")
        changing = Changing(registry, chance)
        reader = Reader(other, changing.service)
        await reader.read(lambda: True)
        async with asyncio.timeout(5 * converge(other)):
            await reader.read(lambda: True)  # though nothing happened, it says that it goes on
            for goal in (5, 20, 21, 60, 100):
                while len(changing.changes) < goal + 10:
                    await changing.step()
                await reader.read(partial(reader.has_changes, goal))
            await reader.read(partial(reader.has_changes, len(changing.changes)))
        assert reader.changes == changing.changes
        assert reader.snapshots == 1

    @pytest.mark.asyncio
    async def test_without_history_gap(self, registry: Registry, other: Registry) -> None:
        if registry.features.history:
            pytest.skip("it declares history")
        node = new_node()
        await registry.register(node, ttl=30)
        reader = Reader(other, node.service)
        await reader.read(lambda: True)
        assert reader.mark is not None
        async with asyncio.timeout(self.timeout + SLACK):
            with pytest.raises(Gap):
                await first(other, node.service, reader.mark)

    @pytest.mark.asyncio
    async def test_watch_resyncs_after_gap(
        self,
        registry: Registry,
        other: Registry,
        compact: Callable[[], Awaitable[None]] | None,
    ) -> None:
        if not registry.features.history:
            pytest.skip("it declares no history")
        compact = needed(compact, "nothing makes it forget: fixture 'compact'")
        service = new_service()
        gone, stays, comes = (new_node(service, id=name) for name in ("gone", "stays", "comes"))
        for node in (gone, stays):
            await registry.register(node, ttl=60)
        reader = Reader(other, service)
        await reader.read(lambda: True)
        async with watching(other, service) as watch:
            await registry.deregister(gone)
            await registry.register(comes, ttl=60)
            await compact()
            async with asyncio.timeout(self.timeout + SLACK):
                with pytest.raises(Gap):
                    await first(other, service, reader.mark)
            await eventually(lambda: watch.nodes == (comes, stays), within=RECOVERY + SLACK)
            await registry.deregister(stays)
            await eventually(lambda: watch.nodes == (comes,), within=converge(other))

    # -- faults of the server, and on the way to it

    @pytest.mark.asyncio
    async def test_watch_resumes(
        self, registry: Registry, far: Registry, proxy: FaultProxy, chance: random.Random
    ) -> None:
        changing = Changing(registry, chance)
        async with watching(far, changing.service) as watch:
            for step in range(300):
                if step % 50 == 10:
                    proxy.cut()
                if step == 200:
                    proxy.refuse()
                    proxy.cut()
                await changing.step()
            proxy.heal()
            await _agree(watch, changing, within=RECOVERY + SLACK)

    @pytest.mark.asyncio
    async def test_history_survives_cuts(
        self, registry: Registry, far: Registry, proxy: FaultProxy, chance: random.Random
    ) -> None:
        if not registry.features.history:
            pytest.skip("it declares no history")
        changing = Changing(registry, chance)
        reader = Reader(far, changing.service)
        await reader.read(lambda: True)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(reader.read_on())
            for step in range(300):
                if step % 50 == 10:
                    proxy.cut()
                await changing.step()
            await eventually(
                lambda: len(reader.changes) >= len(changing.changes), within=RECOVERY + SLACK
            )
            reading.cancel()
        assert reader.changes == changing.changes
        assert reader.snapshots == 1

    @pytest.mark.asyncio
    async def test_cut_off_watch_resyncs_after_gap(
        self,
        registry: Registry,
        far: Registry,
        proxy: FaultProxy,
        chance: random.Random,
        compact: Callable[[], Awaitable[None]] | None,
    ) -> None:
        compact = needed(compact, "nothing makes it forget: fixture 'compact'")
        changing = Changing(registry, chance)
        async with watching(far, changing.service) as watch:
            for _ in range(20):
                await changing.step()
            proxy.refuse()
            proxy.cut()
            for _ in range(20):
                await changing.step()
            await compact()
            proxy.heal()
            await _agree(watch, changing, within=RECOVERY + SLACK)

    @pytest.mark.asyncio
    async def test_watch_notices_silence(
        self, registry: Registry, far: Registry, proxy: FaultProxy
    ) -> None:
        service = new_service()
        here, later = (new_node(service, id=name) for name in ("a", "b"))
        await registry.register(here, ttl=60)
        async with watching(far, service) as watch:
            proxy.blackhole()
            await eventually(lambda: watch.state == "stale", within=self.silence + SLACK)
            assert list(watch.nodes) == [here]
            await registry.register(later, ttl=60)
            proxy.heal()
            await eventually(lambda: watch.nodes == (here, later), within=RECOVERY + SLACK)
            assert watch.state == "live"

    @pytest.mark.asyncio
    async def test_outage_is_not_told_as_empty(
        self, registry: Registry, other: Registry, server: Server | None
    ) -> None:
        server = needed(server, "no server")
        node = new_node()
        await registry.register(node, ttl=60)
        async with watching(other, node.service) as watch:
            reading = asyncio.create_task(_all(watch))
            async with stopped(server):
                await eventually(lambda: watch.state == "stale", within=self.silence + SLACK)
                assert list(watch.nodes) == [node]
            await eventually(lambda: watch.state == "live", within=RECOVERY + SLACK)
            assert list(watch.nodes) == [node]
            await self.recovers(registry)
            late = new_node(node.service)
            await registry.register(late, ttl=60)
            await registry.deregister(node)
            await eventually(lambda: watch.nodes == (late,), within=converge(other))
        assert sorted(change.kind for change in await reading) == ["create", "delete"]

    @pytest.mark.asyncio
    async def test_lease_lost_reregisters(
        self, registry: Registry, other: Registry, server: Server | None
    ) -> None:
        server = needed(server, "no server")
        kept, lost = new_node(service := new_service()), new_node(service)
        for node in (kept, lost):
            await registry.register(node, ttl=60)
        async with watching(other, service) as watch:
            await asyncio.to_thread(server.restart, keep_data=False)
            await eventually(lambda: registers(registry, kept, ttl=60), within=RECOVERY + SLACK)
            await self.recovers(other)
            left = [kept] if self.kept_by_server else sorted([kept, lost], key=lambda node: node.id)
            assert await found(other, service) == left
            await eventually(lambda: list(watch.nodes) == left, within=RECOVERY + SLACK)


async def _shows(watch: Watch, node: Node, *, within: float) -> None:
    await eventually(lambda: node in watch.nodes, within=within)


def _large(service: str, step: int) -> Node:
    return new_node(service, id="the-one", metadata={"step": f"{step:4096}"})


async def _agree(watch: Watch, changing: Changing, *, within: float) -> None:
    """The watch, what it tells, and the registry come to the same."""
    assert await found(changing.registry, changing.service) == changing.nodes
    await eventually(lambda: list(watch.nodes) == changing.nodes, within=within)
    folded: dict[str, Node] = {}
    async with asyncio.timeout(SLACK):
        while [folded[id_] for id_ in sorted(folded)] != changing.nodes:
            apply(folded, await anext(watch))


async def _all(watch: Watch) -> list[Change]:
    return [change async for change in watch]
