"""What the tests of the plugin share: connected registries, and a way to NATS behind their back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import nats
import pytest
from nats.aio.client import Client as NatsClient

from micro.backend import Connections
from micro.registry import Registry
from micro.testing.certificates import Identity
from micro.testing.ports import HOST, unused_ports
from micro.testing.servers import NatsServer
from micro.url import URL
from micro_plugin_nats import NatsKVRegistry, NatsRegistry

#: It has all that a URL has to quote.
_SECRET = "canary:/@?&=% 7f3b"


@pytest.fixture(scope="session")
def connected() -> Callable[..., AbstractAsyncContextManager[Registry]]:
    """``async with connected(url) as registry``; a second argument are connections to share."""
    return _connected


@pytest.fixture(scope="session")
def raw() -> Callable[..., AbstractAsyncContextManager[NatsClient]]:
    """``async with raw(server.address) as client``, which is nats-py's."""
    return _raw


@pytest.fixture(scope="session")
def publish() -> Callable[..., Awaitable[None]]:
    """``await publish(address, {subject: data})``."""
    return _publish


@pytest.fixture
def cluster(nats_binary: Path, tmp_path: Path) -> Callable[..., tuple[NatsServer, NatsServer]]:
    """``first, second = cluster()``, which are not started; ``tls`` as of NatsServer."""

    def make(tls: Identity | None = None) -> tuple[NatsServer, NatsServer]:
        routes = [f"nats://{HOST}:{port}" for port in unused_ports(2)]
        first, second = (
            NatsServer(
                nats_binary,
                tmp_path / name,
                tls=tls,
                arguments=["-n", name, "--cluster_name", "c", "--cluster", own, "--routes", other],
            )
            for name, own, other in zip("ab", routes, reversed(routes), strict=True)
        )
        return first, second

    return make


@pytest.fixture
def kv_url(nats_url: str) -> str:
    """As ``nats_url``, for nodes in a bucket."""
    return f"nats-kv{nats_url.removeprefix('nats')}"


@pytest.fixture(scope="module")
def login_url(nats_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of who may do all, where a login is asked for."""
    login = ("--user", "me", "--pass", _SECRET)
    with NatsServer(nats_binary, tmp_path_factory.mktemp("locked"), arguments=login) as server:
        yield f"nats://me:{quote(_SECRET, safe='')}@{server.address}"


@asynccontextmanager
async def _connected(url: str, connections: Connections | None = None) -> AsyncIterator[Registry]:
    parsed = URL.parse(url, source="--registry")
    registry = NatsRegistry(parsed) if parsed.scheme == "nats" else NatsKVRegistry(parsed)
    shared = connections or Connections()
    try:
        await registry.connect(shared)
        yield registry
    finally:
        await registry.aclose()
        if connections is None:
            await shared.aclose()


@asynccontextmanager
async def _raw(address: str) -> AsyncIterator[NatsClient]:
    client = await nats.connect(f"nats://{address}")
    try:
        yield client
    finally:
        await client.close()


async def _publish(address: str, messages: Mapping[str, bytes]) -> None:
    async with _raw(address) as client:
        for subject, data in messages.items():
            await client.publish(subject, data)
        await client.drain()
