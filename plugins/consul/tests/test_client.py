"""Calls: which host they go to, how long they may take, and what their errors say."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path

import msgspec
import pytest

from micro.backend import Connections
from micro.errors import Closed, Unavailable
from micro.registry import Node
from micro.testing.ports import HOST, unused_ports
from micro.testing.proxy import FaultProxy
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]
Call = Callable[[ConsulRegistry], Awaitable[object]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
NEW = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0


async def follow(registry: ConsulRegistry) -> object:
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
    connected: Connected, consul: ConsulServer, consul_url: str, call: Call
) -> None:
    async with connected(f"{consul_url}?timeout=500ms") as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(consul.pause)
        began = time.monotonic()
        try:
            with pytest.raises(Unavailable, match=r"no answer in 0\.5 s"):
                await call(registry)
            assert time.monotonic() - began < 0.5 + SLACK
        finally:
            consul.resume()


@pytest.mark.asyncio
async def test_many_calls_of_a_paused_server_all_end_in_time(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    async with connected(f"{consul_url}?timeout=500ms") as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(consul.pause)
        began = time.monotonic()
        try:
            calls = [call(registry) for call in CALLS.values() for _ in range(20)]
            told = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(one) for one in told} == {Unavailable}
            assert time.monotonic() - began < 2 * 0.5 + SLACK
        finally:
            consul.resume()


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


# -- closing --------------------------------------------------------------------------------------


@every_call
@pytest.mark.asyncio
async def test_to_close_the_connections_during_a_call_is_closed_and_no_cancellation(
    connected: Connected, consul: ConsulServer, consul_url: str, call: Call
) -> None:
    connections = Connections()
    async with connected(consul_url, connections) as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(consul.pause)
        try:
            calling = asyncio.ensure_future(call(registry))
            await asyncio.wait([calling], timeout=0.1)
            assert not calling.done()
            await connections.aclose()
            with pytest.raises(Closed):
                async with asyncio.timeout(SLACK):
                    await calling
        finally:
            consul.resume()


@every_call
@pytest.mark.asyncio
async def test_a_call_that_is_cancelled_is_cancelled(
    connected: Connected, consul: ConsulServer, consul_url: str, call: Call
) -> None:
    async with connected(consul_url) as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(consul.pause)
        try:
            calling = asyncio.ensure_future(call(registry))
            await asyncio.wait([calling], timeout=0.1)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                async with asyncio.timeout(SLACK):
                    await calling
        finally:
            consul.resume()


@every_call
@pytest.mark.asyncio
async def test_a_call_when_the_connections_are_closed_is_closed(
    connected: Connected, consul_url: str, call: Call
) -> None:
    connections = Connections()
    async with connected(consul_url, connections) as registry:
        await registry.register(NODE, ttl=60)
        await connections.aclose()
        with pytest.raises(Closed):
            await call(registry)


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_first_host_that_is_dead_is_passed_over(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    (dead,) = unused_ports(1)
    began = time.monotonic()
    url = f"consul://{HOST}:{dead},{consul.address}/{path(consul_url)}"
    async with connected(url) as registry:
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
        await registry.deregister(NODE)
        assert await registry.services() == ()
    assert time.monotonic() - began < SLACK


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


@pytest.mark.asyncio
async def test_when_no_host_answers_it_is_unavailable_in_time_and_the_text_says_who_and_whose(
    connected: Connected,
) -> None:
    first, second = unused_ports(2)
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        async with connected(f"consul://{HOST}:{first},localhost:{second}/prod?timeout=2s"):
            pass
    assert time.monotonic() - began < 2 + SLACK
    text = str(caught.value)
    assert text.startswith(f"--registry: consul://{HOST}:{first},localhost:{second}")
    assert re.search(f"localhost:{second}: .*does Consul run there", text)


# -- who shares a client --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_registries_of_one_url_share_a_client_whatever_their_paths(
    connected: Connected, consul_url: str
) -> None:
    connections = Connections()
    async with (
        connected(consul_url, connections) as one,
        connected(f"{consul_url}-2", connections) as two,
        connected(f"{consul_url}?timeout=9s", connections) as other,
    ):
        assert one._consul is not None
        assert two._consul is not None
        assert other._consul is not None
        assert one._consul.client is two._consul.client
        assert one._consul.client is not other._consul.client
        await one.register(NODE, ttl=60)
        assert await two.services() == ()
    await connections.aclose()
