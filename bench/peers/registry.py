"""A plugin's registry, as a service uses it; the option is its scheme."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from importlib import import_module

from bench import registries
from bench.load import Job, Point
from bench.peer import main
from bench.registries import SERVICE, TTL, RegistryClient, Seen

import micro
from micro.registry import Change, Node, Registry


class Plugin(RegistryClient):
    def __init__(self, scheme: str, port: int) -> None:
        url = micro.URL.parse(f"{scheme}://127.0.0.1:{port}")
        kind: type[Registry] = Registry  # type: ignore[type-abstract]
        plugins = micro.Plugins()
        self._connections = plugins.connections()
        self._registry = plugins.create(kind, url)

    async def open(self) -> None:
        await self._registry.connect(self._connections)

    async def beat(self, node: Node) -> None:
        await self._registry.register(node, ttl=TTL)

    async def get(self) -> list[str]:
        return [node.id for node in await self._registry.get(SERVICE)]

    async def follow(self) -> AsyncIterator[list[Seen]]:
        async with aclosing(self._registry.follow(SERVICE, None)) as stream:
            async for _, item in stream:
                if item is not None:
                    nodes = (item.node,) if isinstance(item, Change) else item.nodes
                    yield [Seen(node.id, node.metadata["change"]) for node in nodes]

    async def aclose(self) -> None:
        await self._registry.aclose()
        await self._connections.aclose()


async def call(job: Job) -> Point:
    scheme = job.options[0]
    raw = import_module(f"bench.peers.raw_{scheme.replace('-', '_')}")
    return await registries.drive(job, Plugin(scheme, job.port), raw.Raw(job.port))


if __name__ == "__main__":
    main(registries.serve, call)
