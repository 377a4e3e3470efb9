"""The registry: an instance in Consul for each node, alive as long as its heartbeats come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec

from micro.backend import Connections
from micro.errors import Closed, DecodeError, Gap, ServiceNotFound
from micro.registry import (
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_ttl,
    in_order,
)
from micro.url import URL
from micro_plugin_consul._options import ConsulOptions

if TYPE_CHECKING:
    from micro_plugin_consul._api import Consul, Entry
    from micro_plugin_consul._catalog import Catalog
    from micro_plugin_consul._entry import Namespace
    from micro_plugin_consul._own import Own

_log = logging.getLogger("micro.consul")

T = TypeVar("T")

_Nodes = dict[str, Node]


class ConsulRegistry(Registry):
    """Nodes in Consul, each an instance of a service with a check that its heartbeats pass.

    Without a path the services have Go Micro's names; a path is a namespace: it stands before
    them. ``dropped`` counts entries of others that are no nodes.
    """

    schemes: ClassVar[tuple[str, ...]] = ("consul",)
    Options: ClassVar[type[msgspec.Struct]] = ConsulOptions
    features: RegistryFeatures = RegistryFeatures(min_ttl=1.0, converge=1.0)

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.dropped: int = 0
        self._consul: Consul | None = None

    async def connect(self, connections: Connections) -> None:
        from micro_plugin_consul._api import Consul
        from micro_plugin_consul._catalog import Catalog
        from micro_plugin_consul._client import connected
        from micro_plugin_consul._entry import Namespace
        from micro_plugin_consul._own import Own

        options = self.url.options(ConsulOptions)
        self._names: Namespace = Namespace(self.url.path, self.url.source)
        server = msgspec.structs.replace(self.url, path="")
        key = msgspec.structs.replace(server, source="")
        consul = Consul(await connections.get(key, lambda: connected(server, options)))
        await consul.check(self._names.name("micro"))
        self._own: Own = Own(consul, self._names)
        self._catalog: Catalog = Catalog(consul, self._names)
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._consul = consul

    async def aclose(self) -> None:
        consul, self._consul = self._consul, None
        if consul is not None:
            self._closing.set_result(None)

    async def register(self, node: Node, *, ttl: float) -> None:
        self._open()
        await self._own.register(node, check_ttl(ttl, self.features))

    async def deregister(self, node: Node) -> None:
        self._open()
        await self._own.deregister(node)

    async def get(self, service: str) -> tuple[Node, ...]:
        consul, name = self._open(), self._names.name(service)
        nodes = self._nodes((await consul.instances(name)).entries)
        if not nodes:
            raise ServiceNotFound(f"service {service!r} is not registered with {self.url}")
        return in_order(nodes.values())

    async def services(self) -> tuple[str, ...]:
        from micro_plugin_consul._catalog import alive

        consul, ours = self._open(), self._names
        _, listed = await consul.names(0)
        names = {name for name in listed if ours.service(name) is not None}
        if not names:
            await consul.may_see(ours.name("micro"))
            return ()
        _, checks = await consul.checks(0, ours.prefix)
        known = names & alive(checks)
        others = await self._read(consul, names - known)
        known |= {name for name, nodes in others.items() if nodes}
        return tuple(sorted(name.removeprefix(ours.prefix) for name in known))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        consul, name = self._open(), None if service is None else self._names.name(service)
        if mark is not None:
            raise Gap("consul: it keeps no history; begin with a snapshot")
        known: dict[str, _Nodes] | None = None
        async with aclosing(self._states(consul, name)) as states:
            async for state in states:
                if known is None:
                    known = state
                    there = (node for nodes in state.values() for node in nodes.values())
                    yield True, Snapshot(nodes=in_order(there))
                    continue
                for changed, nodes in state.items():
                    for change in _differences(known.get(changed, {}), nodes):
                        yield True, change
                known |= state

    async def _states(
        self, consul: Consul, name: str | None
    ) -> AsyncGenerator[dict[str, _Nodes], None]:
        """The nodes of services by their names in Consul: of all, and then of what has changed."""
        watches = consul.client.watches
        if name is not None and watches.take():
            try:
                async with aclosing(self._waiting(consul, name)) as states:
                    async for nodes in states:
                        yield {name: nodes}
            finally:
                watches.give_back()
        async with self._catalog.seat(name) as seat:
            while True:
                changed = await self._unless_closed(seat.changed())
                if not changed:  # so it begins where nothing is, or nothing may be seen
                    await self._unless_closed(consul.may_see(self._names.name("micro")))
                yield await self._unless_closed(self._read(consul, changed))

    async def _waiting(self, consul: Consul, name: str) -> AsyncGenerator[_Nodes, None]:
        """The nodes of a service, by a query that waits, for as long as it may."""
        found = await self._unless_closed(consul.instances(name))
        yield self._nodes(found.entries)
        while not consul.client.watches.crowded:
            index = found.at
            found = await self._unless_closed(consul.wait(name, index))
            if found.at == index:
                continue
            if found.at < index or not found.entries:  # neither is to be believed
                found = await self._unless_closed(consul.instances(name))
            yield self._nodes(found.entries)

    async def _read(self, consul: Consul, names: Iterable[str]) -> dict[str, _Nodes]:
        """The nodes of these services; as many are read at once as the client has connections."""
        try:
            async with asyncio.TaskGroup() as tasks:
                asked = {name: tasks.create_task(consul.instances(name)) for name in names}
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return {name: self._nodes(task.result().entries) for name, task in asked.items()}

    def _nodes(self, entries: Iterable[Entry]) -> _Nodes:
        """By their ids; of two at different agents, as a failover leaves them, the newer one."""
        nodes: _Nodes = {}
        for entry in sorted(entries, key=lambda entry: entry.service.modify_index):
            try:
                node = self._names.node(entry.service, entry.node.address)
            except DecodeError as exc:
                self.dropped += 1
                _log.debug("%s: %r: %s", self.url, entry.service.id[:200], exc)
            else:
                nodes[node.id] = node
        return nodes

    async def _unless_closed(self, asked: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(asked, name="micro.consul follow")
        try:
            both: list[asyncio.Future[Any]] = [task, self._closing]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            self._open()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _open(self) -> Consul:
        if self._consul is None:
            raise Closed("consul: the registry is not connected")
        return self._consul


def _differences(before: _Nodes, after: _Nodes) -> Iterator[Change]:
    for id_ in before.keys() - after.keys():
        yield Change(kind="delete", node=before[id_])
    for id_, node in after.items():
        if id_ not in before:
            yield Change(kind="create", node=node)
        elif node != before[id_]:
            yield Change(kind="update", node=node)
