"""What Consul does, as far as the registry stands on it: checks, heartbeats, restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import msgspec
import pytest

from micro.errors import InvalidArgument, ServiceNotFound, Unavailable
from micro.registry import Change, Node, Snapshot
from micro.testing import eventually
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry, _own

Ask = Callable[..., Any]
Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, address="127.0.0.1:9302")
#: Seconds that a busy machine gets.
SLACK = 2.0


def checks(ask: Ask, consul: ConsulServer, prefix: str) -> list[dict[str, Any]]:
    """Those of the instances that the catalog has of the service."""
    entries = ask(consul, "GET", f"health/service/{prefix}greeter").said
    return [check for entry in entries for check in entry["Checks"] if check["ServiceID"]]


def index(ask: Ask, consul: ConsulServer, prefix: str) -> str:
    headers: dict[str, str] = ask(consul, "GET", f"health/service/{prefix}greeter").headers
    return headers["X-Consul-Index"]


async def found(registry: ConsulRegistry) -> list[Node]:
    try:
        return list(await registry.get("greeter"))
    except ServiceNotFound:
        return []


# -- checks that live by heartbeats ---------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_node_is_passing_from_its_first_moment(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    async with aclosing(registry.follow("greeter", None)) as stream, asyncio.timeout(SLACK):
        assert (await anext(stream))[1] == Snapshot(nodes=())
        await registry.register(NODE, ttl=60)
        assert (await anext(stream))[1] == Change(kind="create", node=NODE)
        await registry.register(OTHER, ttl=60)
        assert (await anext(stream))[1] == Change(kind="update", node=OTHER)  # and no delete
    (check,) = checks(ask, consul, prefix)
    assert (check["Status"], check["Type"]) == ("passing", "ttl")


@pytest.mark.asyncio
async def test_a_heartbeat_changes_nothing_for_anybody(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    await registry.register(NODE, ttl=60)
    before = index(ask, consul, prefix)
    for _ in range(5):
        await registry.register(NODE, ttl=60)
    assert index(ask, consul, prefix) == before


@pytest.mark.asyncio
async def test_a_heartbeat_is_one_request_and_a_changed_node_is_registered_again(
    connected: Connected, between: Any, consul_url: str, prefix: str
) -> None:
    heartbeat = [f"PUT agent/check/pass/service:{prefix}greeter/greeter-1"]
    anew = ["PUT agent/service/register", *heartbeat]
    read = [f"GET health/service/{prefix}greeter"]
    async with connected(f"consul://{between.address}/{prefix}") as registry:
        for node, ttl, requests in (
            (NODE, 60, [*anew, *read]),
            (NODE, 60, heartbeat),
            (OTHER, 60, [*anew, *read]),
            (OTHER, 30, [*anew, *read]),
            (OTHER, 30, heartbeat),
        ):
            between.asked.clear()
            await registry.register(node, ttl=ttl)
            assert said(between)[: len(requests)] == requests
            more = set(said(between)[len(requests) :])
            assert more <= set(read if requests != heartbeat else [])  # until the servers have it


def said(between: Any) -> list[str]:
    """Method and path of each request."""
    return [asked.partition("?")[0].replace("/v1/", "") for asked in between.asked]


@pytest.mark.asyncio
async def test_a_node_whose_time_is_over_is_critical_and_a_heartbeat_heals_it(
    ask: Ask, settled: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    await registry.register(NODE, ttl=1)
    created = checks(ask, settled, prefix)[0]["CreateIndex"]
    await eventually(lambda: checks(ask, settled, prefix)[0]["Status"] == "critical", within=4)
    assert await found(registry) == []
    assert await registry.services() == ()
    await registry.register(NODE, ttl=1)
    (check,) = checks(ask, settled, prefix)
    assert (check["Status"], check["CreateIndex"]) == ("passing", created)
    assert await registry.services() == ("greeter",)


@pytest.mark.asyncio
async def test_what_is_not_there_to_pass_any_more_is_registered_again_at_once(
    ask: Ask,
    connected: Connected,
    consul: ConsulServer,
    between: Any,
    prefix: str,
) -> None:
    async with connected(f"consul://{between.address}/{prefix}") as registry:
        await registry.register(NODE, ttl=60)
        path = f"agent/service/deregister/{prefix}greeter/greeter-1"
        assert ask(consul, "PUT", path).status == 200
        await eventually(lambda: not checks(ask, consul, prefix))
        between.asked.clear()
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
        passed = f"PUT agent/check/pass/service:{prefix}greeter/greeter-1"
        assert said(between)[:3] == [passed, "PUT agent/service/register", passed]
        assert not [asked for asked in said(between) if "deregister" in asked]


@pytest.mark.asyncio
async def test_what_somebody_took_out_of_the_catalog_is_back_once_a_heartbeat_looks(
    ask: Ask,
    connected: Connected,
    consul: ConsulServer,
    between: Any,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_own, "_SHOWN", 0.0)  # which it does each 30 s
    async with connected(f"consul://{between.address}/{prefix}") as registry:
        await registry.register(NODE, ttl=60)
        body = {"Node": "test", "ServiceID": f"{prefix}greeter/greeter-1"}
        again = f"PUT agent/service/deregister/{prefix}greeter/greeter-1"

        async def is_repaired() -> bool:
            assert ask(consul, "PUT", "catalog/deregister", body=body).status == 200
            await registry.register(NODE, ttl=60)
            assert await registry.get("greeter") == (NODE,)
            # To register it again would change nothing: the agent thinks that all is well. It may
            # have been telling its servers of the first time still, and then has repaired it.
            return again in said(between)

        await eventually(is_repaired)


@pytest.mark.asyncio
async def test_a_heartbeat_that_is_late_looks_whether_the_servers_have_the_node(
    connected: Connected, between: Any, prefix: str
) -> None:
    async with connected(f"consul://{between.address}/{prefix}") as registry:
        await registry.register(NODE, ttl=1)
        await asyncio.sleep(0.6)
        between.asked.clear()
        await registry.register(NODE, ttl=1)
        assert f"GET health/service/{prefix}greeter" in said(between)


@pytest.mark.asyncio
async def test_a_warning_is_a_node_and_a_maintenance_is_none(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    await registry.register(NODE, ttl=60)
    ask(consul, "PUT", f"agent/check/warn/service:{prefix}greeter/greeter-1")
    await eventually(lambda: checks(ask, consul, prefix)[0]["Status"] == "warning")
    assert await registry.get("greeter") == (NODE,)
    assert await registry.services() == ("greeter",)
    path = f"agent/service/maintenance/{prefix}greeter/greeter-1?enable="
    assert ask(consul, "PUT", f"{path}true").status == 200
    await eventually(lambda: is_gone(registry))
    assert await registry.services() == ()


async def is_gone(registry: ConsulRegistry) -> bool:
    return await found(registry) == []


@pytest.mark.asyncio
async def test_an_instance_without_a_check_is_a_node(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    body = {"Name": f"{prefix}greeter", "ID": "foreign", "Address": "10.0.0.1", "Port": 5432}
    ask(consul, "PUT", "agent/service/register", body=body)
    await eventually(lambda: found(registry))
    ((node,), services) = await found(registry), await registry.services()
    assert (node.id, node.address, node.version) == ("foreign", "10.0.0.1:5432", "")
    assert services == ("greeter",)
    ask(consul, "PUT", "agent/service/deregister/foreign")


@pytest.mark.asyncio
async def test_nodes_of_one_id_are_one_of_each_service(registry: ConsulRegistry) -> None:
    nodes = [msgspec.structs.replace(NODE, service=name) for name in ("a", "A", "a.b", "b")]
    for node in nodes:
        await registry.register(node, ttl=60)
    for node in nodes:
        assert await registry.get(node.service) == (node,)
    await registry.deregister(nodes[0])
    assert await registry.services() == ("A", "a.b", "b")


@pytest.mark.asyncio
async def test_an_address_that_consul_refuses_is_told_as_such(registry: ConsulRegistry) -> None:
    with pytest.raises(InvalidArgument, match="Invalid service address"):
        await registry.register(msgspec.structs.replace(NODE, address="0.0.0.0:80"), ttl=60)


@pytest.mark.asyncio
async def test_a_time_to_live_may_be_as_long_as_any(registry: ConsulRegistry) -> None:
    await registry.register(NODE, ttl=1e12)
    assert await registry.get("greeter") == (NODE,)


# -- restarts -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_killed_server_keeps_what_was_registered_and_a_heartbeat_is_enough(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    await registry.register(NODE, ttl=60)
    await asyncio.to_thread(consul.restart)
    await eventually(lambda: checks(ask, consul, prefix))
    (check,) = checks(ask, consul, prefix)
    assert check["Status"] == "passing"
    await registry.register(NODE, ttl=60)
    assert checks(ask, consul, prefix)[0]["CreateIndex"] == check["CreateIndex"]


@pytest.mark.asyncio
async def test_each_call_of_a_server_that_starts_slowly_ends_in_time(
    connected: Connected, consul: ConsulServer, consul_url: str
) -> None:
    async with connected(f"{consul_url}?timeout=300ms") as registry:
        await registry.register(NODE, ttl=60)
        consul.kill()
        starting = asyncio.create_task(asyncio.to_thread(consul.start))
        texts: set[str] = set()
        async with asyncio.timeout(30):
            while not starting.done() or "found" not in texts:
                began = time.monotonic()
                try:
                    await registry.get("greeter")
                    texts.add("found")
                except Unavailable as exc:
                    texts.add(str(exc).rpartition(": ")[2])
                except ServiceNotFound:
                    texts.add("not found")  # it has passed, and its servers do not know it yet
                assert time.monotonic() - began < 0.3 + SLACK
                await asyncio.sleep(0.02)
        await starting
    # It takes connections long before it answers.
    assert any(text.startswith("no answer in 0.3") for text in texts), texts


@pytest.mark.asyncio
async def test_an_agent_that_comes_back_empty_is_silent_for_an_old_index_and_a_stream_goes_on(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    for version in range(30):
        await registry.register(msgspec.structs.replace(NODE, version=str(version)), ttl=60)
    before = index(ask, consul, prefix)
    async with aclosing(registry.follow("greeter", None)) as stream:
        await anext(stream)
        await asyncio.to_thread(consul.restart, keep_data=False)
        await registry.register(NODE, ttl=60)
        assert int(index(ask, consul, prefix)) < int(before)
        began = time.monotonic()
        ask(consul, "GET", f"health/service/{prefix}greeter?index={before}&wait=500ms")
        assert time.monotonic() - began >= 0.5
        async with asyncio.timeout(3.2 + SLACK):  # a wait of its own, and then it reads anew
            assert (await anext(stream))[1] == Change(kind="update", node=NODE)


@pytest.mark.asyncio
async def test_a_node_of_go_micro_can_be_deregistered(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    """Its id is longer than ours, and has no service before it."""
    id_ = "greeter-2f4b3c1e-63a5-4c0d-9f36-0a5a4d1c2b3e.example-0123456789"
    body = {"ID": id_, "Name": f"{prefix}greeter", "Address": "127.0.0.1", "Port": 9301}
    assert ask(consul, "PUT", "agent/service/register", body=body).status == 200
    await registry.register(NODE, ttl=60)
    await eventually(lambda: _has(registry, id_))
    (theirs,) = [node for node in await registry.get("greeter") if node.id == id_]
    await registry.deregister(theirs)
    assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_a_node_at_an_agent_that_is_not_in_the_url_is_told_and_stays(
    ask: Ask, consul: ConsulServer, registry: ConsulRegistry, prefix: str
) -> None:
    said = {"ID": f"{prefix}greeter/greeter-1", "Service": f"{prefix}greeter", "Port": 9301}
    body = {"Node": "other", "Address": "127.0.0.1", "Service": said}
    assert ask(consul, "PUT", "catalog/register", body=body).status == 200
    with pytest.raises(Unavailable, match="an agent that is down, or is not in the URL"):
        await registry.deregister(NODE)
    assert [node.id for node in await registry.get("greeter")] == [NODE.id]
    ask(consul, "PUT", "catalog/deregister", body={"Node": "other"})


async def _has(registry: ConsulRegistry, id: str) -> bool:
    return id in {node.id for node in await found(registry)}
