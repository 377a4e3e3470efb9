"""Nodes in a bucket: what JetStream does that the registry stands on, and what is its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from nats.aio.client import Client as NatsClient
from nats.js.errors import KeyNotFoundError

from micro.errors import ConfigError, Gap, ServiceNotFound, TooLarge, Unavailable
from micro.follow import View, Watch
from micro.registry import Change, Node, Registry, Snapshot
from micro.testing import eventually
from micro.testing.servers import NatsServer
from micro.url import URL
from micro_plugin_nats import NatsKVRegistry

Connected = Callable[..., AbstractAsyncContextManager[Registry]]
Raw = Callable[..., AbstractAsyncContextManager[NatsClient]]
Publish = Callable[..., Awaitable[None]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0
BUCKET = "micro-registry"


@pytest_asyncio.fixture
async def registry(kv_url: str, connected: Connected) -> AsyncIterator[Registry]:
    async with connected(kv_url) as registry:
        yield registry


@asynccontextmanager
async def watching(registry: Registry, service: str | None = "greeter") -> AsyncIterator[Watch]:
    view = View(registry, service, ttl=30)
    try:
        async with view.watch() as watch:
            yield watch
    finally:
        await view.aclose()


async def consumers(client: NatsClient) -> int:
    info = await client.jetstream().stream_info(f"KV_{BUCKET}")
    return info.state.consumer_count


def key(url: str, node: Node) -> str:
    return f"{URL.parse(url).path}.{node.service.replace('.', '/')}.{node.id}"


# -- what JetStream does --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_jetstream_keeps_no_message_for_less_than_a_second(
    nats: NatsServer, registry: Registry, raw: Raw
) -> None:
    async with raw(nats.address) as client:
        asked = client.request(f"$KV.{BUCKET}.a.b.c", b"{}", headers={"Nats-TTL": "500ms"})
        assert "error" in json.loads((await asked).data)
    assert registry.features.min_ttl == 1.0


@pytest.mark.asyncio
async def test_what_has_expired_is_an_entry_without_a_value_and_no_node(
    nats: NatsServer, kv_url: str, registry: Registry, raw: Raw
) -> None:
    await registry.register(NODE, ttl=1)
    async with raw(nats.address) as client:
        bucket = await client.jetstream().key_value(BUCKET)

        async def is_a_marker() -> bool:
            return (await bucket.get(key(kv_url, NODE))).value is None

        await eventually(is_a_marker, within=2 + SLACK)
    with pytest.raises(ServiceNotFound):
        await registry.get("greeter")
    assert await registry.services() == ()
    async with watching(registry) as watch:
        assert watch.nodes == ()
    assert registry.dropped == 0


@pytest.mark.asyncio
async def test_who_follows_is_told_what_expires(registry: Registry) -> None:
    await registry.register(NODE, ttl=1)
    async with watching(registry) as watch, asyncio.timeout(2 + SLACK):
        assert await anext(watch) == Change(kind="delete", node=NODE)


@pytest.mark.asyncio
async def test_what_expires_while_the_server_is_down_is_gone_when_it_is_back(
    nats: NatsServer, registry: Registry
) -> None:
    await registry.register(NODE, ttl=1)
    await registry.register(OTHER, ttl=60)
    began = time.monotonic()
    async with watching(registry) as watch:
        await asyncio.to_thread(nats.stop)
        await eventually(lambda: time.monotonic() > began + 1.5, within=2 + SLACK)
        await asyncio.to_thread(nats.start)
        await eventually(lambda: watch.nodes == (OTHER,), within=2 + SLACK)


@pytest.mark.asyncio
async def test_a_watch_is_not_silent_after_a_restart(
    nats: NatsServer, kv_url: str, connected: Connected, registry: Registry, raw: Raw
) -> None:
    """A consumer that outlives its connection is: what nats-py watches says nothing for seconds."""
    async with connected(kv_url) as other, watching(other) as watch, raw(nats.address) as client:
        theirs: Any = await (await client.jetstream().key_value(BUCKET)).watch(key(kv_url, NODE))
        assert await theirs.updates() is None  # there is nothing yet
        await asyncio.to_thread(nats.restart)
        await eventually(lambda: watch.state == "stale", within=SLACK)
        await eventually(lambda: registers(registry, NODE), within=SLACK)
        await eventually(lambda: watch.nodes == (NODE,), within=2 + SLACK)
        await theirs.stop()


async def registers(registry: Registry, node: Node) -> bool:
    try:
        await registry.register(node, ttl=60)
    except Unavailable:
        return False
    return True


# -- what is ours ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_heartbeat_is_no_change(kv_url: str, connected: Connected) -> None:
    async with connected(kv_url) as registry, connected(kv_url) as other:
        await registry.register(NODE, ttl=60)
        async with aclosing(other.follow("greeter", None)) as stream:
            assert (await anext(stream))[1] == Snapshot(nodes=(NODE,))
            for _ in range(3):
                await registry.register(NODE, ttl=60)
            await registry.register(OTHER, ttl=60)
            async with asyncio.timeout(1 + SLACK):
                assert (await anext(stream))[1] == Change(kind="create", node=OTHER)


@pytest.mark.asyncio
async def test_there_is_no_going_on_from_a_mark(registry: Registry) -> None:
    async with aclosing(registry.follow("greeter", None)) as stream:
        mark, _ = await anext(stream)
    with pytest.raises(Gap):
        await anext(registry.follow("greeter", mark))


@pytest.mark.asyncio
async def test_an_entry_under_a_foreign_key_is_no_node(
    nats: NatsServer, kv_url: str, registry: Registry, raw: Raw
) -> None:
    await registry.register(NODE, ttl=60)
    async with raw(nats.address) as client:
        bucket = await client.jetstream().key_value(BUCKET)
        record = (await bucket.get(key(kv_url, NODE))).value
        assert record is not None
        await bucket.put(key(kv_url, OTHER), record)
        assert await registry.get("greeter") == (NODE,)
    assert registry.dropped == 1


@pytest.mark.asyncio
async def test_a_watch_that_ends_leaves_nothing_on_the_server(
    nats: NatsServer, registry: Registry, raw: Raw
) -> None:
    async with raw(nats.address) as client:
        before = await consumers(client)
        async with watching(registry), watching(registry, None):
            assert await consumers(client) == before + 2
        await registry.services()
        await eventually(lambda: _are(client, before), within=1 + SLACK)


async def _are(client: NatsClient, count: int) -> bool:
    return await consumers(client) == count


@pytest.mark.asyncio
async def test_a_bucket_that_was_deleted_is_made_by_the_next_heartbeat(
    nats: NatsServer, kv_url: str, connected: Connected, raw: Raw
) -> None:
    async with connected(kv_url) as registry, connected(kv_url) as other:
        await registry.register(NODE, ttl=60)
        async with watching(other) as watch, raw(nats.address) as client:
            await client.jetstream().delete_key_value(BUCKET)
            await registry.register(OTHER, ttl=60)
            assert await registry.get("greeter") == (OTHER,)
            await eventually(lambda: watch.nodes == (OTHER,), within=5 + SLACK)


@pytest.mark.asyncio
async def test_twenty_who_find_no_bucket_make_one(nats: NatsServer, connected: Connected) -> None:
    url = f"nats-kv://{nats.address}?bucket=race"
    async with asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(_use(connected, url))


async def _use(connected: Connected, url: str) -> None:
    async with connected(url) as registry:
        await registry.register(NODE, ttl=60)
        assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_a_bucket_that_keeps_entries_for_ever_is_refused(
    nats: NatsServer, connected: Connected, raw: Raw
) -> None:
    async with raw(nats.address) as client:
        js = client.jetstream()
        await js.create_key_value(bucket="plain")
        text = "--registry: .*bucket 'plain' was not made for nodes: nobody is told .*bucket="
        with pytest.raises(ConfigError, match=text):
            async with connected(f"nats-kv://{nats.address}?bucket=plain"):
                pass
        with pytest.raises(KeyNotFoundError):
            await (await js.key_value("plain")).get("a")


@pytest.mark.asyncio
async def test_a_node_over_what_the_server_takes_is_too_large(
    nats_binary: Path, tmp_path: Path, connected: Connected
) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 4096")
    large = msgspec.structs.replace(NODE, metadata={"large": "x" * 8000})
    with NatsServer(nats_binary, tmp_path, arguments=["-c", str(config)]) as server:
        for scheme in ("nats", "nats-kv"):
            async with connected(f"{scheme}://{server.address}") as registry:
                with pytest.raises(TooLarge, match="4096 at most"):
                    await registry.register(large, ttl=60)
                await registry.register(NODE, ttl=60)
                assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_a_server_without_jetstream_is_told(
    nats_binary: Path, tmp_path: Path, connected: Connected
) -> None:
    with _Plain(nats_binary, tmp_path) as server:
        with pytest.raises(Unavailable, match="start the server with -js"):
            async with connected(f"nats-kv://{server.address}"):
                pass
        async with connected(f"nats://{server.address}") as registry:  # which needs none
            await registry.register(NODE, ttl=60)


class _Plain(NatsServer):
    def command(self, data: Path, ports: object) -> list[str | Path]:
        return [self._binary, "-a", "127.0.0.1", "-p", str(self.port)]


@pytest.mark.asyncio
async def test_the_least_time_to_live_is_said_before_it_is_connected() -> None:
    assert NatsKVRegistry(URL.parse("nats-kv")).features.min_ttl == 1.0
