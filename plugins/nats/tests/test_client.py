"""The connection: who may have it, where it goes, and what is told of it."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import msgspec
import pytest
from nats.aio.client import Client as NatsClient

from micro.backend import Connections
from micro.errors import (
    PermissionDenied,
    ServiceNotFound,
    Unauthenticated,
    Unavailable,
)
from micro.registry import Node, Registry, Snapshot
from micro.testing import eventually
from micro.testing.ports import HOST, unused_ports
from micro.testing.proxy import FaultProxy
from micro.testing.servers import NatsServer
from micro.url import URL
from micro_plugin_nats import _dialing
from micro_plugin_nats._client import Client
from micro_plugin_nats._options import NatsOptions

Connected = Callable[..., AbstractAsyncContextManager[Registry]]
Cluster = Callable[..., tuple[NatsServer, NatsServer]]
Raw = Callable[..., AbstractAsyncContextManager[NatsClient]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
SCHEMES = pytest.mark.parametrize("scheme", ["nats", "nats-kv"])
#: What must be in no text; it has all that a URL has to quote.
SECRET = "canary:/@?&=% 7f3b"
#: Seconds that a busy machine gets.
SLACK = 2.0


@pytest.fixture(scope="module")
def locked(nats_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """It asks for a user and a password."""
    login = ("--user", "me", "--pass", SECRET)
    with NatsServer(nats_binary, tmp_path_factory.mktemp("locked"), arguments=login) as server:
        yield server


@pytest.fixture(scope="module")
def token(nats_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """It asks for a token."""
    login = ("--auth", SECRET)
    with NatsServer(nats_binary, tmp_path_factory.mktemp("token"), arguments=login) as server:
        yield server


async def works(connected: Connected, url: str) -> None:
    async with connected(url) as registry:
        await registry.register(NODE, ttl=10)
        assert await registry.get("greeter") == (NODE,)
        await registry.deregister(NODE)


@SCHEMES
@pytest.mark.asyncio
async def test_where_nobody_listens_it_says_what_may_be_missing(
    scheme: str, connected: Connected
) -> None:
    (port,) = unused_ports(1)
    with pytest.raises(Unavailable, match="connection refused; does NATS run there"):
        async with connected(f"{scheme}://{HOST}:{port}"):
            pass


# -- logins ---------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.asyncio
async def test_a_token_lets_in(
    scheme: str, connected: Connected, token: NatsServer, tmp_path: Path
) -> None:
    secret, file = quote(SECRET, safe=""), tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    await works(connected, f"{scheme}://:{secret}@{token.address}")
    await works(connected, f"{scheme}://{token.address}?password_file={file}")


@SCHEMES
@pytest.mark.parametrize("login", ["", "me:{}@", ":{}@", "you:{}@"])
@pytest.mark.asyncio
async def test_a_wrong_login_is_refused_and_not_told(
    scheme: str,
    login: str,
    connected: Connected,
    locked: NatsServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wrong = f"wrong-{SECRET}"
    url = f"{scheme}://{login.format(quote(wrong, safe=''))}{locked.address}"
    with caplog.at_level(logging.DEBUG), pytest.raises(Unauthenticated) as caught:
        async with connected(url):
            pass
    shown = "".join(traceback.format_exception(caught.value))
    assert str(caught.value).startswith("--registry: nats://")
    for text in (shown, caplog.text, *capfd.readouterr()):
        assert "canary" not in text


RIGHTS = """
authorization { users: [
  {user: talker, password: p, permissions: {
    publish: ["micro.registry.nats.>", "_INBOX.>"],
    subscribe: ["micro.registry.nats.>", "_INBOX.>"]}},
  {user: writer, password: p, permissions: {subscribe: ["_INBOX.>"], publish: [
    "$KV.micro-registry.>", "$JS.API.INFO", "$JS.API.STREAM.CREATE.KV_micro-registry",
    "$JS.API.STREAM.INFO.KV_micro-registry",
    "$JS.API.CONSUMER.CREATE.KV_micro-registry.>", "$JS.API.CONSUMER.DELETE.KV_micro-registry.>"]}},
  {user: reader, password: p, permissions: {subscribe: ["_INBOX.>"], publish: [
    "$JS.API.STREAM.INFO.KV_micro-registry",
    "$JS.API.CONSUMER.CREATE.KV_micro-registry.>", "$JS.API.CONSUMER.DELETE.KV_micro-registry.>"]}},
] }
"""


@pytest.mark.asyncio
async def test_the_rights_that_the_documentation_names_suffice(
    connected: Connected, nats_binary: Path, tmp_path: Path
) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(RIGHTS)
    with NatsServer(nats_binary, tmp_path, arguments=["-c", str(config)]) as server:
        await works(connected, f"nats://talker:p@{server.address}")
        await works(connected, f"nats-kv://writer:p@{server.address}")
        async with (
            connected(f"nats-kv://writer:p@{server.address}") as writer,
            connected(f"nats-kv://reader:p@{server.address}") as reader,
        ):
            await writer.register(NODE, ttl=60)
            assert await reader.get("greeter") == (NODE,)
            async with aclosing(reader.follow(None, None)) as stream:
                assert (await anext(stream))[1] == Snapshot(nodes=(NODE,))
            with pytest.raises(PermissionDenied, match="give the user this right"):
                await reader.register(OTHER, ttl=60)


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_when_a_server_is_gone_all_meet_at_the_next(
    connected: Connected, nats_binary: Path, tmp_path: Path
) -> None:
    with (
        NatsServer(nats_binary, tmp_path / "a") as first,
        NatsServer(nats_binary, tmp_path / "b") as second,
    ):
        url = f"nats://{first.address},{second.address}"
        async with connected(url) as registry, connected(url) as other:
            await registry.register(NODE, ttl=60)
            await asyncio.to_thread(first.stop)
            await eventually(lambda: _finds(other), within=5 + SLACK)


@pytest.mark.asyncio
async def test_a_server_that_joins_the_cluster_later_is_met_when_the_first_is_gone(
    connected: Connected, raw: Raw, cluster: Cluster
) -> None:
    first, second = cluster()
    with first:
        async with connected(f"nats://{first.address}") as registry, raw(first.address) as client:
            with second:
                await eventually(lambda: bool(client.discovered_servers), within=5 + SLACK)
                await registry.register(NODE, ttl=60)
                await asyncio.to_thread(first.kill)
                await eventually(lambda: _finds(registry), within=5 + SLACK)


async def _finds(registry: Registry) -> bool:
    try:
        return await registry.get("greeter") == (NODE,)
    except (Unavailable, ServiceNotFound):
        return False


@pytest.mark.asyncio
async def test_an_error_of_several_hosts_tells_the_mistake_and_not_who_is_down(
    connected: Connected, locked: NatsServer
) -> None:
    (free,) = unused_ports(1)
    with pytest.raises(Unauthenticated):
        async with connected(f"nats://me:wrong@{HOST}:{free},{locked.address}"):
            pass


# -- the connection -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_backends_of_one_url_share_a_connection(
    connected: Connected, nats_binary: Path, tmp_path: Path
) -> None:
    (port,) = unused_ports(1)
    arguments = ["-m", str(port)]
    with NatsServer(nats_binary, tmp_path, arguments=arguments) as server:
        shared = Connections()
        try:
            async with (
                connected(f"nats://{server.address}/a", shared) as first,
                connected(f"nats://{server.address}/b", shared) as second,
                connected(f"nats-kv://{server.address}/a?bucket=c", shared) as third,
            ):
                for registry in (first, second, third):
                    await registry.register(NODE, ttl=60)
                assert await asyncio.to_thread(_connections, port) == 1
        finally:
            await shared.aclose()

        async def are_none() -> bool:
            return await asyncio.to_thread(_connections, port) == 0

        await eventually(are_none, within=SLACK)


def _connections(port: int) -> int:
    with urlopen(f"http://{HOST}:{port}/connz", timeout=5) as answer:
        said = msgspec.json.decode(answer.read(), type=dict[str, object])
    count = said["num_connections"]
    assert isinstance(count, int)
    return count


@SCHEMES
@pytest.mark.asyncio
async def test_an_outage_is_told_in_time_and_makes_no_noise(
    scheme: str,
    connected: Connected,
    nats: NatsServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    nats.start()
    async with connected(f"{scheme}://{nats.address}?timeout=500ms") as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(nats.stop)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"^--registry: nats://"):
            await registry.get("greeter")
        assert time.monotonic() - began < 0.5 + SLACK
        await asyncio.to_thread(nats.start)
        await eventually(lambda: _registers(registry), within=5 + SLACK)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


async def _registers(registry: Registry) -> bool:
    try:
        await registry.register(NODE, ttl=60)
    except Unavailable:
        return False
    return True


@SCHEMES
@pytest.mark.asyncio
async def test_who_closes_while_the_server_does_not_read_is_done_soon(
    scheme: str, connected: Connected, nats: NatsServer
) -> None:
    nats.start()
    large = msgspec.structs.replace(NODE, metadata={"large": "x" * 60_000})
    async with FaultProxy(nats.address) as proxy:
        async with connected(f"{scheme}://{proxy.address}?timeout=500ms") as registry:
            proxy.blackhole()
            calls = [registry.register(large, ttl=60) for _ in range(200)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {Unavailable}
            began = time.monotonic()
        assert time.monotonic() - began < 1 + SLACK


@pytest.mark.asyncio
async def test_who_is_cancelled_while_it_closes_leaves_no_connection(nats: NatsServer) -> None:
    nats.start()
    client = await Client.made(URL.parse(nats.url, source="--registry"), NatsOptions())
    link = await client.link()
    writer = _dialing._writer(link._nats)
    await asyncio.to_thread(nats.pause)
    try:
        for _ in range(8):  # more than the system takes
            await link.publish("greeter", bytes(1_000_000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.aclose()
    finally:
        nats.resume()
    assert writer is not None
    assert writer.transport.is_closing()


@pytest.mark.asyncio
async def test_who_closes_while_it_connects_again_is_done_at_whatever_step(nats_url: str) -> None:
    url = URL.parse(nats_url, source="--registry")
    for step in range(24):
        client = await Client.made(url, NatsOptions())
        await (await client.link()).aclose()
        client._link = None
        keeping = asyncio.create_task(client.keep())
        for _ in range(step):
            await asyncio.sleep(0)
        keeping.cancel()
        _, going_on = await asyncio.wait([keeping], timeout=1 + SLACK)
        keeping.cancel()
        await client.aclose()
        assert not going_on, f"after {step} steps"


@pytest.mark.asyncio
async def test_what_is_no_nats_is_told(connected: Connected) -> None:
    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, HOST, 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable, match="expecting INFO"):
            async with connected(f"nats://{HOST}:{port}"):
                pass
