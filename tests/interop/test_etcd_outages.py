"""Unmodified Go Micro and ours on one etcd, while it is away and when it has lost its data.

Both sides have short leases, which Go Micro renews, or makes anew, at each interval.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.interop.columns import Column
from tests.interop.gophers import Gopher
from tests.interop.ours import Helloworld, Request, Response, caller, our_service

import micro
from micro.testing import eventually
from micro.testing.servers import EtcdServer

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.parametrize(
        "column", [Column("etcd", "v4.11.0")], ids=str, indirect=True, scope="module"
    ),
]


async def test_both_go_on_being_found_when_etcd_is_killed_and_comes_back(
    column: Column, program: Path, go: Gopher, name: str, etcd: EtcdServer
) -> None:
    async with our_service(name), caller(go.name) as (web, watch), caller(name) as (_, own):
        async with outlasting(column, program, f"{name}-candle") as candle:
            helloworld = web.client(go.name, Helloworld)

            async def outlasted() -> bool:
                assert await helloworld.call(Request("Alice")) == Response("Hello Alice")
                return not candle.nodes

            etcd.kill()
            await eventually(lambda: watch.state == own.state == candle.state == "stale")
            assert not await outlasted()  # found as it was last known
            await asyncio.to_thread(etcd.start)
            await eventually(lambda: watch.state == own.state == "live", within=5.0 + 2.0)
            await eventually(outlasted, within=2 * column.ttl + 1.0 + 2.0, every=0.05)
        assert await go.call(name, "Helloworld.Call", "Gopher") == "Hello Gopher"
        assert await go.told("calls", name, "1000") == 0


async def test_both_are_found_again_when_etcd_has_lost_its_data(
    column: Column, go: Gopher, name: str, etcd: EtcdServer
) -> None:
    async with our_service(name), caller(go.name):
        await asyncio.to_thread(etcd.restart, keep_data=False)
        for service in (go.name, name):
            async with asyncio.timeout(5.0 + 2.0), caller(service) as (web, _):
                assert await go.get(service)
                helloworld = web.client(service, Helloworld)
                assert await helloworld.call(Request("Alice")) == Response("Hello Alice")


@asynccontextmanager
async def outlasting(column: Column, program: Path, name: str) -> AsyncIterator[micro.Watch]:
    """A node that nobody renews, with a lease twice as long as those of others: once it is
    gone, who is still found has been renewed."""
    with Gopher(program, name, MICRO_REGISTER_TTL=str(2 * column.ttl)) as process:
        async with caller(name) as (_, watch):
            process.kill()
            yield watch
