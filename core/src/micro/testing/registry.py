"""What every registry promises, as tests."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest
import pytest_asyncio

from micro.backend import Connections
from micro.errors import Closed, InvalidArgument, ServiceNotFound, TooLarge
from micro.follow import View, Watch
from micro.plugins import Plugins
from micro.registry import Endpoint, Node, Registry, Value
from micro.testing.waiting import eventually
from micro.url import URL

#: Seconds more than promised that a busy machine gets; never less than promised.
SLACK = 2.0


class RegistrySuite:
    """The contract of ``Registry``: subclass it, name the ``backend`` and give the ``url`` fixture.

    ::

        class TestEtcd(RegistrySuite):
            backend = EtcdRegistry

            @pytest.fixture
            def url(self, etcd_server):
                return f"etcd://{etcd_server.address}"

    ``registry`` is one connected client, ``other`` a second one of the same server.
    """

    backend: type[Registry]

    @pytest.fixture
    def url(self) -> str:
        raise TypeError(f"{type(self).__name__} must give the fixture 'url'")

    @pytest.fixture
    def namespaced_url(self, url: str) -> str:
        """As ``url``, with a namespace of its own."""
        return f"{url if '://' in url else url + '://'}/other"

    @pytest.fixture
    def plugins(self) -> Plugins:
        return Plugins()

    @pytest_asyncio.fixture
    async def registry(self, url: str, plugins: Plugins) -> AsyncIterator[Registry]:
        async with self._connected(url, plugins.connections()) as registry:
            yield registry

    @pytest_asyncio.fixture
    async def other(self, url: str, plugins: Plugins) -> AsyncIterator[Registry]:
        async with self._connected(url, plugins.connections()) as registry:
            yield registry

    @asynccontextmanager
    async def _connected(self, url: str, connections: Connections) -> AsyncIterator[Registry]:
        registry = self.backend(URL.parse(url, source="test"))
        await registry.connect(connections)
        try:
            yield registry
        finally:
            await registry.aclose()
            await connections.aclose()

    @pytest.mark.asyncio
    async def test_register_then_get(self, registry: Registry, other: Registry) -> None:
        node = _node(
            _service(), metadata={"zone": "eu", "protocol": "mucp"}, endpoints=(_ENDPOINT,)
        )
        await registry.register(node, ttl=_ttl(registry))
        assert await registry.get(node.service) == (node,)
        await eventually(lambda: _is(other, node.service, [node]), within=_converge(other))
        assert node.service in await registry.services()

    @pytest.mark.asyncio
    async def test_reregister_changes_metadata(self, registry: Registry, other: Registry) -> None:
        node = _node(_service(), metadata={"weight": "1"})
        await registry.register(node, ttl=_ttl(registry))
        async with _watching(other, node.service) as watch:
            await eventually(lambda: watch.nodes == (node,), within=_converge(other))
            changed = msgspec.structs.replace(node, metadata={"weight": "2"}, version="2")
            await registry.register(changed, ttl=_ttl(registry))
            assert await registry.get(node.service) == (changed,)
            await eventually(lambda: watch.nodes == (changed,), within=_converge(other))

    @pytest.mark.asyncio
    async def test_two_nodes_two_versions(self, registry: Registry, other: Registry) -> None:
        service = _service()
        nodes = sorted([_node(service, version="1.0"), _node(service, version="2.0")], key=_id)
        for node in nodes:
            await registry.register(node, ttl=_ttl(registry))
        assert await registry.get(service) == tuple(nodes)
        await eventually(lambda: _is(other, service, nodes), within=_converge(other))
        assert (await other.services()).count(service) == 1

    @pytest.mark.asyncio
    async def test_deregister_only_that_node(self, registry: Registry, other: Registry) -> None:
        service = _service()
        gone, stays = _node(service), _node(service)
        for node in (gone, stays):
            await registry.register(node, ttl=_ttl(registry))
        await registry.deregister(gone)
        await registry.deregister(gone)
        await registry.deregister(_node(service))
        assert await registry.get(service) == (stays,)
        await eventually(lambda: _is(other, service, [stays]), within=_converge(other))

    @pytest.mark.asyncio
    async def test_get_unknown(self, registry: Registry) -> None:
        with pytest.raises(ServiceNotFound):
            await registry.get(_service())

    @pytest.mark.asyncio
    async def test_ttl_expires(self, registry: Registry, other: Registry) -> None:
        ttl = _ttl(registry)
        node = _node(_service())
        began = time.monotonic()
        await registry.register(node, ttl=ttl)
        async with _watching(other, node.service) as watch:
            await eventually(lambda: watch.nodes, within=_converge(other))
            gone = await eventually(lambda: _left(watch, began), within=2 * ttl + SLACK)
            assert gone >= ttl
            with pytest.raises(ServiceNotFound):
                await registry.get(node.service)

    @pytest.mark.asyncio
    async def test_heartbeat_keeps_alive(self, registry: Registry, other: Registry) -> None:
        ttl = _ttl(registry)
        node = _node(_service())
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(_beat(registry, node, ttl))
            await eventually(lambda: _is(other, node.service, [node]), within=_converge(other))
            until = time.monotonic() + 5 * ttl
            while time.monotonic() < until:
                assert await registry.get(node.service) == (node,)
                assert await other.get(node.service) == (node,)
                await asyncio.sleep(ttl / 10)
            beating.cancel()

    @pytest.mark.asyncio
    async def test_watch_create_update_delete(self, registry: Registry, other: Registry) -> None:
        node = _node(_service())
        changed = msgspec.structs.replace(node, address="127.0.0.1:2")
        async with _watching(other, node.service) as watch, asyncio.timeout(_converge(other) * 3):
            seen = []
            for action in ("register", "change", "deregister"):
                if action == "deregister":
                    await registry.deregister(changed)
                else:
                    await registry.register(
                        node if action == "register" else changed, ttl=_ttl(registry) * 5
                    )
                change = await anext(watch)
                seen.append((change.kind, change.node))
            assert seen == [("create", node), ("update", changed), ("delete", changed)]

    @pytest.mark.asyncio
    async def test_watch_fold_equals_get(self, registry: Registry, other: Registry) -> None:
        service = _service()
        chance = random.Random(20_261_121)
        nodes = [_node(service) for _ in range(8)]
        async with _watching(other, service) as watch:
            for step in range(500):
                node = chance.choice(nodes)
                if chance.random() < 0.3:
                    await registry.deregister(node)
                else:
                    changed = msgspec.structs.replace(node, metadata={"step": str(step)})
                    await registry.register(changed, ttl=60)
            await registry.register(nodes[0], ttl=60)
            expected = await registry.get(service)
            await eventually(lambda: watch.nodes == expected, within=_converge(other))
            assert await other.get(service) == expected

    @pytest.mark.asyncio
    async def test_watch_before_first_register(self, registry: Registry, other: Registry) -> None:
        node = _node(_service())
        async with _watching(other, node.service) as watch, asyncio.timeout(_converge(other)):
            assert watch.nodes == ()
            await registry.register(node, ttl=_ttl(registry))
            assert (await anext(watch)).node == node

    @pytest.mark.asyncio
    async def test_watch_filter(self, registry: Registry, other: Registry) -> None:
        here, there = _node(_service()), _node(_service())
        async with _watching(other, here.service) as one, _watching(other, None) as every:
            for node in (there, here):
                await registry.register(node, ttl=_ttl(registry) * 5)
            await eventually(
                lambda: here in every.nodes and there in every.nodes, within=_converge(other)
            )
            await eventually(lambda: one.nodes == (here,), within=_converge(other))

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
        nodes = [_node(name) for name in names]
        for node in nodes:
            await registry.register(node, ttl=_ttl(registry) * 5)
        for node in nodes:
            assert await registry.get(node.service) == (node,)
        if registry.features.ignores_case:
            assert await registry.get(f"{run}.B") == (nodes[0],)

    @pytest.mark.asyncio
    @pytest.mark.parametrize(
        "name", ["", "a/b", "ü", "a b", "a..b", ".a", "x" * 64, "y." * 100 + "y"]
    )
    async def test_other_names_are_refused(self, registry: Registry, name: str) -> None:
        with pytest.raises(InvalidArgument):
            await registry.get(name)
        with pytest.raises(InvalidArgument):
            await registry.register(_node(name), ttl=_ttl(registry))
        with pytest.raises(InvalidArgument):
            await registry.deregister(_node(name))
        with pytest.raises(InvalidArgument):
            async with aclosing(registry.follow(name, None)) as stream:
                await anext(stream)

    @pytest.mark.asyncio
    @pytest.mark.parametrize(
        ("id", "address"),
        [("", "h:1"), ("a.b", "h:1"), ("x" * 47, "h:1"), ("x", "h"), ("x", "h:0")],
    )
    async def test_other_nodes_are_refused(self, registry: Registry, id: str, address: str) -> None:
        with pytest.raises(InvalidArgument):
            await registry.register(Node(service="s", id=id, address=address), ttl=_ttl(registry))

    @pytest.mark.asyncio
    async def test_large_node_is_whole_or_refused(self, registry: Registry) -> None:
        for size in (1_000, 8_000, 40_000, 63_000, 70_000):
            node = _node(
                _service(), metadata={"large": random.Random(size).randbytes(size // 2).hex()}
            )
            try:
                await registry.register(node, ttl=_ttl(registry))
            except TooLarge:
                assert size > 1_000
            else:
                assert size < 70_000
                assert await registry.get(node.service) == (node,)

    @pytest.mark.asyncio
    async def test_namespaces_isolated(
        self, registry: Registry, namespaced_url: str, plugins: Plugins
    ) -> None:
        node = _node(_service())
        async with self._connected(namespaced_url, plugins.connections()) as elsewhere:
            await registry.register(node, ttl=_ttl(registry))
            with pytest.raises(ServiceNotFound):
                await elsewhere.get(node.service)
            assert node.service not in await elsewhere.services()

    @pytest.mark.asyncio
    async def test_closed_twice_and_used_after(self, url: str) -> None:
        registry = self.backend(URL.parse(url, source="test"))
        connections = Connections()
        await registry.connect(connections)
        await registry.aclose()
        await registry.aclose()
        await connections.aclose()
        node = _node(_service())
        for use in (
            registry.register(node, ttl=9),
            registry.deregister(node),
            registry.get(node.service),
            registry.services(),
            anext(registry.follow(None, None)),
        ):
            with pytest.raises(Closed):
                await use


_ENDPOINT = Endpoint(
    name="Greeter.Hello",
    request=Value(name="HelloReq", type="HelloReq", values=(Value(name="name", type="string"),)),
    response=Value(name="HelloRep", type="HelloRep"),
    metadata={"description": "Greet a person."},
)


def _service() -> str:
    return f"suite-{uuid.uuid4().hex[:12]}"


def _node(service: str, **fields: object) -> Node:
    node = Node(service=service, id=str(uuid.uuid4()), address="127.0.0.1:9301")
    return msgspec.structs.replace(node, **fields)


def _id(node: Node) -> str:
    return node.id


def _ttl(registry: Registry) -> float:
    return max(0.2, registry.features.min_ttl)


def _converge(registry: Registry) -> float:
    return registry.features.converge + SLACK


def _left(watch: Watch, began: float) -> float:
    return 0.0 if watch.nodes else time.monotonic() - began


async def _is(registry: Registry, service: str, nodes: list[Node]) -> bool:
    try:
        return list(await registry.get(service)) == nodes
    except ServiceNotFound:
        return False


async def _beat(registry: Registry, node: Node, ttl: float) -> None:
    while True:
        await registry.register(node, ttl=ttl)
        await asyncio.sleep(ttl / 3)


@asynccontextmanager
async def _watching(registry: Registry, service: str | None) -> AsyncIterator[Watch]:
    view = View(registry, service, ttl=5)
    try:
        async with view.watch() as watch:
            yield watch
    finally:
        await view.aclose()
