"""What every registry promises, as tests."""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import msgspec
import pytest

from micro.errors import InvalidArgument, ServiceNotFound, TooLarge, Unsupported
from micro.follow import Watch
from micro.plugins import Plugins
from micro.registry import Node, Registry, Snapshot
from micro.testing._nodes import (
    ENDPOINT,
    converge,
    first,
    found,
    has,
    new_node,
    new_service,
    ttl_of,
    watching,
)
from micro.testing._watching import WatchCases
from micro.testing.lifecycle import SLACK, needed
from micro.testing.waiting import eventually


class RegistrySuite(WatchCases):
    """The contract of ``Registry``: subclass it, name the ``backend`` and give the ``url`` fixture.

    ::

        class TestEtcdRegistry(RegistrySuite):
            backend = EtcdRegistry

            @pytest.fixture
            def url(self, etcd_url: str) -> str:  # a namespace of its own for each test
                return etcd_url

    Some tests need more than a URL and are skipped without it: the fixtures ``server``,
    ``bad_credentials_url``, ``garbage``, and with the feature ``history`` also ``compact``. Each
    feature is tested both ways: declared it has to hold, not declared it has to be refused. The
    attributes ``timeout``, ``silence``, ``seed``, ``kept_by_server`` and ``model_...`` may be set
    otherwise.
    """

    #: How many rows of operations are compared with the reference, and how long each is.
    model_examples: ClassVar[int] = 50
    model_steps: ClassVar[int] = 30

    @pytest.fixture
    def namespaced_url(self, url: str) -> str:
        """As ``url``, with a namespace inside of its own."""
        place, question, options = url.partition("?")
        return f"{place if '://' in place else place + '://'}/other{question}{options}"

    @pytest.fixture
    def garbage(self) -> Callable[[str], Awaitable[None]] | None:
        """Writes, behind the registry's back, what is no node where those of a service are."""
        return None

    # -- nodes

    @pytest.mark.asyncio
    async def test_register_then_get(self, registry: Registry, other: Registry) -> None:
        node = new_node(
            version="1.2.3",
            metadata={"zone": "eu", "protocol": "mucp"},
            service_metadata={"team": "a"},
            endpoints=(ENDPOINT,),
        )
        await registry.register(node, ttl=ttl_of(registry))
        assert await registry.get(node.service) == (node,)
        await eventually(lambda: has(other, node.service, [node]), within=converge(other))
        assert node.service in await registry.services()

    @pytest.mark.asyncio
    async def test_register_twice(self, registry: Registry, other: Registry) -> None:
        ttl = ttl_of(registry)
        node = new_node()
        await registry.register(node, ttl=ttl)
        first_end = time.monotonic() + ttl
        await asyncio.sleep(ttl / 2)
        until = time.monotonic() + ttl
        await registry.register(node, ttl=ttl)
        await eventually(lambda: has(other, node.service, [node]), within=converge(other))
        while True:
            seen = await found(other, node.service)
            if time.monotonic() >= until:
                break
            assert seen == [node]
            await asyncio.sleep(ttl / 20)
        assert until > first_end

    @pytest.mark.asyncio
    async def test_reregister_changes_metadata(self, registry: Registry, other: Registry) -> None:
        node = new_node(metadata={"weight": "1", "zone": "eu"})
        await registry.register(node, ttl=ttl_of(registry))
        async with watching(other, node.service) as watch:
            await eventually(lambda: watch.nodes == (node,), within=converge(other))
            changed = msgspec.structs.replace(node, metadata={"weight": "2"}, version="2")
            await registry.register(changed, ttl=ttl_of(registry))
            assert await registry.get(node.service) == (changed,)
            await eventually(lambda: watch.nodes == (changed,), within=converge(other))

    @pytest.mark.asyncio
    async def test_two_nodes_two_versions(self, registry: Registry, other: Registry) -> None:
        service = new_service()
        nodes = [
            new_node(service, id="a", version="2.0"),
            new_node(service, id="b", version="1.0"),
        ]
        for node in reversed(nodes):
            await registry.register(node, ttl=ttl_of(registry))
        assert await registry.get(service) == tuple(nodes)
        await eventually(lambda: has(other, service, nodes), within=converge(other))
        assert (await other.services()).count(service) == 1

    @pytest.mark.asyncio
    async def test_deregister_only_that_node(self, registry: Registry, other: Registry) -> None:
        service = new_service()
        gone, stays = new_node(service), new_node(service)
        for node in (gone, stays):
            await registry.register(node, ttl=30)
        await registry.deregister(gone)
        await registry.deregister(gone)
        await registry.deregister(new_node(service))
        await registry.deregister(new_node())
        assert await registry.get(service) == (stays,)
        await eventually(lambda: has(other, service, [stays]), within=converge(other))

    @pytest.mark.asyncio
    async def test_get_unknown(self, registry: Registry) -> None:
        with pytest.raises(ServiceNotFound):
            await registry.get(new_service())

    @pytest.mark.asyncio
    async def test_list_200_services(self, registry: Registry, other: Registry) -> None:
        run = new_service()
        nodes = [new_node(f"{run}-{number:03}") for number in range(200)]
        await asyncio.gather(*(registry.register(node, ttl=60) for node in nodes))
        expected = [node.service for node in nodes]

        async def listed(registry: Registry) -> list[str]:
            return [name for name in await registry.services() if name.startswith(run)]

        async def is_complete() -> bool:
            return await listed(other) == expected

        assert await listed(registry) == expected
        await eventually(is_complete, within=converge(other))

    # -- time to live

    @pytest.mark.asyncio
    async def test_ttl_expires(self, registry: Registry, other: Registry) -> None:
        ttl = ttl_of(registry)
        node = new_node()
        began = time.monotonic()
        await registry.register(node, ttl=ttl)
        async with watching(other, node.service) as watch:
            await eventually(lambda: watch.nodes, within=converge(other))
            gone = await eventually(lambda: _left(watch, began), within=2 * ttl + SLACK)
            assert gone >= ttl
            with pytest.raises(ServiceNotFound):
                await registry.get(node.service)

    @pytest.mark.asyncio
    async def test_expired_is_registered_again(self, registry: Registry, other: Registry) -> None:
        ttl = ttl_of(registry)
        node = new_node()
        await registry.register(node, ttl=ttl)
        await eventually(lambda: has(registry, node.service, []), within=2 * ttl + SLACK)
        await registry.register(node, ttl=ttl)
        assert await registry.get(node.service) == (node,)
        await eventually(lambda: has(other, node.service, [node]), within=converge(other))

    @pytest.mark.asyncio
    async def test_heartbeat_keeps_alive(self, registry: Registry, other: Registry) -> None:
        ttl = ttl_of(registry)
        node = new_node()
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(_beat(registry, node, ttl))
            await eventually(lambda: has(other, node.service, [node]), within=converge(other))
            until = time.monotonic() + 5 * ttl
            while time.monotonic() < until:
                assert await registry.get(node.service) == (node,)
                assert await other.get(node.service) == (node,)
                await asyncio.sleep(ttl / 10)
            beating.cancel()

    @pytest.mark.asyncio
    async def test_ttl_below_the_least_is_unsupported(self, registry: Registry) -> None:
        least = registry.features.min_ttl
        node = new_node()
        for ttl in (least * 0.99, 0.0, -1.0, math.nan, math.inf):
            with pytest.raises(Unsupported):
                await registry.register(node, ttl=ttl)
        with pytest.raises(ServiceNotFound):
            await registry.get(node.service)
        await registry.register(node, ttl=least or 1)

    # -- names

    @pytest.mark.asyncio
    async def test_names_distinct(self, registry: Registry) -> None:
        run = uuid.uuid4().hex[:8]
        names = [
            f"{run}.b",
            f"{run}-b",
            f"{run}_b",
            f"{run}.b.c",
            ".".join([run, *["x" * 63] * 2, "y" * 62]),
        ]
        if not registry.features.ignores_case:
            names.append(f"{run}.B")
        nodes = [new_node(name) for name in names]
        for node in nodes:
            await registry.register(node, ttl=30)
        for node in nodes:
            assert await registry.get(node.service) == (node,)
            assert await first(registry, node.service) == Snapshot(nodes=(node,))
        if registry.features.ignores_case:
            assert await registry.get(f"{run}.B") == (nodes[0],)

    @pytest.mark.asyncio
    @pytest.mark.parametrize(
        "name", ["", "a/b", "ü", "a b", "a..b", ".a", "x" * 64, "y." * 100 + "y"]
    )
    async def test_other_names_are_refused(self, registry: Registry, name: str) -> None:
        node = Node(service=name, id="a", address="127.0.0.1:1")
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: registry.get(name),
            lambda: registry.register(node, ttl=30),
            lambda: registry.deregister(node),
            lambda: first(registry, name),
        ]
        for call in calls:
            with pytest.raises(InvalidArgument):
                await call()

    @pytest.mark.asyncio
    @pytest.mark.parametrize(
        "fields",
        [
            {"id": ""},
            {"id": "a.b"},
            {"id": "x" * 47},
            {"address": "h"},
            {"address": "h:0"},
            {"version": "\ud800"},
            {"metadata": {"no": "Unicode \udcff"}},
        ],
        ids=str,
    )
    async def test_other_nodes_are_refused(
        self, registry: Registry, fields: dict[str, Any]
    ) -> None:
        usual: dict[str, Any] = {"service": "s", "id": "x", "address": "h:1"}
        node = Node(**usual | fields)
        with pytest.raises(InvalidArgument):
            await registry.register(node, ttl=30)

    @pytest.mark.asyncio
    async def test_namespaces_isolated(
        self, registry: Registry, namespaced_url: str, plugins: Plugins
    ) -> None:
        here = new_node()
        there = new_node(here.service)
        async with (
            self.connected(namespaced_url, plugins) as elsewhere,
            watching(registry, None) as ours,
            watching(elsewhere, None) as theirs,
        ):
            await registry.register(here, ttl=30)
            with pytest.raises(ServiceNotFound):
                await elsewhere.get(here.service)
            assert here.service not in await elsewhere.services()
            await elsewhere.register(there, ttl=30)
            await eventually(lambda: here in ours.nodes, within=converge(registry))
            await eventually(lambda: theirs.nodes == (there,), within=converge(registry))
            assert await registry.get(here.service) == (here,)
            assert there not in ours.nodes
            await elsewhere.deregister(here)
            assert await registry.get(here.service) == (here,)

    # -- sizes and what others write

    @pytest.mark.asyncio
    @pytest.mark.parametrize("size", [1_000, 8_000, 40_000, 63_000, 70_000])
    async def test_metadata_limit(self, registry: Registry, other: Registry, size: int) -> None:
        large = random.Random(size).randbytes(size // 2).hex()
        node = new_node(metadata={"large": large})
        try:
            await registry.register(node, ttl=30)
        except TooLarge:
            assert size > 1_000
        else:
            assert size < 70_000
            assert await registry.get(node.service) == (node,)
            await eventually(lambda: has(other, node.service, [node]), within=converge(other))

    @pytest.mark.asyncio
    async def test_hostile_entry_skipped(
        self,
        registry: Registry,
        other: Registry,
        garbage: Callable[[str], Awaitable[None]] | None,
    ) -> None:
        garbage = needed(garbage, "others write nothing there")
        service = new_service()
        nodes = [new_node(service, id="a"), new_node(service, id="b")]
        await registry.register(nodes[0], ttl=30)
        await garbage(service)
        async with watching(other, service) as watch, watching(other, None) as every:
            await garbage(service)
            await registry.register(nodes[1], ttl=30)
            await eventually(lambda: list(watch.nodes) == nodes, within=converge(other))
            await eventually(lambda: nodes[1] in every.nodes, within=converge(other))
            assert (watch.state, every.state) == ("live", "live")
        assert other.dropped > 0
        assert await registry.get(service) == tuple(nodes)
        assert (await registry.services()).count(service) == 1

    # -- all together

    @pytest.mark.asyncio
    async def test_model(self, registry: Registry, other: Registry, chance: random.Random) -> None:
        from micro.testing._model import check_against_model

        await check_against_model(
            registry,
            other,
            examples=self.model_examples,
            steps=self.model_steps,
            seed=chance.getrandbits(64),
        )


def _left(watch: Watch, began: float) -> float:
    return 0.0 if watch.nodes else time.monotonic() - began


async def _beat(registry: Registry, node: Node, ttl: float) -> None:
    while True:
        await registry.register(node, ttl=ttl)
        await asyncio.sleep(ttl / 3)
