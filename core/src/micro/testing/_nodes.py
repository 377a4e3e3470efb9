"""What the tests of registries share: clients, nodes, and ways to look at them."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest
import pytest_asyncio

from micro.errors import ServiceNotFound, Unavailable
from micro.follow import View, Watch
from micro.plugins import Plugins
from micro.registry import Change, Endpoint, Node, Registry, RegistryFeatures, Snapshot, Value
from micro.testing.lifecycle import SLACK, Clients, LifecycleSuite, through
from micro.testing.proxy import FaultProxy

ENDPOINT = Endpoint(
    name="Greeter.Hello",
    request=Value(name="HelloReq", type="HelloReq", values=(Value(name="name", type="string"),)),
    response=Value(name="HelloRep", type="HelloRep"),
    metadata={"description": "Greet a person."},
)


class RegistryCalls(Clients[Registry]):
    """What can be asked of a registry."""

    def calls(self, backend: Registry) -> Sequence[Callable[[], Awaitable[object]]]:
        node = new_node()
        return [
            lambda: backend.register(node, ttl=30),
            lambda: backend.deregister(node),
            lambda: backend.get(node.service),
            backend.services,
            lambda: first(backend, node.service),
            lambda: first(backend, None),
        ]

    async def work(self, backend: Registry) -> None:
        node = new_node()
        await backend.register(node, ttl=30)
        assert await backend.get(node.service) == (node,)
        assert await first(backend, node.service) == Snapshot(nodes=(node,))
        await backend.deregister(node)


class RegistryClients(RegistryCalls, LifecycleSuite[Registry]):
    """Connected registries: ``registry``, ``other``, and ``far``, which stands behind ``proxy``."""

    @pytest_asyncio.fixture
    async def registry(
        self, url: str, plugins: Plugins, request: pytest.FixtureRequest
    ) -> AsyncIterator[Registry]:
        async with self.connected(url, plugins) as registry:
            declared = ("micro.features", _text(registry.features))
            request.node.user_properties.append(declared)
            yield registry

    @pytest_asyncio.fixture
    async def other(self, url: str, plugins: Plugins) -> AsyncIterator[Registry]:
        async with self.connected(url, plugins) as registry:
            yield registry

    @pytest_asyncio.fixture
    async def far(self, url: str, proxy: FaultProxy, plugins: Plugins) -> AsyncIterator[Registry]:
        async with self.connected(through(url, proxy.address), plugins) as registry:
            yield registry


class Reader:
    """A follower by hand: ``nodes`` is the fold of what it was told, ``changes`` are all changes.

    A Snapshot empties ``changes``, and counts in ``snapshots``.
    """

    def __init__(self, registry: Registry, service: str) -> None:
        self.mark: object = None
        self.changes: list[Change] = []
        self.snapshots = 0
        self._registry = registry
        self._service = service
        self._nodes: dict[str, Node] = {}

    @property
    def nodes(self) -> list[Node]:
        return [self._nodes[id_] for id_ in sorted(self._nodes)]

    def has_changes(self, count: int) -> bool:
        return len(self.changes) >= count

    async def read(self, until: Callable[[], bool]) -> None:
        """One attempt, from the last mark on; it ends at the first item after which ``until``."""
        async with aclosing(self._registry.follow(self._service, self.mark)) as stream:
            async for mark, item in stream:
                self.take(mark, item)
                if until():
                    return

    async def read_on(self) -> None:
        """One attempt after the other, without end."""
        while True:
            try:
                await self.read(lambda: False)
            except Unavailable:
                await asyncio.sleep(0.05)

    def take(self, mark: object, item: Snapshot | Change | None) -> None:
        self.mark = mark
        if isinstance(item, Change):
            self.changes.append(item)
            apply(self._nodes, item)
        elif item is not None:
            self.snapshots += 1
            self.changes.clear()
            self._nodes = {node.id: node for node in item.nodes}


class Changing:
    """Changes by chance to a service of its own, and what a follower has to be told of them."""

    def __init__(self, registry: Registry, chance: random.Random) -> None:
        self.registry = registry
        self.service = new_service()
        self.changes: list[Change] = []
        self._chance = chance
        self._steps = 0
        self._nodes: dict[str, Node] = {}

    @property
    def nodes(self) -> list[Node]:
        return [self._nodes[id_] for id_ in sorted(self._nodes)]

    async def step(self) -> None:
        self._steps += 1
        id_ = f"node-{self._chance.randrange(8)}"
        known = self._nodes.get(id_)
        node = new_node(self.service, id=id_, metadata={"step": str(self._steps)})
        if self._chance.random() < 0.3:
            await self.registry.deregister(node)
            told = Change(kind="delete", node=known) if known else None
        else:
            await self.registry.register(node, ttl=60)
            told = Change(kind="update" if known else "create", node=node)
        if told is not None:
            self.changes.append(told)
            apply(self._nodes, told)


def apply(nodes: dict[str, Node], change: Change) -> None:
    """Do to ``nodes``, by id, what a follower is told."""
    if change.kind == "delete":
        nodes.pop(change.node.id, None)
    else:
        nodes[change.node.id] = change.node


def new_service() -> str:
    return f"suite-{uuid.uuid4().hex[:12]}"


def new_node(service: str | None = None, **fields: object) -> Node:
    """A node that nobody else has; of a service of its own, unless one is named."""
    node = Node(service=service or new_service(), id=str(uuid.uuid4()), address="127.0.0.1:9301")
    return msgspec.structs.replace(node, **fields)


def ttl_of(registry: Registry) -> float:
    """A short time to live that it keeps."""
    return max(0.5, registry.features.min_ttl)


def converge(registry: Registry) -> float:
    """The seconds in which it has to see what another did."""
    return registry.features.converge + SLACK


async def found(registry: Registry, service: str) -> list[Node]:
    """The nodes of a service; none is no error."""
    try:
        return list(await registry.get(service))
    except ServiceNotFound:
        return []


async def has(registry: Registry, service: str, nodes: Sequence[Node]) -> bool:
    return await found(registry, service) == list(nodes)


async def first(registry: Registry, service: str | None, mark: object = None) -> object:
    """The first item of a stream."""
    async with aclosing(registry.follow(service, mark)) as stream:
        return (await anext(stream))[1]


async def registers(registry: Registry, node: Node, *, ttl: float) -> bool:
    """Whether a heartbeat gets through."""
    try:
        await registry.register(node, ttl=ttl)
    except Unavailable:
        return False
    return True


@asynccontextmanager
async def watching(registry: Registry, service: str | None) -> AsyncIterator[Watch]:
    view = View(registry, service, ttl=30)
    try:
        async with view.watch() as watch:
            yield watch
    finally:
        await view.aclose()


def _text(features: RegistryFeatures) -> str:
    """``min_ttl=0.01 converge=0 history``: numbers by name, what it can by its name alone."""
    said = []
    for name, value in msgspec.structs.asdict(features).items():
        if not isinstance(value, bool):
            said.append(f"{name}={value:g}")
        elif value:
            said.append(name)
    return " ".join(said)
