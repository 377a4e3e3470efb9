"""A client agent, as on the host of a program: the server is another process."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from micro.errors import ServiceNotFound, Unavailable
from micro.registry import Node
from micro.testing import eventually
from micro.testing.ports import HOST
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

Ask = Callable[..., Any]
Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = Node(service="greeter", id="greeter-1", address="127.0.0.1:9302")
#: So agents notice sooner that one of them is gone.
GOSSIP = 'gossip_lan { probe_interval = "200ms", probe_timeout = "100ms" }'
#: Seconds until they have, and until one that is back is in the cluster again.
NOTICED = 10.0


class ClientAgent(ConsulServer):
    """An agent of a cluster whose server is another; ``gossips`` is the port of that one."""

    def __init__(self, binary: Path, folder: Path, gossips: int) -> None:
        # With an id it is the same agent, though it may have lost its data.
        super().__init__(binary, folder, hcl=[GOSSIP, f'node_id = "{uuid.uuid4()}"'])
        self._gossips = gossips

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        alone = ("-server", "-bootstrap-expect=1")
        words = [word for word in super().command(data, ports) if word not in alone]
        join = (f"-retry-join={HOST}:{self._gossips}", "-retry-interval=1s")
        return [*words, "-node=client", *join]


@pytest.fixture(scope="module")
def server(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulServer]:
    with ConsulServer(consul_binary, tmp_path_factory.mktemp("server"), hcl=[GOSSIP]) as server:
        yield server


@pytest.fixture(scope="module")
def agent(
    consul_binary: Path, tmp_path_factory: pytest.TempPathFactory, ask: Ask, server: ConsulServer
) -> Iterator[ClientAgent]:
    gossips = ask(server, "GET", "agent/self").said["Member"]["Port"]
    with ClientAgent(consul_binary, tmp_path_factory.mktemp("client"), gossips) as agent:
        yield agent


@pytest.fixture
def namespace() -> str:
    return uuid.uuid4().hex


def held(ask: Ask, agent: ConsulServer) -> list[str]:
    """The ids of what is registered with an agent."""
    return [*ask(agent, "GET", "agent/services").said]


async def read(registry: ConsulRegistry) -> tuple[Node, ...]:
    try:
        return await registry.get(NODE.service)
    except ServiceNotFound:
        return ()


async def gone(registry: ConsulRegistry) -> bool:
    return not await read(registry)


async def heartbeat(registry: ConsulRegistry) -> bool:
    """Whether it arrived."""
    try:
        await registry.register(NODE, ttl=60)
    except Unavailable:
        return False
    return True


@pytest.mark.asyncio
async def test_a_node_of_a_client_agent_is_read_at_the_server_as_soon_as_it_is_registered(
    connected: Connected, ask: Ask, server: ConsulServer, agent: ClientAgent, namespace: str
) -> None:
    async with (
        connected(f"{agent.url}/{namespace}") as registry,
        connected(f"{server.url}/{namespace}") as reader,
    ):
        await registry.register(NODE, ttl=60)
        assert await reader.get("greeter") == (NODE,)
        assert not held(ask, server)
        await registry.deregister(NODE)
        assert await reader.services() == ()


@pytest.mark.asyncio
@pytest.mark.parametrize("keep_data", [True, False])
async def test_when_a_client_agent_is_killed_it_is_unavailable_and_once_it_is_back_has_its_node(
    connected: Connected,
    ask: Ask,
    server: ConsulServer,
    agent: ClientAgent,
    namespace: str,
    keep_data: bool,
) -> None:
    async with (
        connected(f"{agent.url}/{namespace}?timeout=2s") as registry,
        connected(f"{server.url}/{namespace}") as reader,
    ):
        await registry.register(NODE, ttl=60)
        agent.kill()
        with pytest.raises(Unavailable, match="connection refused; does Consul run there"):
            await registry.register(NODE, ttl=60)
        with pytest.raises(Unavailable, match="connection refused; does Consul run there"):
            await registry.get("greeter")
        await eventually(lambda: gone(reader), within=NOTICED)
        await asyncio.to_thread(agent.restart, keep_data=keep_data)
        await eventually(lambda: heartbeat(registry), within=NOTICED)
        assert held(ask, agent) == [f"{namespace}/greeter/greeter-1"]
        assert await eventually(lambda: read(reader), within=NOTICED) == (NODE,)
        await registry.deregister(NODE)


@pytest.mark.asyncio
async def test_a_node_that_moved_to_the_servers_agent_is_one_node_and_leaves_both(
    connected: Connected, server: ConsulServer, agent: ClientAgent, namespace: str
) -> None:
    hosts = f"consul://{agent.address},{server.address}"
    async with connected(f"{hosts}/{namespace}") as registry:
        await registry.register(NODE, ttl=60)
        agent.kill()
        await registry.register(OTHER, ttl=60)
        assert await registry.get("greeter") == (OTHER,)  # the servers have both still
        await asyncio.to_thread(agent.start)
        await registry.deregister(OTHER)
        assert await registry.services() == ()
