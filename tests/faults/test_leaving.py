"""Who leaves is soon known to have left, by every client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from tests.faults.fleet import SLACK
from tests.faults.nodes import Process

import micro
from micro.follow import Watch
from micro.testing import eventually, serving

TTL = 2.0
CLIENTS = 3


@pytest.mark.asyncio
async def test_a_node_killed_is_out_of_every_client_one_second_after_its_time_to_live(
    etcd_url: str, tmp_path: Path
) -> None:
    async with watched(etcd_url, tmp_path) as (node, watches):
        node.popen.kill()
        took = await seconds_until_gone(watches)

    assert took < TTL + 1 + SLACK


@pytest.mark.asyncio
async def test_a_node_that_stops_is_out_of_every_client_in_half_a_second(
    etcd_url: str, tmp_path: Path
) -> None:
    async with watched(etcd_url, tmp_path) as (node, watches):
        node.popen.terminate()
        took = await seconds_until_gone(watches)

    assert took < 0.5 + SLACK


@asynccontextmanager
async def watched(url: str, folder: Path) -> AsyncIterator[tuple[Process, list[Watch]]]:
    """A process that serves helloworld, and the watches of several clients, which see it."""
    node = Process.start("node", folder, registry=url, ttl=TTL)
    async with AsyncExitStack() as stack:
        stack.callback(node.popen.wait, 10)
        stack.callback(node.popen.kill)
        watches: list[Watch] = []
        for _ in range(CLIENTS):
            app = micro.Service("app", registry=url)
            client = await stack.enter_async_context(serving(app, {}))
            watches.append(await stack.enter_async_context(client.watch("helloworld")))
        await eventually(lambda: all(watch.nodes for watch in watches), within=20)
        yield node, watches


async def seconds_until_gone(watches: list[Watch]) -> float:
    began = time.monotonic()

    async def gone(watch: Watch) -> None:
        while watch.nodes:
            await anext(watch)

    async with asyncio.timeout(20):
        await asyncio.gather(*map(gone, watches))
    return time.monotonic() - began
