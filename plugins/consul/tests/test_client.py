"""Calls: which host they go to, how long they may take, and what their errors say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from micro.registry import Node
from micro.testing.proxy import FaultProxy
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
#: Seconds that a busy machine gets.
SLACK = 2.0


def path(url: str) -> str:
    """The namespace of a URL."""
    return url.rpartition("/")[2]


@pytest.mark.asyncio
async def test_calls_that_wait_for_their_turn_wait_as_long_as_the_server_answers(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    async with FaultProxy(consul.address) as proxy:
        url = f"consul://{proxy.address}/{path(consul_url)}?timeout=500ms"
        async with connected(url) as registry:
            await registry.register(NODE, ttl=60)
            proxy.latency(0.1)
            began = time.monotonic()
            found = await asyncio.gather(*(registry.get("greeter") for _ in range(40)))
            assert time.monotonic() - began > 0.5  # eight at a time, 0.2 s each
            assert found == [(NODE,)] * 40


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_host_that_falls_silent_costs_its_share_of_the_time_and_once(
    connected: Connected, consul_binary: Path, tmp_path: Path, consul: ConsulServer, consul_url: str
) -> None:
    with ConsulServer(consul_binary, tmp_path) as silent:
        hosts = f"{silent.address},{consul.address}"
        async with connected(f"consul://{hosts}/{path(consul_url)}?timeout=2s") as registry:
            await registry.register(NODE, ttl=60)
            await asyncio.to_thread(silent.pause)
            began = time.monotonic()
            for _ in range(20):
                await registry.register(NODE, ttl=60)  # the other agent does not know it
            assert time.monotonic() - began < 1.0 + SLACK
            assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_a_node_leaves_every_host_that_it_may_be_registered_at(
    connected: Connected, consul_binary: Path, tmp_path: Path, consul: ConsulServer, consul_url: str
) -> None:
    there = f"consul://{consul.address}/{path(consul_url)}"
    with ConsulServer(consul_binary, tmp_path) as first:
        hosts = f"{first.address},{consul.address}"
        async with (
            connected(f"consul://{hosts}/{path(consul_url)}") as registry,
            connected(there) as other,
        ):
            await registry.register(NODE, ttl=60)
            await other.register(NODE, ttl=60)  # as a failover leaves it
            await registry.deregister(NODE)
            assert await registry.services() == ()
            assert await other.services() == ()
