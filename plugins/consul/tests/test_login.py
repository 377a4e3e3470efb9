"""Tokens: who is not known, who may not, and lists that are cut without a word."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import pytest

from micro.errors import (
    ConfigError,
    PermissionDenied,
    ServiceNotFound,
    Unauthenticated,
)
from micro.registry import Change, Node
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

Ask = Callable[..., Any]
Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]
Call = Callable[[ConsulRegistry], Awaitable[object]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
ROOT = "00000000-0000-0000-0000-000000000001"
ACLS = (
    'acl { enabled = true, default_policy = "deny", '
    f'tokens {{ initial_management = "{ROOT}", agent = "{ROOT}" }} }}'
)
NODES = 'node_prefix "" { policy = "read" }'
RULES = {
    "writer": f'service_prefix "prod/" {{ policy = "write" }} {NODES}',
    "reader": f'service_prefix "prod/" {{ policy = "read" }} {NODES}',
    "one": f'service "prod/greeter" {{ policy = "read" }} {NODES}',
    "no-nodes": 'service_prefix "prod/" { policy = "write" }',
    "other-nodes": 'service_prefix "prod/" { policy = "read" } node "other" { policy = "read" }',
    "nothing": 'key_prefix "" { policy = "read" }',
}


@pytest.fixture(scope="module")
def server(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulServer]:
    """It lets nobody do anything who has no token."""
    with ConsulServer(consul_binary, tmp_path_factory.mktemp("acl"), hcl=[ACLS]) as server:
        yield server


@pytest.fixture(scope="module")
def tokens(server: ConsulServer, ask: Ask) -> dict[str, str]:
    """By a word for what they may."""
    made: dict[str, str] = {}
    for name, rules in RULES.items():
        ask(server, "PUT", "acl/policy", body={"Name": name, "Rules": rules}, token=ROOT)
        policies = [{"Name": name}]
        told = ask(server, "PUT", "acl/token", body={"Policies": policies}, token=ROOT)
        made[name] = told.said["SecretID"]
    return made


@pytest.fixture
def url(server: ConsulServer, tokens: dict[str, str]) -> Callable[[str], str]:
    """The URL of who may that."""
    return lambda name: f"consul://:{tokens[name]}@{server.address}/prod"


async def first(registry: ConsulRegistry, service: str | None) -> object:
    async with aclosing(registry.follow(service, None)) as stream:
        return await anext(stream)


READS: dict[str, Call] = {
    "get": lambda registry: registry.get("greeter"),
    "follow": lambda registry: first(registry, "greeter"),
    "follow-all": lambda registry: first(registry, None),
    "services": lambda registry: registry.services(),
}
every_read = pytest.mark.parametrize("call", READS.values(), ids=READS)


# -- who gets in ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_token_that_is_not_known_is_unauthenticated_at_connect(
    connected: Connected, server: ConsulServer
) -> None:
    with pytest.raises(Unauthenticated, match="does not know the token") as caught:
        async with connected(f"consul://:wrong@{server.address}"):
            pass
    assert str(caught.value).startswith("--registry: consul://:***@")


@pytest.mark.asyncio
@every_read
async def test_who_has_no_token_is_told_to_give_one(
    connected: Connected, server: ConsulServer, call: Call
) -> None:
    async with connected(f"consul://{server.address}/prod") as registry:
        with pytest.raises(
            Unauthenticated, match=re.escape("consul://:TOKEN@host, or ?token_file")
        ):
            await call(registry)
        with pytest.raises(Unauthenticated, match="service:write"):
            await registry.register(NODE, ttl=60)


@pytest.mark.asyncio
async def test_who_may_write_works(connected: Connected, url: Callable[[str], str]) -> None:
    async with connected(url("writer")) as registry:
        assert await registry.services() == ()
        with pytest.raises(ServiceNotFound):
            await registry.get("greeter")
        await registry.register(NODE, ttl=60)
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
        assert await registry.services() == ("greeter",)
        await registry.deregister(NODE)


@pytest.mark.asyncio
async def test_who_may_only_read_is_refused_at_register(
    connected: Connected, url: Callable[[str], str]
) -> None:
    async with connected(url("writer")) as writer, connected(url("reader")) as reader:
        await writer.register(NODE, ttl=60)
        assert await reader.get("greeter") == (NODE,)
        with pytest.raises(PermissionDenied, match="service:write"):
            await reader.register(NODE, ttl=60)
        with pytest.raises(PermissionDenied, match="service:write"):
            await reader.deregister(NODE)
        assert await writer.get("greeter") == (NODE,)
        await writer.deregister(NODE)


# -- no rights are not no instances ---------------------------------------------------------------


@pytest.mark.asyncio
@every_read
@pytest.mark.parametrize("who", ["nothing", "no-nodes"])
@pytest.mark.parametrize("registered", [False, True])
async def test_what_may_not_be_read_is_refused_and_not_empty(
    connected: Connected,
    ask: Ask,
    server: ConsulServer,
    tokens: dict[str, str],
    url: Callable[[str], str],
    call: Call,
    who: str,
    registered: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    # So Consul itself says that there are none.
    path = "health/service/prod/greeter"
    async with connected(url("writer")) as writer, connected(url(who)) as registry:
        if registered:
            await writer.register(NODE, ttl=60)
        told = ask(server, "GET", path, token=tokens[who])
        assert (told.status, told.said) == (200, [])
        with pytest.raises(PermissionDenied, match='node_prefix "" with read') as caught:
            await call(registry)
        assert tokens[who] not in "".join(traceback.format_exception(caught.value)) + caplog.text
        await writer.deregister(NODE)


@pytest.mark.asyncio
async def test_who_may_not_read_the_agents_that_a_service_is_at_is_refused(
    connected: Connected,
    ask: Ask,
    server: ConsulServer,
    url: Callable[[str], str],
) -> None:
    check = {"Name": "serf", "Status": "passing"}
    body = {"Node": "other", "Address": "10.0.0.1", "Check": check}
    assert ask(server, "PUT", "catalog/register", body=body, token=ROOT).status == 200
    async with connected(url("writer")) as writer, connected(url("other-nodes")) as registry:
        await writer.register(NODE, ttl=60)
        with pytest.raises(PermissionDenied, match="there may be some of prod/greeter"):
            await registry.get("greeter")
        await writer.deregister(NODE)
        with pytest.raises(ServiceNotFound):
            await registry.get("greeter")


@pytest.mark.asyncio
async def test_nodes_that_are_hidden_among_others_are_a_warning(
    connected: Connected,
    ask: Ask,
    server: ConsulServer,
    url: Callable[[str], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = {"ID": "seen", "Service": "prod/greeter", "Port": 80}
    body = {"Node": "other", "Address": "10.0.0.1", "Service": said}
    assert ask(server, "PUT", "catalog/register", body=body, token=ROOT).status == 200
    async with connected(url("writer")) as writer, connected(url("other-nodes")) as registry:
        await writer.register(NODE, ttl=60)
        with caplog.at_level(logging.WARNING, "micro.consul"):
            for _ in range(2):
                assert [node.id for node in await registry.get("greeter")] == ["seen"]
        await writer.deregister(NODE)
    (text,) = [one.getMessage() for one in caplog.records if one.name == "micro.consul"]
    assert "some of prod/greeter may not be read" in text
    ask(server, "PUT", "catalog/deregister", body={"Node": "other"}, token=ROOT)


@pytest.mark.asyncio
async def test_who_may_read_one_service_sees_that_one(
    connected: Connected, url: Callable[[str], str]
) -> None:
    async with connected(url("writer")) as writer, connected(url("one")) as registry:
        with pytest.raises(ServiceNotFound):
            await registry.get("greeter")
        with pytest.raises(PermissionDenied):
            await registry.get("other")
        await writer.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
        assert await registry.services() == ("greeter",)
        await writer.deregister(NODE)


@pytest.mark.asyncio
async def test_what_is_registered_and_may_not_be_read_is_told_at_register(
    connected: Connected, url: Callable[[str], str]
) -> None:
    async with connected(url("no-nodes")) as registry:
        with pytest.raises(PermissionDenied, match='node_prefix "" with read'):
            await registry.register(NODE, ttl=60)
        await registry.deregister(NODE)


@pytest.mark.asyncio
async def test_a_watch_whose_token_is_taken_away_is_told_so(
    connected: Connected, ask: Ask, server: ConsulServer
) -> None:
    policies = [{"Name": "reader"}]
    told = ask(server, "PUT", "acl/token", body={"Policies": policies}, token=ROOT).said
    async with connected(f"consul://:{told['SecretID']}@{server.address}/prod") as registry:
        async with aclosing(registry.follow("greeter", None)) as stream:
            await anext(stream)
            following = asyncio.ensure_future(anext(stream))
            await asyncio.wait([following], timeout=0.1)
            ask(server, "DELETE", f"acl/token/{told['AccessorID']}", token=ROOT)
            with pytest.raises(Unauthenticated):
                async with asyncio.timeout(10):
                    await following


@pytest.mark.asyncio
async def test_a_node_that_is_critical_at_this_agent_is_gone_and_no_outage(
    connected: Connected, ask: Ask, server: ConsulServer, url: Callable[[str], str]
) -> None:
    async with connected(url("writer")) as registry:
        await registry.register(NODE, ttl=60)
        async with aclosing(registry.follow("greeter", None)) as stream, asyncio.timeout(10):
            await anext(stream)
            path = "agent/check/fail/service:prod/greeter/greeter-1"
            ask(server, "PUT", path, token=ROOT)
            assert (await anext(stream))[1] == Change(kind="delete", node=NODE)
        with pytest.raises(ServiceNotFound):
            await registry.get("greeter")
        await registry.deregister(NODE)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("login", ["canary@", "me:canary@"])
async def test_a_user_name_is_a_config_error_that_does_not_show_it(
    connected: Connected, login: str
) -> None:
    with pytest.raises(ConfigError, match="a token stands after a colon") as caught:
        async with connected(f"consul://{login}127.0.0.1:1"):
            pass
    assert "canary" not in str(caught.value)


@pytest.mark.asyncio
async def test_a_token_of_two_lines_is_a_config_error_that_does_not_show_it(
    connected: Connected, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("canary\ncanary\n")
    with pytest.raises(ConfigError, match="a line break within") as caught:
        async with connected(f"consul://127.0.0.1:1?token_file={tmp_path / 'token'}"):
            pass
    assert "canary" not in str(caught.value)


@pytest.mark.asyncio
async def test_a_token_that_nobody_asks_for_is_a_warning(
    connected: Connected, consul: ConsulServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "micro.consul"):
        async with connected(f"consul://:canary@{consul.address}") as registry:
            await registry.services()
    (record,) = (record for record in caplog.records if record.name == "micro.consul")
    assert "asks for no token; ours is not used" in record.getMessage()
    assert "canary" not in record.getMessage()
