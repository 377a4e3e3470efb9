"""TLS: what works, and mistakes, which are told at connect with what to do about them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from micro.errors import ConfigError
from micro.registry import Node, Registry
from micro.testing import eventually
from micro.testing.certificates import Authority
from micro.testing.ports import HOST
from micro.testing.servers import NatsServer

Connected = Callable[..., AbstractAsyncContextManager[Registry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
SCHEMES = pytest.mark.parametrize("scheme", ["nats", "nats-kv"])
#: Seconds that a busy machine gets.
SLACK = 2.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the servers do not trust."""
    return Authority.create(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def server(
    nats_binary: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NatsServer]:
    """It speaks TLS, to all."""
    own = authority.server()
    arguments = ["--tls", "--tlscert", str(own.certificate), "--tlskey", str(own.key)]
    with NatsServer(nats_binary, tmp_path_factory.mktemp("tls"), arguments=arguments) as server:
        yield server


@pytest.fixture(scope="module")
def strict(
    nats_binary: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NatsServer]:
    """It wants a certificate of its clients."""
    own = authority.server("strict")
    arguments = ["--tlsverify", "--tlscert", str(own.certificate), "--tlskey", str(own.key)]
    arguments += ["--tlscacert", str(authority.ca)]
    with NatsServer(nats_binary, tmp_path_factory.mktemp("strict"), arguments=arguments) as server:
        yield server


async def works(connected: Connected, url: str) -> None:
    async with connected(url) as registry:
        await registry.register(NODE, ttl=10)
        assert await registry.get("greeter") == (NODE,)
        await registry.deregister(NODE)


async def mistake(connected: Connected, url: str) -> str:
    """The text of the ConfigError, which comes in time."""
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        async with connected(f"{url}&timeout=3s"):
            pass
    assert time.monotonic() - began < 3 + SLACK
    assert str(caught.value).startswith("--registry: nats")
    return str(caught.value)


@SCHEMES
@pytest.mark.asyncio
async def test_the_authority_of_the_server_is_trusted(
    scheme: str, connected: Connected, server: NatsServer, authority: Authority
) -> None:
    await works(connected, f"{scheme}://{server.address}?ca={authority.ca}")


@SCHEMES
@pytest.mark.asyncio
async def test_a_client_shows_its_certificate(
    scheme: str, connected: Connected, strict: NatsServer, authority: Authority
) -> None:
    own = authority.client()
    files = f"ca={own.ca}&cert={own.certificate}&key={own.key}"
    await works(connected, f"{scheme}://{strict.address}?{files}")


@pytest.mark.asyncio
async def test_a_server_of_another_authority_is_not_trusted(
    connected: Connected, server: NatsServer, stranger: Authority
) -> None:
    text = await mistake(connected, f"nats://{server.address}?ca={stranger.ca}")
    assert "is not trusted" in text
    assert "name its authority with ca=" in text


@pytest.mark.asyncio
async def test_a_server_that_wants_tls_is_told(connected: Connected, server: NatsServer) -> None:
    text = await mistake(connected, f"nats://{server.address}?tls=false")
    assert "the server speaks TLS" in text
    assert "ca=" in text


@pytest.mark.asyncio
async def test_a_certificate_for_another_host_is_not_trusted(
    connected: Connected, nats_binary: Path, tmp_path: Path, authority: Authority
) -> None:
    own = authority.service("elsewhere", hosts=["elsewhere.test"])
    arguments = ["--tls", "--tlscert", str(own.certificate), "--tlskey", str(own.key)]
    with NatsServer(nats_binary, tmp_path, arguments=arguments) as server:
        text = await mistake(connected, f"nats://{server.address}?ca={authority.ca}")
    assert "use a host that it names" in text


@pytest.mark.parametrize("by", [None, "stranger"])
@pytest.mark.asyncio
async def test_a_missing_or_foreign_client_certificate_is_told(
    by: str | None,
    connected: Connected,
    strict: NatsServer,
    authority: Authority,
    stranger: Authority,
) -> None:
    own = stranger.client()
    files = f"&cert={own.certificate}&key={own.key}" if by else ""
    text = await mistake(connected, f"nats://{strict.address}?ca={authority.ca}{files}")
    assert "name a client certificate with cert= key=" in text


@pytest.mark.asyncio
async def test_a_server_without_tls_gets_no_password(
    connected: Connected, authority: Authority
) -> None:
    """One that stands in the way could leave TLS away: nats-py would go on without."""
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","auth_required":true}\r\n')
        heard.extend(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(serve, HOST, 0) as server:
        address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
        for login in ("me:canary", ":canary"):
            text = await mistake(connected, f"nats://{login}@{address}?ca={authority.ca}")
            assert "the server does not speak TLS" in text
            assert "canary" not in text
    assert b"canary" not in heard


@pytest.mark.asyncio
async def test_a_server_without_tls_is_refused_without_a_login_too(
    connected: Connected, nats: NatsServer
) -> None:
    nats.start()
    text = await mistake(connected, f"nats://{nats.address}?tls=true")
    assert "the server does not speak TLS" in text


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("cert={file}", "option 'cert' needs option 'key' beside it"),
        ("key={file}", "option 'key' needs option 'cert' beside it"),
        ("ca=/nowhere", "option 'ca': cannot read /nowhere"),
        ("ca={file}", "option 'ca': no certificates in PEM"),
        ("cert={file}&key={file}", "not a certificate and its key in PEM"),
    ],
)
@pytest.mark.asyncio
async def test_files_that_cannot_be_used_are_told(
    query: str, text: str, connected: Connected, tmp_path: Path
) -> None:
    file = tmp_path / "file.pem"
    file.write_text("no PEM")
    assert text in await mistake(connected, f"nats://127.0.0.1:1?{query.format(file=file)}")


@pytest.mark.asyncio
async def test_it_speaks_tls_again_after_a_restart(
    connected: Connected, server: NatsServer, authority: Authority
) -> None:
    async with connected(f"nats://{server.address}?ca={authority.ca}") as registry:
        await registry.register(NODE, ttl=60)
        await asyncio.to_thread(server.restart)
        await eventually(registry.services, within=5 + SLACK)
        assert await registry.get("greeter") == (NODE,)
