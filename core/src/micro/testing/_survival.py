"""What every transport lets calls survive, as tests: executions are counted by the servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from micro.backends.memory import MemoryRegistry
from micro.client import Client
from micro.errors import Unavailable
from micro.plugins import Plugins
from micro.registry import Node, Registry
from micro.retries import Retries
from micro.secured import Secured
from micro.selector import Selector
from micro.testing._calls import Peer, TransportClients, listening
from micro.testing.lifecycle import RECOVERY, SLACK
from micro.testing.waiting import eventually
from micro.transport import Limits, Transport
from micro.url import URL

_SERVICE = "suite"
#: Calls enough that a fifth of them is more than the repetitions that few calls have anyway.
_MANY = 1000
#: Seconds within which a node that cannot be reached has to be out.
_OUT = 1.0


class _Means:
    """What a client needs; the transport is that of the test."""

    request_timeout: float = 10.0
    register_ttl: float = 30.0
    limits: Limits = Limits()
    retries: Retries = Retries()
    selector: Selector = Selector()
    tls: Secured | None = None

    def __init__(self, registry: Registry, transport: Transport) -> None:
        self._registry = registry
        self._transport = transport

    async def registry(self) -> Registry:
        return self._registry

    async def transports(self) -> Sequence[Transport]:
        return [self._transport]


class Trio:
    """Three nodes of one service, and a client that calls them."""

    def __init__(self, client: Client, transport: Transport) -> None:
        self.client = client
        self.peers: list[Peer] = []
        self.addresses: list[str] = []
        self._transport = transport
        self._open: list[AsyncExitStack] = []

    @property
    def executed(self) -> int:
        """Calls that reached a handler, but for those that ask whether a node lives."""
        return sum(_executed(peer) for peer in self.peers)

    async def call(self, endpoint: str = "Echo.Call", *, idempotent: bool = False) -> Any:
        return await self.client.call(_SERVICE, endpoint, b"x", idempotent=idempotent)

    async def start(self) -> None:
        peer, stack = Peer(), AsyncExitStack()
        listener = await stack.enter_async_context(listening(self._transport, peer))
        self.peers.append(peer)
        self.addresses.append(listener.address)
        self._open.append(stack)

    async def kill(self, number: int) -> None:
        """End a node and the calls on it; the registry does not hear of it."""
        await self._open[number].aclose()

    async def revive(self, number: int) -> None:
        """Let a node be there again, where it was."""
        again = listening(self._transport, self.peers[number], at=self.addresses[number])
        await self._open[number].enter_async_context(again)

    async def aclose(self) -> None:
        for stack in self._open:
            await stack.aclose()


@asynccontextmanager
async def _registry(plugins: Plugins) -> AsyncIterator[Registry]:
    connections, registry = plugins.connections(), MemoryRegistry(URL.parse("memory"))
    try:
        await registry.connect(connections)
        yield registry
    finally:
        await registry.aclose()
        await connections.aclose()


class SurvivalCases(TransportClients):
    """The part of the contract that a client needs to repeat calls, and to leave dead nodes."""

    @pytest_asyncio.fixture
    async def trio(self, transport: Transport, plugins: Plugins) -> AsyncIterator[Trio]:
        async with _registry(plugins) as registry, AsyncExitStack() as stack:
            means = _Means(registry, transport)
            client = Client(lambda: means)
            trio = Trio(client, transport)
            stack.push_async_callback(trio.aclose)
            stack.push_async_callback(client.aclose)
            metadata = {"transport": transport.features.name}
            for number in range(3):
                await trio.start()
                address = trio.addresses[number]
                node = Node(service=_SERVICE, id=f"n{number}", address=address, metadata=metadata)
                await registry.register(node, ttl=60)
            yield trio

    @pytest.mark.asyncio
    async def test_retry_other_node(self, trio: Trio) -> None:
        calling = asyncio.create_task(trio.call("Wait.Echo", idempotent=True))
        lost = await _let_others_answer(trio)
        await trio.kill(lost)
        assert await calling == b"x"
        assert sorted(_executed(peer) for peer in trio.peers) == [0, 1, 1]
        assert trio.client.counts.retries == 1

    @pytest.mark.asyncio
    async def test_no_retry_non_idempotent(self, trio: Trio) -> None:
        calling = asyncio.create_task(trio.call("Wait.Echo"))
        lost = await _let_others_answer(trio)
        await trio.kill(lost)
        with pytest.raises(Unavailable) as caught:
            await calling
        assert caught.value.sent is None
        assert trio.executed == 1
        assert trio.client.counts.retries == 0

    @pytest.mark.asyncio
    async def test_connect_refused_is_retried(self, trio: Trio) -> None:
        await trio.kill(0)
        for _ in range(30):
            assert await trio.call() == b"x"
        assert trio.executed == 30
        assert _executed(trio.peers[0]) == 0

    @pytest.mark.asyncio
    async def test_retry_budget(self, trio: Trio) -> None:
        """Of calls that all fail, servers see a fifth more at most."""

        async def caller() -> None:
            for _ in range(_MANY // 20):
                with pytest.raises(Unavailable):
                    await trio.call("Lose.Call", idempotent=True)

        await asyncio.gather(*(caller() for _ in range(20)))
        assert _MANY < trio.executed <= 1.2 * _MANY

    @pytest.mark.asyncio
    async def test_outlier_ejected_and_back(self, trio: Trio) -> None:
        await trio.call()
        await trio.kill(0)
        began = time.monotonic()
        while not trio.client.counts.ejections:
            await trio.call(idempotent=True)
        assert time.monotonic() - began < _OUT + SLACK
        assert trio.client.counts.readmissions == 0
        await trio.revive(0)
        before = _executed(trio.peers[0])

        async def is_back() -> bool:
            await trio.call()
            return _executed(trio.peers[0]) > before

        await eventually(is_back, within=RECOVERY + SLACK)
        assert trio.client.counts.ejections == trio.client.counts.readmissions == 1


def _executed(peer: Peer) -> int:
    return sum(call.endpoint != "Debug.Health" for call in peer.calls)


async def _let_others_answer(trio: Trio) -> int:
    """The node at which the one call waits; at the others it would not."""
    await eventually(lambda: trio.executed)
    (at,) = [number for number, peer in enumerate(trio.peers) if peer.running]
    for number, peer in enumerate(trio.peers):
        if number != at:
            peer.release.set()
    return at
