"""Calls: which host they go to, how long they may take, and what their errors say."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from micro.backend import Connections
from micro.errors import Closed, ResourceExhausted, TooLarge, Unavailable
from micro.registry import Node
from micro.testing.ports import HOST, unused_ports
from micro.testing.proxy import FaultProxy
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry
from micro_plugin_etcd._channel import Channel

Ask = Callable[..., dict[str, Any]]
Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]
Call = Callable[[EtcdRegistry], Awaitable[object]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
NEW = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0


async def follow(registry: EtcdRegistry) -> object:
    async with aclosing(registry.follow("greeter", None)) as stream:
        return await anext(stream)


CALLS: dict[str, Call] = {
    "register": lambda registry: registry.register(NEW, ttl=60),
    "heartbeat": lambda registry: registry.register(NODE, ttl=60),
    "deregister": lambda registry: registry.deregister(NODE),
    "get": lambda registry: registry.get("greeter"),
    "services": lambda registry: registry.services(),
    "follow": follow,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def path(url: str) -> str:
    """The namespace of a URL."""
    return url.rpartition("/")[2]


# -- time -----------------------------------------------------------------------------------------


@every_call
@pytest.mark.asyncio
async def test_a_call_of_a_paused_server_is_unavailable_in_time(
    connected: Connected, etcd: EtcdServer, etcd_url: str, call: Call
) -> None:
    async with connected(f"{etcd_url}?timeout=500ms") as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(etcd.pause)
        began = time.monotonic()
        try:
            with pytest.raises(Unavailable, match=re.escape(f"{etcd.address}: no answer in 0.5 s")):
                await call(registry)
            assert time.monotonic() - began < 0.5 + SLACK
        finally:
            etcd.resume()


@pytest.mark.asyncio
async def test_what_is_far_away_can_be_reached(
    connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    async with FaultProxy(etcd.address) as proxy:
        proxy.latency(0.2)
        async with connected(f"etcd://{proxy.address}/{path(etcd_url)}") as registry:
            await registry.register(NODE, ttl=60)
            assert await registry.get("greeter") == (NODE,)


# -- closing --------------------------------------------------------------------------------------


@every_call
@pytest.mark.asyncio
async def test_to_close_the_connections_during_a_call_is_closed_and_no_cancellation(
    connected: Connected, etcd: EtcdServer, etcd_url: str, call: Call
) -> None:
    connections = Connections()
    async with connected(etcd_url, connections) as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(etcd.pause)
        try:
            calling = asyncio.ensure_future(call(registry))
            await asyncio.wait([calling], timeout=0.1)
            assert not calling.done()
            await connections.aclose()
            with pytest.raises(Closed):
                async with asyncio.timeout(SLACK):
                    await calling
        finally:
            etcd.resume()


@every_call
@pytest.mark.asyncio
async def test_a_call_that_is_cancelled_is_cancelled(
    connected: Connected, etcd: EtcdServer, etcd_url: str, call: Call
) -> None:
    async with connected(etcd_url) as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(etcd.pause)
        try:
            calling = asyncio.ensure_future(call(registry))
            await asyncio.wait([calling], timeout=0.1)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(SLACK):
                    await calling
        finally:
            etcd.resume()


@every_call
@pytest.mark.asyncio
async def test_a_call_when_the_connections_are_closed_is_closed(
    connected: Connected, etcd_url: str, call: Call
) -> None:
    connections = Connections()
    async with connected(etcd_url, connections) as registry:
        await registry.register(NODE, ttl=60)
        await connections.aclose()
        with pytest.raises(Closed):
            await call(registry)


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_first_host_that_is_dead_is_passed_over(
    connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    (dead,) = unused_ports(1)
    began = time.monotonic()
    url = f"etcd://{HOST}:{dead},{etcd.address}/{path(etcd_url)}"
    async with connected(url) as registry:
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
    assert time.monotonic() - began < SLACK


@pytest.mark.asyncio
async def test_a_first_host_that_says_nothing_costs_its_share_of_the_time_and_once(
    connected: Connected, etcd_binary: Path, tmp_path: Path, etcd: EtcdServer, etcd_url: str
) -> None:
    with EtcdServer(etcd_binary, tmp_path) as silent:
        await asyncio.to_thread(silent.pause)
        began = time.monotonic()
        hosts = f"{silent.address},{etcd.address}"
        async with connected(f"etcd://{hosts}/{path(etcd_url)}?timeout=2s") as registry:
            for _ in range(20):
                await registry.register(NODE, ttl=60)
        assert time.monotonic() - began < 1.0 + SLACK


@pytest.mark.asyncio
async def test_each_host_has_its_share_of_the_time(
    connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    (dead,) = unused_ports(1)
    await asyncio.to_thread(etcd.pause)
    began = time.monotonic()
    try:
        with pytest.raises(Unavailable, match=re.escape(f"{etcd.address}: no answer in 1 s")):
            async with connected(f"etcd://{HOST}:{dead},{etcd.address}?timeout=2s"):
                pass
    finally:
        etcd.resume()
    assert time.monotonic() - began < 2 + SLACK


@pytest.mark.asyncio
async def test_a_host_that_falls_silent_costs_its_share_of_the_time_and_once(
    connected: Connected, etcd_binary: Path, tmp_path: Path, etcd: EtcdServer, etcd_url: str
) -> None:
    (dead,) = unused_ports(1)
    with EtcdServer(etcd_binary, tmp_path) as silent:
        hosts = f"{silent.address},{etcd.address},{HOST}:{dead}"
        async with connected(f"etcd://{hosts}/{path(etcd_url)}?timeout=3s") as registry:
            await registry.register(NODE, ttl=60)
            await asyncio.to_thread(silent.pause)
            began = time.monotonic()
            for _ in range(20):
                await registry.register(NODE, ttl=60)
            assert time.monotonic() - began < 1.0 + SLACK


@pytest.mark.asyncio
async def test_when_no_host_answers_it_is_unavailable_in_time_and_the_text_says_who_and_whose(
    connected: Connected,
) -> None:
    first, second = unused_ports(2)
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        async with connected(f"etcd://{HOST}:{first},localhost:{second}/prod?timeout=2s"):
            pass
    assert time.monotonic() - began < 2 + SLACK
    text = str(caught.value)
    assert text.startswith(f"--registry: etcd://{HOST}:{first},localhost:{second}")
    assert f"localhost:{second}: " in text
    assert "connection refused; does etcd run there?" in text


@pytest.mark.asyncio
async def test_a_host_without_a_port_has_that_of_etcd() -> None:
    channel = Channel("etcd-1", None, "test")
    assert (channel.host, channel.port) == ("etcd-1", 2379)
    await channel.aclose()


# -- who shares a client --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_registries_of_one_url_share_a_client_whatever_their_paths(
    connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    connections = Connections()
    async with (
        connected(etcd_url, connections) as one,
        connected(f"{etcd_url}-2", connections) as two,
        connected(f"{etcd_url}?timeout=9s", connections) as other,
    ):
        assert one._etcd is not None
        assert two._etcd is not None
        assert other._etcd is not None
        assert one._etcd._client is two._etcd._client
        assert one._etcd._client is not other._etcd._client  # it would be as patient as the first
        await one.register(NODE, ttl=60)
        assert await two.services() == ()
    await connections.aclose()


@pytest.mark.asyncio
async def test_a_registry_that_closes_leaves_the_client_to_others(
    connected: Connected, etcd_url: str
) -> None:
    connections = Connections()
    async with connected(etcd_url, connections) as stays:
        async with connected(etcd_url, connections) as closes:
            await closes.register(NODE, ttl=60)
        assert await stays.get("greeter") == (NODE,)
    await connections.aclose()


# -- what a server refuses ------------------------------------------------------------------------


@pytest.fixture
def small(etcd_binary: Path, tmp_path: Path) -> Iterator[EtcdServer]:
    """It takes little, and keeps little."""
    flags = ("--max-request-bytes=20000", f"--quota-backend-bytes={128 * 1024}")
    with EtcdServer(etcd_binary, tmp_path, arguments=flags) as server:
        yield server


@pytest.mark.asyncio
async def test_a_node_over_what_the_server_takes_is_too_large(
    connected: Connected, small: EtcdServer
) -> None:
    async with connected(small.url) as registry:
        with pytest.raises(TooLarge):
            await registry.register(
                msgspec.structs.replace(NODE, metadata={"a": "x" * 40_000}), ttl=60
            )
        await registry.register(NODE, ttl=60)


@pytest.mark.asyncio
async def test_a_server_that_is_full_is_resource_exhausted_and_still_read(
    connected: Connected, small: EtcdServer
) -> None:
    async with connected(small.url) as registry:
        with pytest.raises(ResourceExhausted, match="space"):
            for step in range(100):
                large = msgspec.structs.replace(NODE, metadata={"a": f"{step:8000}"})
                await registry.register(large, ttl=60)
        assert len(await registry.get("greeter")) == 1
