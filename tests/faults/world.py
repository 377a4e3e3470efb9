"""A real server of a registry, and the links of its clients, for churn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.faults.backends import Backend
from tests.faults.faults import Fault, Where
from tests.faults.observers import Journal, Observed

from micro.backend import Connections
from micro.errors import ServiceNotFound
from micro.registry import Node, Registry
from micro.testing import FaultProxy, Server

WHERE: tuple[Where, ...] = ("server", "nodes", "callers")


class RealWorld:
    """One client for all nodes behind each link; ``server`` is the way without faults."""

    def __init__(
        self,
        backend: Backend,
        server: Server,
        links: dict[Where, FaultProxy],
        clients: dict[Where, Registry],
        onlooker: Registry,
    ) -> None:
        self.backend = backend
        self._server = server
        self._links = links
        self._clients = clients
        self._onlooker = onlooker

    def registry(self, where: Where) -> Registry:
        return self._clients[where]

    async def nodes(self) -> list[Node]:
        """By a client that keeps no node and watches nothing."""
        services = await self._onlooker.services()
        found = await asyncio.gather(*map(self._of, services))
        return [node for nodes in found for node in nodes]

    async def befall(self, fault: Fault) -> None:
        await fault.befall(self._server, self._links)

    async def _of(self, service: str) -> tuple[Node, ...]:
        try:
            return await self._onlooker.get(service)
        except ServiceNotFound:  # it went in between
            return ()


@asynccontextmanager
async def real(
    backend: Backend, server: Server, journal: Journal, seed: int
) -> AsyncIterator[RealWorld]:
    """The server started, its links and clients open; at the end all is closed and killed."""
    async with AsyncExitStack() as stack:
        stack.callback(server.kill)
        await asyncio.to_thread(server.start)
        links: dict[Where, FaultProxy] = {
            where: await stack.enter_async_context(FaultProxy(server.address, seed=seed))
            for where in WHERE
        }

        async def connected(address: str) -> Observed:
            registry = Observed(backend.registry(address), journal)
            connections = Connections()
            stack.push_async_callback(connections.aclose)
            stack.push_async_callback(registry.aclose)
            await registry.connect(connections)
            return registry

        clients: dict[Where, Registry] = {
            where: await connected(link.address) for where, link in links.items()
        }
        onlooker = await connected(server.address)
        yield RealWorld(backend, server, links, clients, onlooker)
