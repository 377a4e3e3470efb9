"""Streams of changes: what they believe, how many queries they cost, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import pytest
from aiohttp import web

from micro.backend import Connections
from micro.errors import Closed, Unavailable
from micro.registry import Change, Node, Snapshot
from micro.testing import eventually
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

Ask = Callable[..., Any]
Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]
Item = Snapshot | Change | None

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0


@asynccontextmanager
async def listening(
    registry: ConsulRegistry, service: str | None = "greeter"
) -> AsyncIterator[list[Item]]:
    """What a stream tells, within."""
    told: list[Item] = []
    task = asyncio.create_task(_listen(registry, service, told))
    try:
        await eventually(lambda: told)
        yield told
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def has_check(ask: Ask, consul: ConsulServer, id: str) -> bool:
    return id in {check["CheckID"] for check in ask(consul, "GET", "health/state/any").said}


async def _has(told: list[Item], count: int) -> None:
    await eventually(lambda: len(told) >= count, within=1 + SLACK)


async def _listen(registry: ConsulRegistry, service: str | None, told: list[Item]) -> None:
    async with aclosing(registry.follow(service, None)) as stream:
        async for _, item in stream:
            told.append(item)


# -- what is believed -----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_an_empty_answer_is_not_believed_until_a_consistent_read_says_the_same(
    connected: Connected, registry: ConsulRegistry, between: Any, consul_url: str
) -> None:
    path = consul_url.rpartition("/")[2]
    lies = 0

    def forgets(request: web.Request) -> web.Response | None:
        """As a server that has just come back."""
        nonlocal lies
        if "index" not in request.query or lies == 3:
            return None
        lies += 1
        headers = {"X-Consul-Index": str(10**6 + lies)}
        return web.json_response([], headers=headers)

    await registry.register(NODE, ttl=60)
    async with connected(f"consul://{between.address}/{path}") as behind:
        between.instead = forgets
        async with listening(behind) as told:
            await eventually(lambda: lies == 3)
            await registry.register(OTHER, ttl=60)
            await eventually(lambda: len(told) == 2, within=10)
    assert told == [Snapshot(nodes=(NODE,)), Change(kind="create", node=OTHER)]


@pytest.mark.asyncio
@pytest.mark.parametrize("service", ["greeter", None])
async def test_an_answer_without_an_index_ends_a_stream_and_is_not_asked_again_and_again(
    connected: Connected, between: Any, service: str | None
) -> None:
    empty: dict[str, object] = {"/v1/catalog/services": {}}
    async with connected(f"consul://{between.address}") as behind:
        between.instead = lambda request: web.json_response(empty.get(request.path, []))
        async with aclosing(behind.follow(service, None)) as stream:
            await anext(stream)
            with pytest.raises(Unavailable, match="does a proxy take that away"):
                async with asyncio.timeout(SLACK):
                    await anext(stream)


@pytest.mark.asyncio
async def test_an_empty_answer_that_is_true_is_told(registry: ConsulRegistry) -> None:
    await registry.register(NODE, ttl=60)
    async with listening(registry) as told:
        await registry.deregister(NODE)
        await eventually(lambda: told[1:] == [Change(kind="delete", node=NODE)])


@pytest.mark.asyncio
async def test_a_service_without_nodes_costs_no_more_than_its_query(
    connected: Connected, between: Any, consul_url: str
) -> None:
    path = consul_url.rpartition("/")[2]
    async with connected(f"consul://{between.address}/{path}") as behind:
        async with listening(behind) as told:
            await eventually(lambda: sum("index" in asked for asked in between.asked) == 2)
            plain = [asked for asked in between.asked if "greeter?consistent" in asked]
            assert (told, len(plain)) == ([Snapshot(nodes=())], 1)


@pytest.mark.asyncio
async def test_a_heartbeat_that_an_old_version_answers_by_500_is_registered_again(
    connected: Connected, between: Any, consul_url: str
) -> None:
    path = consul_url.rpartition("/")[2]

    def old(request: web.Request) -> web.Response | None:
        return web.Response(status=500) if "/check/pass/" in request.path else None

    async with connected(f"consul://{between.address}/{path}") as behind:
        await behind.register(NODE, ttl=60)
        between.instead = old
        between.asked.clear()
        await behind.register(NODE, ttl=60)
        assert [asked for asked in between.asked if asked.endswith("/service/register")]
        assert await behind.get("greeter") == (NODE,)


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [500, 503])
async def test_a_server_without_a_leader_is_unavailable(
    connected: Connected, between: Any, status: int
) -> None:
    async with connected(f"consul://{between.address}") as behind:
        between.instead = lambda _: web.Response(status=status, text="No cluster leader")
        calls: list[Awaitable[object]] = [
            behind.get("greeter"),
            behind.services(),
            behind.register(NODE, ttl=60),
            behind.deregister(NODE),
            anext(behind.follow("greeter", None)),
            anext(behind.follow(None, None)),
        ]
        for call in calls:
            with pytest.raises(Unavailable, match="No cluster leader"):
                await call


@pytest.mark.asyncio
async def test_what_is_not_consul_is_told(connected: Connected, between: Any) -> None:
    between.instead = lambda _: web.Response(text="<html>It works!</html>")
    with pytest.raises(Unavailable, match="not an answer of Consul"):
        async with connected(f"consul://{between.address}"):
            pass


# -- all services ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_follows_all_is_told_of_an_address_alone_that_others_change(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    def put(port: int, **said: object) -> None:
        body = {"Name": f"{prefix}foreign", "ID": "foreign", "Address": "10.0.0.1", "Port": port}
        ask(consul, "PUT", "agent/service/register", body={**body, **said})

    for said in ({}, {"Check": {"TTL": "60s", "Status": "passing"}}):  # as Go's, and as nobody's
        put(1, **said)
        async with listening(registry, None) as told:
            for port in (2, 3):
                put(port, **said)
                await _has(told, port)
        addresses = [item.node.address for item in told if isinstance(item, Change)]
        assert addresses == ["10.0.0.1:2", "10.0.0.1:3"]
        ask(consul, "PUT", "agent/service/deregister/foreign")


@pytest.mark.asyncio
async def test_who_follows_all_is_told_of_what_others_change_of_what_came_after_it_began(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    async with listening(registry, None) as told:
        for port in (1, 2):
            body = {"Name": f"{prefix}foreign", "ID": "foreign", "Address": "10.0.0.1"}
            ask(consul, "PUT", "agent/service/register", body={**body, "Port": port})
            await _has(told, 1 + port)
    addresses = [item.node.address for item in told if isinstance(item, Change)]
    assert addresses == ["10.0.0.1:1", "10.0.0.1:2"]
    ask(consul, "PUT", "agent/service/deregister/foreign")


@pytest.mark.asyncio
async def test_who_follows_all_is_told_when_the_older_check_of_an_agent_is_taken_away(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry
) -> None:
    await registry.register(NODE, ttl=60)
    for id_, status in (("disk", "critical"), ("load", "passing")):
        body = {"Name": id_, "ID": id_, "TTL": "60s", "Status": status}
        ask(consul, "PUT", "agent/check/register", body=body)
        await eventually(partial(has_check, ask, consul, id_))
    async with listening(registry, None) as told:
        ask(consul, "PUT", "agent/check/deregister/disk")
        await _has(told, 2)
    assert told == [Snapshot(nodes=()), Change(kind="create", node=NODE)]
    ask(consul, "PUT", "agent/check/deregister/load")


@pytest.mark.asyncio
async def test_who_follows_all_is_told_of_each_change_and_of_nothing_else(
    registry: ConsulRegistry, connected: Connected, consul: ConsulServer
) -> None:
    elsewhere = msgspec.structs.replace(NODE, service="elsewhere")
    moved = msgspec.structs.replace(NODE, address="127.0.0.1:1")
    async with listening(registry, None) as told, connected(f"{consul.url}/other") as other:
        await other.register(elsewhere, ttl=60)
        for count, node in enumerate((NODE, moved, OTHER), 2):
            await registry.register(node, ttl=60)
            await _has(told, count)
        await registry.deregister(OTHER)
        await _has(told, 5)
        await other.deregister(elsewhere)
    assert told == [
        Snapshot(nodes=()),
        Change(kind="create", node=NODE),
        Change(kind="update", node=moved),
        Change(kind="create", node=OTHER),
        Change(kind="delete", node=OTHER),
    ]


@pytest.mark.asyncio
async def test_all_who_follow_all_share_two_queries(
    connected: Connected, between: Any, consul_url: str
) -> None:
    path = consul_url.rpartition("/")[2]
    async with connected(f"consul://{between.address}/{path}") as behind:
        async with listening(behind, None), listening(behind, None), listening(behind, None):
            await eventually(lambda: sum("index" in asked for asked in between.asked) >= 2)
            began = [asked for asked in between.asked if "index" in asked]
            assert len(began) == 2
            await behind.register(NODE, ttl=60)
    assert not [task for task in asyncio.all_tasks() if "consul" in task.get_name()]


# -- how a stream ends ----------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("service", ["greeter", None])
async def test_a_killed_server_ends_a_stream_as_unavailable(
    consul: ConsulServer, registry: ConsulRegistry, service: str | None
) -> None:
    async with aclosing(registry.follow(service, None)) as stream:
        await anext(stream)
        following = asyncio.ensure_future(anext(stream))
        await asyncio.wait([following], timeout=0.1)
        await asyncio.to_thread(consul.kill)
        with pytest.raises(Unavailable):
            async with asyncio.timeout(SLACK):
                await following


@pytest.mark.asyncio
async def test_a_paused_server_ends_a_stream_of_all_as_unavailable(
    consul: ConsulServer, registry: ConsulRegistry
) -> None:
    async with aclosing(registry.follow(None, None)) as stream:
        await anext(stream)
        following = asyncio.ensure_future(anext(stream))
        await asyncio.wait([following], timeout=0.1)
        await asyncio.to_thread(consul.pause)
        try:
            with pytest.raises(Unavailable):
                async with asyncio.timeout(4.5 + SLACK):
                    await following
        finally:
            consul.resume()


@pytest.mark.asyncio
@pytest.mark.parametrize("service", ["greeter", None])
async def test_to_close_the_connections_during_a_stream_is_closed_and_no_cancellation(
    connected: Connected, consul_url: str, service: str | None
) -> None:
    connections = Connections()
    async with connected(consul_url, connections) as registry:
        async with aclosing(registry.follow(service, None)) as stream:
            await anext(stream)
            following = asyncio.ensure_future(anext(stream))
            await asyncio.wait([following], timeout=0.1)
            await connections.aclose()
            with pytest.raises(Closed):
                async with asyncio.timeout(SLACK):
                    await following


@pytest.mark.asyncio
@pytest.mark.parametrize("service", ["greeter", None])
async def test_to_close_a_registry_ends_its_streams_and_not_those_of_others(
    connected: Connected, consul_url: str, service: str | None
) -> None:
    connections = Connections()
    async with connected(consul_url, connections) as stays, listening(stays, service) as told:
        async with connected(consul_url, connections) as closes:
            async with aclosing(closes.follow(service, None)) as stream:
                await anext(stream)
                following = asyncio.ensure_future(anext(stream))
                await asyncio.wait([following], timeout=0.1)
                await closes.aclose()
                with pytest.raises(Closed):
                    async with asyncio.timeout(SLACK):
                        await following
        await stays.register(NODE, ttl=60)
        await eventually(lambda: told[1:] == [Change(kind="create", node=NODE)])
    await connections.aclose()
