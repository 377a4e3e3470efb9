"""A fleet for tests: real services on real sockets, which count what reaches them and may fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import micro
from micro.call import Body, Call, Handler, Reply
from micro.registry import Node, Registry
from micro.settings import Settings
from micro.testing.proxy import FaultProxy

SERVICE = "work"


class Work:
    """The handler of each node; ``executed`` counts what it did."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.executed = 0
        #: Does something in every call, after it was counted; a fault, as a rule.
        self.act: Callable[[], Any] | None = None

    async def _answer(self) -> str:
        self.executed += 1
        if self.act is not None and (acting := self.act()) is not None:
            await acting
        return self.name

    async def change(self) -> str:
        return await self._answer()

    @micro.endpoint(idempotent=True)
    async def read(self) -> str:
        return await self._answer()

    async def pour(self, count: int) -> AsyncIterator[str]:
        await self._answer()
        for _ in range(count):
            yield self.name

    async def gather(self, numbers: AsyncIterator[int]) -> str:
        async for _ in numbers:
            pass
        return await self._answer()


class Member:
    """A node behind a proxy; ``asked`` counts the calls that reached it, but for its health."""

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.work = Work(name)
        self.proxy: FaultProxy
        self.asked = 0
        self.probes = 0
        #: Makes the error with which the server refuses each call before its handler.
        self.refusal: Callable[[], micro.MicroError] | None = None

    @property
    def node(self) -> Node:
        metadata = {"transport": "tcp", "zone": self.name}
        endpoints = (micro.Endpoint(name="Work.Read"),)
        return Node(
            service=SERVICE,
            id=self.name,
            address=self.proxy.address,
            version=self.version,
            metadata=metadata,
            endpoints=endpoints,
        )

    def middleware(self, handler: Handler) -> Handler:
        async def handle(call: Call, body: Body) -> Reply:
            if call.endpoint.startswith("Debug."):
                self.probes += 1
            else:
                self.asked += 1
            if self.refusal is not None:
                raise self.refusal()
            return await handler(call, body)

        return handle

    def die(self) -> None:
        """As kill -9 does it: connections are reset, new ones refused; the registry knows not.

        A call that is made before the loop's next turn may still go to a connection that is lost.
        """
        self.proxy.refuse()
        self.proxy.cut()

    def revive(self) -> None:
        self.proxy.heal()


class Fleet:
    """Nodes, and a service ``web`` that calls them."""

    def __init__(self, web: micro.Service, registry: Registry, members: list[Member]) -> None:
        self.web = web
        self.registry = registry
        self.members = members

    @property
    def counts(self) -> Any:
        return self.web.client.counts

    @property
    def executed(self) -> int:
        return sum(member.work.executed for member in self.members)

    @property
    def asked(self) -> int:
        return sum(member.asked for member in self.members)

    @property
    def target(self) -> Any:
        return self.web.client._routes._targets[SERVICE]

    def peer(self, member: Member) -> Any:
        """What the client knows of a node."""
        (peer,) = [peer for peer in self.target._peers if peer.node.id == member.name]
        return peer

    def called(self) -> set[str]:
        """The nodes that calls may go to."""
        return {peer.node.id for peer in self.target.peers(self.target.pool)}

    async def join(self, member: Member) -> None:
        await self.registry.register(member.node, ttl=60)

    async def leave(self, member: Member) -> None:
        await self.registry.deregister(member.node)

    async def call(self, endpoint: str = "Work.Change", *request: Any, **options: Any) -> Any:
        return await self.web.call(SERVICE, endpoint, *request, **options)

    async def settle(self) -> None:
        """Have the client know all nodes, and a connection to each."""
        await self.call("Debug.Health")
        for member in self.members:
            await self.web.call(SERVICE, "Debug.Health", address=member.proxy.address)
        for member in self.members:
            member.probes = 0


@asynccontextmanager
async def fleet(*versions: str, **options: Any) -> AsyncIterator[Fleet]:
    """Nodes ``a``, ``b`` and so on, of these versions; the options are the calling service's."""
    names = "abcdefghij"
    async with AsyncExitStack() as stack:
        plugins = micro.Plugins()
        web = micro.Service(
            "web", registry="memory://fleet", transport="tcp", plugins=plugins, **options
        )
        await stack.enter_async_context(web.opened(Settings(environment={})))
        registry = await web.client.registered()
        members = []
        for name, version in zip(names, versions, strict=False):
            member = await _member(stack, Member(name, version))
            await registry.register(member.node, ttl=60)
            members.append(member)
        yield Fleet(web, registry, members)


async def _member(stack: AsyncExitStack, member: Member) -> Member:
    service = micro.Service(
        SERVICE, registry="memory", transport="tcp", middleware=[member.middleware]
    )
    service.handle(member.work)
    await stack.enter_async_context(service.opened(Settings(environment={})))
    (node,) = await (await service.client.registered()).get(SERVICE)
    member.proxy = await stack.enter_async_context(FaultProxy(node.address))
    return member
