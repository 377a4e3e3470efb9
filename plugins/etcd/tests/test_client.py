"""Calls: which host they go to, how long they may take, and what their errors say."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from micro.errors import ResourceExhausted, TooLarge, Unavailable
from micro.registry import Node
from micro.testing.ports import HOST, unused_ports
from micro.testing.proxy import FaultProxy
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry

Ask = Callable[..., dict[str, Any]]
Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
#: Seconds that a busy machine gets.
SLACK = 2.0


def path(url: str) -> str:
    """The namespace of a URL."""
    return url.rpartition("/")[2]


@pytest.mark.asyncio
async def test_what_is_far_away_can_be_reached(
    connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    async with FaultProxy(etcd.address) as proxy:
        proxy.latency(0.2)
        async with connected(f"etcd://{proxy.address}/{path(etcd_url)}") as registry:
            await registry.register(NODE, ttl=60)
            assert await registry.get("greeter") == (NODE,)


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_each_host_has_its_share_of_the_time(
    connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    (dead,) = unused_ports(1)
    await asyncio.to_thread(etcd.pause)
    began = time.monotonic()
    try:
        with pytest.raises(Unavailable, match=re.escape(f"{etcd.address}: no answer in 1 s")):
            async with connected(f"etcd://{HOST}:{dead},{etcd.address}?timeout=2s"):
                pass
    finally:
        etcd.resume()
    assert time.monotonic() - began < 2 + SLACK


@pytest.mark.asyncio
async def test_a_host_that_falls_silent_costs_its_share_of_the_time_and_once(
    connected: Connected, etcd_binary: Path, tmp_path: Path, etcd: EtcdServer, etcd_url: str
) -> None:
    (dead,) = unused_ports(1)
    with EtcdServer(etcd_binary, tmp_path) as silent:
        hosts = f"{silent.address},{etcd.address},{HOST}:{dead}"
        async with connected(f"etcd://{hosts}/{path(etcd_url)}?timeout=3s") as registry:
            await registry.register(NODE, ttl=60)
            await asyncio.to_thread(silent.pause)
            began = time.monotonic()
            for _ in range(20):
                await registry.register(NODE, ttl=60)
            assert time.monotonic() - began < 1.0 + SLACK


# -- what a server refuses ------------------------------------------------------------------------


@pytest.fixture
def small(etcd_binary: Path, tmp_path: Path) -> Iterator[EtcdServer]:
    """It takes little, and keeps little."""
    flags = ("--max-request-bytes=20000", f"--quota-backend-bytes={128 * 1024}")
    with EtcdServer(etcd_binary, tmp_path, arguments=flags) as server:
        yield server


@pytest.mark.asyncio
async def test_a_node_over_what_the_server_takes_is_too_large(
    connected: Connected, small: EtcdServer
) -> None:
    async with connected(small.url) as registry:
        with pytest.raises(TooLarge):
            await registry.register(
                msgspec.structs.replace(NODE, metadata={"a": "x" * 40_000}), ttl=60
            )
        await registry.register(NODE, ttl=60)


@pytest.mark.asyncio
async def test_a_server_that_is_full_is_resource_exhausted_and_still_read(
    connected: Connected, small: EtcdServer
) -> None:
    async with connected(small.url) as registry:
        with pytest.raises(ResourceExhausted, match="space"):
            for step in range(100):
                large = msgspec.structs.replace(NODE, metadata={"a": f"{step:8000}"})
                await registry.register(large, ttl=60)
        assert len(await registry.get("greeter")) == 1


@pytest.mark.asyncio
async def test_a_watch_that_the_server_does_not_take_ends_and_waits_for_nothing(
    connected: Connected, etcd_binary: Path, tmp_path: Path
) -> None:
    with EtcdServer(etcd_binary, tmp_path, arguments=["--max-concurrent-streams=1"]) as server:
        async with connected(server.url) as registry:
            assert registry._etcd is not None
            mark = (await registry._etcd.read(b"/")).mark
            async with aclosing(registry._etcd.watch(b"/", mark)) as watch:
                assert await anext(watch) is None
                with pytest.raises(Unavailable, match="takes nothing"):
                    async with asyncio.timeout(2 + SLACK):
                        await anext(registry._etcd.watch(b"/", mark))
