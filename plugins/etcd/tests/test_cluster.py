"""Three servers that are one: a host that dies is replaced, and without a quorum nobody answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing
from pathlib import Path

import msgspec
import pytest

from micro.errors import Unavailable
from micro.follow import View
from micro.registry import Node, Snapshot
from micro.testing import eventually
from micro.testing.ports import HOST, unused_ports
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry

Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0
#: Seconds in which a cluster that has lost its leader has another.
ELECTION = 0.5


@pytest.fixture(scope="module")
def members(
    etcd_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[EtcdServer]]:
    folder = tmp_path_factory.mktemp("cluster")
    peers = {f"m{n}": f"http://{HOST}:{port}" for n, port in enumerate(unused_ports(3))}
    together = ",".join(f"{name}={peer}" for name, peer in peers.items())
    flags = (f"--initial-cluster={together}", "--heartbeat-interval=50", "--election-timeout=500")
    members = [
        EtcdServer(
            etcd_binary,
            folder / name,
            arguments=(
                *flags,
                f"--name={name}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
            ),
        )
        for name, peer in peers.items()
    ]
    with ExitStack() as stack:
        for member in members:
            stack.callback(member.kill)
        start(members)
        yield members


@pytest.fixture
def cluster(members: list[EtcdServer]) -> list[EtcdServer]:
    """All of them answer."""
    start(members)
    return members


def start(members: list[EtcdServer]) -> None:
    """None answers before there are two."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(EtcdServer.start, members))


def url(members: list[EtcdServer]) -> str:
    return f"etcd://{','.join(member.address for member in members)}"


async def kill(members: list[EtcdServer]) -> None:
    for member in members:
        await asyncio.to_thread(member.kill)


@pytest.mark.asyncio
async def test_a_watch_moves_to_another_host_when_its_own_dies(
    connected: Connected, cluster: list[EtcdServer]
) -> None:
    first, *others = cluster
    async with connected(url(cluster)) as registry, connected(url(others)) as other:
        await registry.register(NODE, ttl=60)
        view = View(registry, "greeter", ttl=60)
        async with view.watch() as watch:
            assert list(watch.nodes) == [NODE]
            await kill([first])
            await eventually(lambda: registers(other, OTHER), within=ELECTION * 4 + SLACK)
            await eventually(lambda: list(watch.nodes) == [NODE, OTHER], within=5 + SLACK)
            assert watch.state == "live"
        await view.aclose()
        await other.deregister(OTHER)


@pytest.mark.asyncio
async def test_a_watch_goes_on_at_another_host_at_once_when_its_own_falls_silent(
    connected: Connected, cluster: list[EtcdServer]
) -> None:
    async with connected(f"{url(cluster)}?timeout=30s") as registry:
        await registry.register(NODE, ttl=60)
        async with aclosing(registry.follow("greeter", None)) as stream:
            mark, item = await anext(stream)
            assert item == Snapshot(nodes=(NODE,))
            await asyncio.to_thread(cluster[0].pause)
            with pytest.raises(Unavailable):
                async with asyncio.timeout(4.0 + SLACK):
                    await anext(stream)
        began = time.monotonic()
        async with aclosing(registry.follow("greeter", mark)) as stream:
            assert await anext(stream) == (mark, None)
        assert time.monotonic() - began < SLACK


@pytest.mark.asyncio
async def test_calls_go_on_when_a_host_dies(
    connected: Connected, cluster: list[EtcdServer]
) -> None:
    async with connected(url(cluster)) as registry:
        await registry.register(NODE, ttl=60)
        await kill(cluster[:1])
        # The one that has died may have been the leader: the others then need time to agree.
        await eventually(lambda: registers(registry, NODE), within=ELECTION * 4 + SLACK)
        assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_without_a_quorum_nothing_is_told_as_empty(
    connected: Connected, cluster: list[EtcdServer]
) -> None:
    last, *others = cluster
    told: list[object] = []

    async def listen() -> None:
        async with aclosing(registry.follow("greeter", None)) as stream:
            async for _, item in stream:
                told.append(item)

    async with connected(f"{url([last])}?timeout=2s") as registry:
        await registry.register(NODE, ttl=60)
        listening = asyncio.create_task(listen())
        await eventually(lambda: told)
        await kill(others)
        with pytest.raises(Unavailable):
            # Three elections until the server says that there is no leader, and one before.
            async with asyncio.timeout(4 * ELECTION + SLACK):
                await listening
        for call in (registry.get("greeter"), registry.services(), registry.deregister(OTHER)):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await call
            assert time.monotonic() - began < 2 + SLACK
        start(cluster)
        await eventually(lambda: registers(registry, OTHER), within=5 + SLACK)
        assert await registry.get("greeter") == (NODE, OTHER)
    assert told == [Snapshot(nodes=(NODE,))]


async def registers(registry: EtcdRegistry, node: Node) -> bool:
    try:
        await registry.register(node, ttl=60)
    except Unavailable:
        return False
    return True
