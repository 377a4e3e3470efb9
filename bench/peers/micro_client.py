"""Ours, the client: a typed client of ``micro.Service``; ``--asyncio``: without uvloop."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from importlib import import_module

from bench.load import NAME, Job, job, load
from bench.peers.micro_server import Helloworld, Request

import micro
from micro.backend import Connections
from micro.registry import RegistryFeatures


class OneNode(micro.Registry):
    """A registry that knows the server and nothing else.

    What is measured is a call, and no registry is on its path; mdns would add the network's mood.
    """

    features = RegistryFeatures(min_ttl=0, converge=0)

    def __init__(self, address: str) -> None:
        super().__init__(micro.URL(scheme="one"))
        self._node = micro.Node(service="bench", id="one", address=address)

    async def connect(self, connections: Connections) -> None:
        pass

    async def aclose(self) -> None:
        pass

    async def register(self, node: micro.Node, *, ttl: float) -> None:
        raise micro.Unsupported("one node is all there is")

    async def deregister(self, node: micro.Node) -> None:
        pass

    async def get(self, service: str) -> tuple[micro.Node, ...]:
        return (self._node,)

    async def services(self) -> tuple[str, ...]:
        return (self._node.service,)

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, micro.Snapshot | micro.Change], None]:
        yield 1, micro.Snapshot(nodes=(self._node,))
        await asyncio.Event().wait()


async def main(job: Job) -> None:
    registry = OneNode(f"127.0.0.1:{job.port}")
    async with micro.Service("bench-client", registry=registry, transport="http") as app:
        greeter = app.client("bench", Helloworld)

        async def call() -> str:
            return (await greeter.call(Request(NAME))).message

        await load(job, call)


if __name__ == "__main__":
    stock = "--asyncio" in sys.argv
    loop = asyncio.new_event_loop if stock else import_module("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main(job()))
