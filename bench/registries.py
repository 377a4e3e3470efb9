"""What a registry's client does under a load: heartbeats, reads, and changes that are seen.

The same for a plugin and for the raw client that it is compared with, which has no checks.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.load import Job, Point, load
from tools.servers.provision import obtain

from micro.registry import Endpoint, Node, Value
from micro.testing.ports import unused_ports
from micro.testing.servers import ConsulServer, EtcdServer, NatsServer, Server

SERVICE = "bench"
#: The nodes that are read at once.
READ = 3
TTL = 30.0
#: Seconds that a server has to elect itself, and a change to be seen.
PATIENCE = 20.0
#: Which server a scheme needs.
SERVERS: dict[str, tuple[str, type[EtcdServer | ConsulServer | NatsServer]]] = {
    "etcd": ("etcd", EtcdServer),
    "consul": ("consul", ConsulServer),
    "nats": ("nats", NatsServer),
    "nats-kv": ("nats", NatsServer),
}


class Seen(NamedTuple):
    """A node that a follower was told of, and which of its changes."""

    id: str
    change: str


class RegistryClient(ABC):
    """A plugin, or a raw client that does the same."""

    @abstractmethod
    async def open(self) -> None:
        """Connect; again, when it has failed."""

    @abstractmethod
    async def beat(self, node: Node) -> None:
        """Register a node, and at all later times its heartbeat."""

    @abstractmethod
    async def get(self) -> list[str]:
        """The ids of all nodes, each of them read whole."""

    @abstractmethod
    def follow(self) -> AsyncIterator[list[Seen]]:
        """The nodes that there are, then each change, read whole."""

    @abstractmethod
    async def aclose(self) -> None:
        """Give everything back."""


def node(number: int, change: int = 0) -> Node:
    """As a service of one handler registers itself."""
    fields = (Value(name="name", type="string"),)
    return Node(
        service=SERVICE,
        id=f"node-{number}",
        address=f"127.0.0.1:{10_000 + number}",
        version="1.5",
        metadata={
            "transport": "http",
            "protocol": "mucp",
            "server": "mucp",
            "transports": "tcp,http",
            "change": str(change),
        },
        endpoints=tuple(
            Endpoint(
                name=f"Helloworld.{name}",
                request=Value(name="Request", type="Request", values=fields),
                response=Value(name="Response", type="Response", values=fields),
            )
            for name in ("Call", "Stream")
        ),
    )


def serve(port: int, options: Sequence[str]) -> None:
    """Become the server of the scheme that is the first option."""
    name, kind = SERVERS[options[0]]
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    server: Server = kind(obtain(name), folder)
    command = server.command(folder, (port, *unused_ports(server.port_count - 1)))
    _clear_up_after(folder)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.execv(command[0], [str(word) for word in command])


def _clear_up_after(folder: Path) -> None:
    """Have the folder gone when the server has ended: it is killed, and can do nothing more."""
    read, write = os.pipe()
    os.set_inheritable(write, True)  # noqa: FBT003 - os takes it so
    if os.fork() == 0:
        os.close(write)
        os.read(read, 1)  # until nobody holds the other end
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


async def drive(job: Job, client: RegistryClient, writer: RegistryClient) -> Point:
    """The load of ``job``; ``writer`` is a raw client, which makes the changes to be seen."""
    await _until_it_answers(client.open)
    await _until_it_answers(writer.open)
    await _until_it_answers(lambda: writer.beat(node(0)))
    try:
        return await {"beat": _beats, "get": _reads, "follow": _follows}[job.kind](
            job, client, writer
        )
    finally:
        await client.aclose()
        await writer.aclose()


async def _until_it_answers(attempt: Callable[[], Awaitable[None]]) -> None:
    """A server that has just started has elected nobody yet."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with suppress(Exception):  # of any client's own kind
                return await attempt()
            await asyncio.sleep(0.05)


async def _beats(job: Job, client: RegistryClient, _: RegistryClient) -> Point:
    """Each caller keeps a node of its own."""

    def caller(number: int) -> Callable[[], Awaitable[bool]]:
        own = node(number)

        async def beat() -> bool:
            await client.beat(own)
            return True

        return beat

    return await load(job, [caller(number) for number in range(job.callers)], bool)


async def _reads(job: Job, client: RegistryClient, writer: RegistryClient) -> Point:
    for number in range(READ):
        await writer.beat(node(number))
    names = [f"node-{number}" for number in range(READ)]
    return await load(job, [client.get], lambda found: sorted(found) == names)


async def _follows(job: Job, client: RegistryClient, writer: RegistryClient) -> Point:
    """Each caller changes a node of its own, and waits until the one follower was told of it."""
    waiting: dict[Seen, asyncio.Event] = {}
    begun = asyncio.Event()

    async def follow() -> None:
        async for told in client.follow():
            begun.set()
            for seen in told:
                if seen in waiting:
                    waiting.pop(seen).set()

    def caller(number: int) -> Callable[[], Awaitable[bool]]:
        count = 0

        async def change() -> bool:
            nonlocal count
            count += 1
            seen = waiting[Seen(f"node-{number}", str(count))] = asyncio.Event()
            await writer.beat(node(number, count))
            async with asyncio.timeout(PATIENCE):
                await seen.wait()
            return True

        return change

    async with asyncio.TaskGroup() as group:
        following = group.create_task(follow())
        await begun.wait()
        point = await load(job, [caller(number) for number in range(job.callers)], bool)
        following.cancel()
    return point
