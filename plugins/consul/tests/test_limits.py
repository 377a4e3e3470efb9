"""An agent takes 200 connections from one address: all programs of a host share them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from http.client import HTTPConnection as Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from micro.errors import Unavailable
from micro.follow import View
from micro.registry import Node
from micro.testing import eventually
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry
from micro_plugin_consul._client import Client

Ask = Callable[..., Any]
Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
LIMIT = 200
#: What one program opens at most, whatever it watches.
OURS = 34
#: Seconds that a busy machine gets.
SLACK = 2.0


@contextmanager
def crowd(server: ConsulServer, count: int = LIMIT) -> Iterator[list[Connection]]:
    """Others, who hold so many connections, or as many as the server takes."""
    with ExitStack() as stack:
        others: list[Connection] = []
        for _ in range(count):
            other = Connection("127.0.0.1", server.port, timeout=5)
            stack.callback(other.close)
            if status(other) == 429:
                break
            others.append(other)
        yield others


def connections(server: ConsulServer) -> int:
    """How many there are, to the port for clients."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    port = f":{server.port:04X}"
    return sum(field[2].endswith(port) and field[3] == "01" for field in fields)


def status(other: Connection) -> int:
    other.request("GET", "/v1/status/leader")
    answer = other.getresponse()
    answer.read()
    return answer.status


def client(registry: ConsulRegistry) -> Client:
    assert registry._consul is not None
    return registry._consul.client


@asynccontextmanager
async def views(registry: ConsulRegistry, services: list[str]) -> AsyncIterator[list[View]]:
    made = [View(registry, service, ttl=30) for service in services]
    try:
        await asyncio.gather(*(view.entered() for view in made))
        yield made
    finally:
        await asyncio.gather(*(view.aclose() for view in made))


def test_the_limit_is_in_force(consul: ConsulServer, consul_url: str) -> None:
    with crowd(consul) as others:
        assert LIMIT - 5 <= len(others) <= LIMIT
        with crowd(consul, 1) as late:
            assert not late
        assert {status(other) for other in others} == {200}  # who was there before is served


@pytest.mark.asyncio
async def test_heartbeats_go_on_while_others_hold_all_connections(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    async with connected(f"{consul_url}?timeout=500ms") as registry:
        await registry.register(NODE, ttl=60)
        await eventually(lambda: connections(consul) == 1, within=10)  # that of its heartbeats
        with crowd(consul):
            for _ in range(10):
                await registry.register(NODE, ttl=60)
            await registry.register(msgspec.structs.replace(NODE, version="2"), ttl=60)
            with pytest.raises(Unavailable, match=r"limits\.http_max_conns_per_client"):
                await registry.get("greeter")
        await eventually(lambda: gets(registry))


async def gets(registry: ConsulRegistry) -> bool:
    try:
        return bool(await registry.get("greeter"))
    except Unavailable:
        return False


@pytest.mark.asyncio
async def test_a_429_is_asked_again_for_as_long_as_a_call_may_take(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    async with connected(consul_url) as registry:
        await registry.register(NODE, ttl=60)
        await eventually(lambda: connections(consul) == 1, within=10)
        with crowd(consul):
            getting = asyncio.create_task(registry.get("greeter"))
            await asyncio.wait([getting], timeout=0.3)
            assert not getting.done()
        assert await getting == (NODE,)


@pytest.mark.asyncio
async def test_after_a_429_most_watches_are_shed_and_all_go_on(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    nodes = [msgspec.structs.replace(NODE, service=f"greeter-{n}") for n in range(12)]
    async with connected(consul_url) as registry, connected(consul_url) as other:
        for node in nodes:
            await other.register(node, ttl=60)
        async with views(registry, [node.service for node in nodes]) as watched:
            await eventually(lambda: client(registry).watches._open == len(nodes))
            client(registry).watches.shed()
            await eventually(lambda: client(registry).watches._open == 2, within=4 + SLACK)
            await eventually(lambda: connections(consul) <= 2 + 2 + 4, within=4 + SLACK)
            changed = [msgspec.structs.replace(node, version="2") for node in nodes]
            for node in changed:
                await other.register(node, ttl=60)
            await eventually(
                lambda: [view.nodes for view in watched] == [(node,) for node in changed],
                within=1 + SLACK,
            )


@pytest.mark.asyncio
async def test_300_services_are_watched_by_one_process_and_heartbeats_never_see_a_429(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    nodes = [msgspec.structs.replace(NODE, service=f"greeter-{n}") for n in range(300)]
    async with connected(consul_url) as registry, connected(consul_url) as other:
        await asyncio.gather(*(other.register(node, ttl=60) for node in nodes))
        shed: list[None] = []
        client(registry).watches.shed = lambda: shed.append(None)  # type: ignore[method-assign] # it counts
        async with views(registry, [node.service for node in nodes]) as watched:
            assert [view.nodes for view in watched] == [(node,) for node in nodes]
            assert client(registry).watches._open == 16  # all others share two queries
            # So many are left to the other programs of this host, and they take them.
            with crowd(consul, LIMIT - 2 * OURS) as others:
                until = time.monotonic() + 4  # longer than a query waits
                while time.monotonic() < until:
                    began = time.monotonic()
                    await registry.register(NODE, ttl=60)
                    assert time.monotonic() - began < SLACK
                    await asyncio.sleep(0.1)
                changed = [msgspec.structs.replace(node, version="2") for node in nodes[::30]]
                for node in changed:
                    await other.register(node, ttl=60)
                seen = watched[::30]
                await eventually(
                    lambda: [view.nodes for view in seen] == [(node,) for node in changed],
                    within=3 + SLACK,
                )
                assert all(status(each) == 200 for each in others)
                assert connections(consul) - len(others) <= 2 * OURS
            assert {view.state for view in watched} == {"live"}
        assert shed == []
