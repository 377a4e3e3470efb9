"""Users, passwords, rights, and tokens that end."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from micro.backend import Connections
from micro.errors import (
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from micro.registry import Change, Node, Snapshot
from micro.testing import eventually
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry
from micro_plugin_etcd._channel import StaleToken
from micro_plugin_etcd._client import Client
from micro_plugin_etcd._history import Mark

Ask = Callable[..., dict[str, Any]]
Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
#: What must be in no text; it has all that a URL has to quote.
SECRET = "canary:/@?&=% 7f3b"
QUOTED = "canary%3A%2F%40%3F%26%3D%25%207f3b"
#: Seconds that a busy machine gets.
SLACK = 2.0
ROOT = "root-password"
QUICK = ("--bcrypt-cost=4",)  # else a login costs the server a tenth of a second
FORGETFUL = ("--auth-token-ttl=1", "--log-level=debug")  # and it tells of tokens that end


def lock(ask: Ask, server: EtcdServer) -> None:
    """Have it ask for a login; of the users, one may write, one read, and one nothing."""
    everything = {"key": b"/", "range_end": b"0"}
    for user, rights in (("root", None), ("writer", "READWRITE"), ("reader", "READ"), ("no", None)):
        ask(server, "auth/user/add", name=user, password=ROOT if user == "root" else SECRET)
        ask(server, "auth/role/add", name=user)
        ask(server, "auth/user/grant", user=user, role=user)
        if rights is not None:
            ask(server, "auth/role/grant", name=user, perm={"permType": rights, **everything})
    ask(server, "auth/enable")


def unlock(ask: Ask, server: EtcdServer) -> None:
    token = ask(server, "auth/authenticate", name="root", password=ROOT)["token"]
    ask(server, "auth/disable", token=token)


@pytest.fixture(scope="module")
def server(
    etcd_binary: Path, ask: Ask, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer]:
    """It asks for a login, and forgets who says nothing for a second."""
    folder = tmp_path_factory.mktemp("locked")
    with EtcdServer(etcd_binary, folder, arguments=(*QUICK, *FORGETFUL)) as server:
        lock(ask, server)
        yield server


@pytest.fixture
def url(server: EtcdServer) -> str:
    """That of who may write."""
    server.start()  # an earlier test may have left it paused
    return f"etcd://writer:{QUOTED}@{server.address}/{uuid.uuid4().hex}"


def client(registry: EtcdRegistry) -> Client:
    assert registry._etcd is not None
    return registry._etcd._client


def logins(server: EtcdServer) -> int:
    """How often somebody has logged in."""
    return server.log.read_text().count('"authenticated a user"')


async def its_token_ends(server: EtcdServer, registry: EtcdRegistry) -> None:
    """Wait until the server has forgotten it."""
    ((_, token),) = client(registry)._credentials or [("", "")]
    await eventually(lambda: f'"token":"{token}"' in server.log.read_text(), within=10, every=0.05)


# -- who gets in ----------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("login", "says"),
    [
        ("writer:wrong@", "wrong user name or password"),
        ("nobody:wrong@", "wrong user name or password"),
        ("writer@", "password"),
        ("", "the server asks for a login: etcd://user:password@host, or ?password_file=FILE"),
    ],
)
async def test_who_is_not_known_is_unauthenticated_at_connect(
    connected: Connected, server: EtcdServer, login: str, says: str
) -> None:
    with pytest.raises(Unauthenticated, match=re.escape(says)) as caught:
        async with connected(f"etcd://{login}{server.address}"):
            pass
    assert str(caught.value).startswith("--registry: etcd://")


@pytest.mark.asyncio
async def test_who_has_no_rights_is_refused_at_connect_and_its_password_in_no_text(
    connected: Connected, server: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PermissionDenied, match="needs the right to read these keys") as caught:
        async with connected(f"etcd://no:{QUOTED}@{server.address}"):
            pass
    assert "canary" not in "".join(traceback.format_exception(caught.value)) + caplog.text


@pytest.mark.asyncio
async def test_who_may_only_read_is_refused_at_register(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async with connected(url) as writer, connected(url.replace("writer", "reader")) as reader:
        await writer.register(NODE, ttl=60)
        assert await reader.get("greeter") == (NODE,)
        with pytest.raises(PermissionDenied):
            await reader.register(msgspec.structs.replace(NODE, id="other"), ttl=60)
        assert await writer.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_a_watch_without_rights_is_refused(connected: Connected, url: str) -> None:
    async with connected(url) as registry:
        assert registry._etcd is not None
        async with aclosing(registry._etcd.watch(b"0nothing of ours/", Mark(1, 1, None))) as events:
            with pytest.raises(PermissionDenied):
                await anext(events)


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_call_does_not_see_that_the_token_has_ended(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    calls: list[Callable[[EtcdRegistry], Awaitable[object]]] = [
        lambda registry: registry.register(NODE, ttl=60),
        lambda registry: registry.services(),
        lambda registry: registry.deregister(NODE),
    ]
    async with connected(url) as registry:
        await registry.register(NODE, ttl=60)  # so that the first call is a heartbeat
        for call in calls:
            await its_token_ends(server, registry)
            before = logins(server)
            await call(registry)
            assert logins(server) == before + 1


@pytest.mark.asyncio
async def test_many_calls_at_once_ask_for_one_token(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async with connected(url) as registry:
        await registry.register(NODE, ttl=60)
        await its_token_ends(server, registry)
        before = logins(server)
        found = await asyncio.gather(*(registry.get("greeter") for _ in range(20)))
        assert found == [(NODE,)] * 20
        assert logins(server) == before + 1


@pytest.mark.asyncio
async def test_a_late_refusal_of_an_old_token_does_not_cost_the_new_one(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async with connected(url) as registry:
        before = logins(server)
        with pytest.raises(StaleToken), client(registry)._unless_refused([("token", "old")]):
            raise StaleToken("invalid auth token")
        await registry.services()
        assert logins(server) == before


@pytest.mark.asyncio
async def test_a_new_watch_whose_token_has_ended_goes_on_at_the_next_attempt(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async with connected(url) as registry:
        assert registry._etcd is not None
        mark = (await registry._etcd.read(b"/")).mark
        await its_token_ends(server, registry)
        with pytest.raises(Unavailable):
            await anext(registry._etcd.watch(b"/", mark))
        async with aclosing(registry._etcd.watch(b"/", mark)) as events:
            assert await anext(events) is None


@pytest.mark.asyncio
async def test_an_open_watch_outlives_its_token(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async with connected(url) as registry, connected(url) as other:
        async with aclosing(registry.follow("greeter", None)) as stream:
            assert (await anext(stream))[1] == Snapshot(nodes=())
            following = asyncio.ensure_future(anext(stream))
            await its_token_ends(server, registry)
            assert not following.done()
            await other.register(NODE, ttl=60)
            async with asyncio.timeout(SLACK):
                assert (await following)[1] == Change(kind="create", node=NODE)


@pytest.mark.asyncio
async def test_to_wait_for_a_token_is_part_of_the_time_of_a_call(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async with connected(f"{url}?timeout=1") as registry:
        client(registry)._credentials = None
        await asyncio.to_thread(server.pause)
        try:
            began = time.monotonic()
            calls = (registry.services() for _ in range(20))
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - began < 1 + SLACK
        finally:
            server.resume()
    assert {type(outcome) for outcome in outcomes} == {Unavailable}


@pytest.mark.asyncio
async def test_a_login_outlives_a_restart_of_the_server(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    async def registers() -> bool:
        try:
            await registry.register(NODE, ttl=60)
        except Unavailable:
            return False
        return True

    async with connected(url) as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(server.restart)
        await eventually(registers, within=5 + SLACK)
        assert await registry.get("greeter") == (NODE,)


# -- servers that ask for no login ----------------------------------------------------------------


@pytest.fixture
def open_server(etcd_binary: Path, tmp_path: Path) -> Iterator[EtcdServer]:
    with EtcdServer(etcd_binary, tmp_path, arguments=QUICK) as server:
        yield server


@pytest.mark.asyncio
async def test_a_login_that_nobody_asks_for_is_a_warning(
    connected: Connected, open_server: EtcdServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(f"etcd://writer:{QUOTED}@{open_server.address}") as registry:
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
    (record,) = (record for record in caplog.records if record.name == "micro.etcd")
    assert record.levelno == logging.WARNING
    assert "the server asks for no login; ours is not used" in record.getMessage()
    assert SECRET not in record.getMessage()


@pytest.mark.asyncio
async def test_a_server_may_begin_to_ask_for_a_login_and_end_it(
    ask: Ask, connected: Connected, open_server: EtcdServer
) -> None:
    async with connected(f"etcd://writer:{QUOTED}@{open_server.address}") as registry:
        await registry.register(NODE, ttl=60)
        lock(ask, open_server)
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)
        unlock(ask, open_server)
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)


# -- who shares a client --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_registries_of_one_login_share_a_client_and_a_token_whatever_their_paths(
    connected: Connected, server: EtcdServer, url: str
) -> None:
    connections = Connections()
    before = logins(server)
    async with connected(f"{url}/a", connections) as one, connected(f"{url}/b", connections) as two:
        assert client(one) is client(two)
        await one.register(NODE, ttl=60)
        assert await two.services() == ()
    await connections.aclose()
    assert logins(server) == before + 1


@pytest.mark.asyncio
async def test_registries_of_different_users_share_nothing(connected: Connected, url: str) -> None:
    connections = Connections()
    other = url.replace("writer", "reader")
    async with connected(url, connections) as one, connected(other, connections) as two:
        assert client(one) is not client(two)
        await one.register(NODE, ttl=60)
        with pytest.raises(PermissionDenied):
            await two.register(NODE, ttl=60)
    await connections.aclose()
