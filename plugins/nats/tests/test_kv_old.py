"""A server before 2.11: one time to live for the whole bucket, and nobody is told what expires."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client as NatsClient
from nats.js.errors import KeyValueLimitMarkerTTLNotSupportedError

from micro.errors import ConfigError, ServiceNotFound, Unsupported
from micro.follow import View, Watch
from micro.registry import Node, Registry
from micro.testing import eventually
from micro.testing.servers import NatsServer

Connected = Callable[..., AbstractAsyncContextManager[Registry]]
Raw = Callable[..., AbstractAsyncContextManager[NatsClient]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
TTL = 2
#: Seconds that a busy machine gets.
SLACK = 2.0


@pytest.fixture(scope="module")
def server(oldnats_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(oldnats_binary, tmp_path_factory.mktemp("old")) as server:
        yield server


@pytest.fixture
def url(server: NatsServer) -> str:
    return f"nats-kv://{server.address}/{uuid.uuid4().hex}?bucket_ttl={TTL}s&bucket=two"


@asynccontextmanager
async def watching(registry: Registry) -> AsyncIterator[Watch]:
    view = View(registry, "greeter", ttl=30)
    try:
        async with view.watch() as watch:
            yield watch
    finally:
        await view.aclose()


@pytest.mark.asyncio
async def test_it_cannot_keep_a_message_for_a_time_of_its_own(server: NatsServer, raw: Raw) -> None:
    async with raw(server.address) as client:
        with pytest.raises(KeyValueLimitMarkerTTLNotSupportedError):
            await client.jetstream().create_key_value(bucket="new", limit_marker_ttl=10)


@pytest.mark.asyncio
async def test_a_silent_node_is_gone_for_all_within_twice_the_time(
    url: str, connected: Connected
) -> None:
    async with connected(url) as registry, connected(url) as other, watching(other) as early:
        began = time.monotonic()
        await registry.register(NODE, ttl=TTL)
        async with watching(other) as late:  # which does not know how old the entry is
            assert (early.nodes, late.nodes) == ((NODE,), (NODE,))
            await eventually(lambda: not early.nodes, within=2 * TTL + SLACK)
            assert time.monotonic() - began >= TTL
            await eventually(lambda: not late.nodes, within=TTL + SLACK)
            await eventually(lambda: _is_gone(registry), within=TTL + SLACK)
            assert time.monotonic() - began < 2 * TTL + SLACK


async def _is_gone(registry: Registry) -> bool:
    try:
        await registry.get("greeter")
    except ServiceNotFound:
        return True
    return False


@pytest.mark.asyncio
async def test_a_node_with_heartbeats_stays(url: str, connected: Connected) -> None:
    async with connected(url) as registry, connected(url) as other, watching(other) as watch:
        until = time.monotonic() + 2 * TTL
        while time.monotonic() < until:
            await registry.register(NODE, ttl=TTL)
            assert await other.get("greeter") == (NODE,)
            await asyncio.sleep(TTL / 4)
            assert watch.nodes == (NODE,)


@pytest.mark.asyncio
async def test_changes_and_deregistration_are_told(url: str, connected: Connected) -> None:
    async with connected(url) as registry, connected(url) as other, watching(other) as watch:
        for node in (NODE, OTHER):
            await registry.register(node, ttl=TTL)
        await eventually(lambda: watch.nodes == (NODE, OTHER), within=1 + SLACK)
        await registry.deregister(NODE)
        await eventually(lambda: watch.nodes == (OTHER,), within=1 + SLACK)
        assert await other.get("greeter") == (OTHER,)


@pytest.mark.asyncio
@pytest.mark.parametrize("ttl", [TTL + 1, 30])
async def test_a_longer_time_than_the_buckets_is_unsupported(
    url: str, connected: Connected, ttl: float
) -> None:
    async with connected(url) as registry:
        with pytest.raises(Unsupported, match="set register_ttl between 1 s and 2 s"):
            await registry.register(NODE, ttl=ttl)


@pytest.mark.asyncio
async def test_half_of_the_buckets_time_is_the_least(
    server: NatsServer, connected: Connected
) -> None:
    async with connected(f"nats-kv://{server.address}?bucket_ttl=10s&bucket=ten") as registry:
        assert registry.features.min_ttl == 5
        with pytest.raises(Unsupported, match="5 s is the least"):
            await registry.register(NODE, ttl=4)
        await registry.register(NODE, ttl=5)


@pytest.mark.asyncio
async def test_the_bucket_that_is_there_decides(server: NatsServer, connected: Connected) -> None:
    async with connected(f"nats-kv://{server.address}?bucket_ttl=20s&bucket=first") as first:
        async with connected(f"nats-kv://{server.address}?bucket_ttl=90s&bucket=first") as second:
            assert first.features == second.features


@pytest.mark.asyncio
async def test_a_bucket_that_keeps_entries_for_ever_is_refused(
    server: NatsServer, connected: Connected, raw: Raw
) -> None:
    async with raw(server.address) as client:
        await client.jetstream().create_key_value(bucket="plain")
    with pytest.raises(ConfigError, match="entries live for ever"):
        async with connected(f"nats-kv://{server.address}?bucket=plain"):
            pass


@pytest.mark.asyncio
async def test_a_new_bucket_has_the_default_time_to_live(
    server: NatsServer, connected: Connected
) -> None:
    async with connected(f"nats-kv://{server.address}?bucket=default") as registry:
        await registry.register(NODE, ttl=30)
        assert await registry.get("greeter") == (NODE,)
