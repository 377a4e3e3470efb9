"""Everything inside this process: the reference model of each interface.

``memory`` is private to one service; ``memory://name`` is shared by all services that share their
``Plugins``.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import msgspec

from micro.backend import Connections
from micro.backends._memory_transport import MemoryChannel, MemoryListener, Ports
from micro.call import Handler
from micro.errors import Closed, ConfigError, Gap, ServiceNotFound, TooLarge, Unsupported
from micro.registry import (
    NODE_SIZE,
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_node,
    check_service,
    check_ttl,
    in_order,
)
from micro.transport import (
    Channel,
    Limits,
    Listener,
    Transport,
    TransportFeatures,
    split_address,
)
from micro.url import URL

if TYPE_CHECKING:
    from ssl import SSLContext

#: How many changes a follower may be behind before it must take a new snapshot.
_HISTORY = 1024


class _Nodes:
    """The registered nodes, their expiry and the last changes."""

    def __init__(self) -> None:
        self.revision = 0
        self.changes: deque[tuple[int, Change]] = deque(maxlen=_HISTORY)
        self._nodes: dict[tuple[str, str], tuple[Node, float]] = {}
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, node: Node, ttl: float) -> None:
        key = (node.service, node.id)
        before = self._nodes.get(key)
        self._nodes[key] = (node, time.monotonic() + ttl)
        if before is None:
            self._record(Change(kind="create", node=node))
        elif before[0] != node:
            self._record(Change(kind="update", node=node))
        self._schedule()

    def remove(self, node: Node) -> None:
        known = self._nodes.pop((node.service, node.id), None)
        if known is not None:
            self._record(Change(kind="delete", node=known[0]))

    def of(self, service: str | None) -> tuple[Node, ...]:
        self._expire()
        nodes = (node for node, _ in self._nodes.values())
        return in_order(node for node in nodes if service in (None, node.service))

    async def wait(self) -> None:
        await self._changed.wait()

    def wake(self) -> None:
        """Have all who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _record(self, change: Change) -> None:
        self.revision += 1
        self.changes.append((self.revision, change))
        self.wake()

    def _schedule(self) -> None:
        self.close()
        if self._nodes:
            left = min(until for _, until in self._nodes.values()) - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0.001), self._expire)

    def _expire(self) -> None:
        now = time.monotonic()
        for node, until in tuple(self._nodes.values()):
            if until <= now:
                self.remove(node)
        self._schedule()


@asynccontextmanager
async def _nodes() -> AsyncIterator[_Nodes]:
    nodes = _Nodes()
    try:
        yield nodes
    finally:
        nodes.close()


class MemoryRegistry(Registry):
    """Nodes in a dictionary."""

    schemes: ClassVar[tuple[str, ...]] = ("memory",)
    features: RegistryFeatures = RegistryFeatures(min_ttl=0.01, converge=0.0, history=True)
    _state: _Nodes | None = None

    async def connect(self, connections: Connections) -> None:
        self.url.options(self.Options)
        place, key = _place(connections, self.url)
        self._state = await place.get((*key, "nodes"), _nodes)

    async def aclose(self) -> None:
        nodes, self._state = self._state, None
        if nodes is not None:
            nodes.wake()

    async def register(self, node: Node, *, ttl: float) -> None:
        nodes = self._open()
        check_ttl(ttl, self.features)
        size = len(msgspec.json.encode(check_node(node)))
        if size > NODE_SIZE:
            raise TooLarge(f"node {node.id} of {node.service}: {size} bytes, {NODE_SIZE} at most")
        nodes.put(node, ttl)

    async def deregister(self, node: Node) -> None:
        self._open().remove(check_node(node))

    async def get(self, service: str) -> tuple[Node, ...]:
        found = self._open().of(check_service(service))
        if not found:
            raise ServiceNotFound(f"service {service!r} is not registered")
        return found

    async def services(self) -> tuple[str, ...]:
        return tuple(sorted({node.service for node in self._open().of(None)}))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        nodes = self._open()
        if service is not None:
            check_service(service)
        if isinstance(mark, int):
            seen = mark
            self._check(nodes, seen)
            yield seen, None
        else:
            snapshot = Snapshot(nodes=nodes.of(service))
            seen = nodes.revision
            yield seen, snapshot
        while True:
            self._check(nodes, seen)
            behind = nodes.revision - seen
            for revision, change in tuple(nodes.changes)[len(nodes.changes) - behind :]:
                seen = revision
                if service in (None, change.node.service):
                    yield seen, change
            if seen == nodes.revision:
                await nodes.wait()
                self._open()

    def _check(self, nodes: _Nodes, seen: int) -> None:
        if seen > nodes.revision or nodes.revision - seen > len(nodes.changes):
            raise Gap(f"memory: changes after {seen} are no longer known")

    def _open(self) -> _Nodes:
        if self._state is None:
            raise Closed("memory: the registry is not connected")
        return self._state


@asynccontextmanager
async def _ports() -> AsyncIterator[Ports]:
    yield Ports()


class MemoryTransport(Transport):
    """Calls straight into a handler of this process, with a copy of what they carry."""

    schemes: ClassVar[tuple[str, ...]] = ("memory",)
    features: TransportFeatures = TransportFeatures(name="memory", multi_process=False)
    _state: Ports | None = None

    async def connect(self, connections: Connections) -> None:
        self.url.options(self.Options)
        place, key = _place(connections, self.url)
        self._state = await place.get((*key, "ports"), _ports)

    async def aclose(self) -> None:
        self._state = None

    async def dial(
        self, address: str, limits: Limits, *, tls: SSLContext | None = None, timeout: float
    ) -> Channel:
        ports = self._open(tls)
        split_address(address)
        return MemoryChannel(ports, address, limits)

    async def listen(
        self, address: str, handler: Handler, limits: Limits, *, tls: SSLContext | None = None
    ) -> Listener:
        ports = self._open(tls)
        if split_address(address)[1] == 0:
            address = ports.free()
        if address in ports.open:
            raise ConfigError(
                f"address {address} is in use in this process; port 0 takes a free one"
            )
        return MemoryListener(ports, address, handler, limits)

    def _open(self, tls: SSLContext | None) -> Ports:
        if self._state is None:
            raise Closed("memory: the transport is not connected")
        if tls is not None:
            raise Unsupported("memory: no TLS, since calls do not leave the process")
        return self._state


def _place(connections: Connections, url: URL) -> tuple[Connections, tuple[str, ...]]:
    """Where the state lives: with the service, or with its Plugins when the URL has a name."""
    return (connections.shared if url.hosts else connections, ("memory", *url.hosts, url.path))
