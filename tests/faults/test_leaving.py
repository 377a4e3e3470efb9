"""Who leaves is soon known to have left, by every client."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from tests.faults.backends import BACKENDS, SLACK
from tests.faults.nodes import Process

import micro
from micro.follow import Watch
from micro.testing import eventually, serving

TTL = 2.0
CLIENTS = 3
#: Seconds until a node that was killed, and one that stops, is out of every client.
BOUNDS = {
    "etcd": (TTL + 1, 0.5),
    "consul": (2 * TTL + 1, 0.5),
    "nats": (TTL + 1, 0.5),
    "nats-kv": (TTL + 1, 0.5),
    "mdns": (TTL + 3, 2.0),
}
_NEW_NETWORK = 0x40000000


@pytest.fixture(params=BOUNDS)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(request: pytest.FixtureRequest, scheme: str) -> Iterator[str]:
    """A registry's, with a namespace, or for mdns a network, of this test's own."""
    if scheme == "mdns":
        with own_network():
            yield scheme
        return
    program = BACKENDS[scheme].program
    yield scheme + request.getfixturevalue(f"{program}_url").removeprefix(program)


@pytest.mark.asyncio
async def test_node_that_is_killed_is_soon_out_of_every_client(
    scheme: str, url: str, tmp_path: Path
) -> None:
    async with watched(url, tmp_path) as (node, watches):
        node.popen.kill()
        took = await seconds_until_gone(watches)

    assert took < BOUNDS[scheme][0] + SLACK


@pytest.mark.asyncio
async def test_node_that_stops_is_at_once_out_of_every_client(
    scheme: str, url: str, tmp_path: Path
) -> None:
    async with watched(url, tmp_path) as (node, watches):
        node.popen.terminate()
        took = await seconds_until_gone(watches)

    assert took < BOUNDS[scheme][1] + SLACK


@contextmanager
def own_network() -> Iterator[None]:
    """A network with nothing but lo, for this thread and what it starts."""
    libc = ctypes.CDLL(None)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_NEW_NETWORK) != 0:
            pytest.skip("needs a network namespace")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            assert libc.setns(home, _NEW_NETWORK) == 0
    finally:
        os.close(home)


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
