"""TLS: what works, and mistakes, which are told at connect with what to do about them."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from micro.errors import ConfigError, MicroError
from micro.registry import Node, Registry
from micro.testing import eventually
from micro.testing.certificates import Authority
from micro.testing.ports import HOST
from micro.testing.servers import NatsServer

Cluster = Callable[..., tuple[NatsServer, NatsServer]]
Connected = Callable[..., AbstractAsyncContextManager[Registry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
#: Seconds that a busy machine gets.
SLACK = 2.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


async def mistake(connected: Connected, url: str) -> str:
    """The text of the ConfigError, which comes in time."""
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        async with connected(f"{url}&timeout=3s"):
            pass
    assert time.monotonic() - began < 3 + SLACK
    assert str(caught.value).startswith("--registry: nats")
    return str(caught.value)


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
async def test_it_speaks_tls_again_after_a_restart(
    connected: Connected, nats_binary: Path, authority: Authority, tmp_path: Path
) -> None:
    with NatsServer(nats_binary, tmp_path, tls=authority.server()) as server:
        async with connected(f"nats://{server.address}?ca={authority.ca}") as registry:
            await registry.register(NODE, ttl=60)
            await asyncio.to_thread(server.restart)
            await eventually(registry.services, within=5 + SLACK)
            assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_a_server_that_is_known_by_its_address_has_the_name_of_its_cluster(
    connected: Connected, cluster: Cluster, authority: Authority
) -> None:
    """Servers name each other by their addresses, which certificates seldom do."""
    first, second = cluster(tls=authority.service("nats", hosts=["localhost"]))
    with first, second:

        def has_named_the_second() -> bool:
            with socket.create_connection((HOST, first.port), timeout=1) as client:
                return f"{HOST}:{second.port}".encode() in client.recv(4096)

        await eventually(has_named_the_second, within=5 + SLACK)
        async with connected(f"nats://localhost:{first.port}?ca={authority.ca}") as registry:
            await asyncio.to_thread(first.kill)

            async def is_at_the_second() -> bool:
                try:
                    await registry.register(NODE, ttl=60)
                except MicroError:
                    return False
                return True

            await eventually(is_at_the_second, within=5 + SLACK)
