"""Everything inside this process: the reference model of each interface.

``memory`` is private to one service; ``memory://name`` is shared by all services that share their
``Plugins``.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import ClassVar

import msgspec

from micro.backend import Connections
from micro.call import Body, Call, Handler, Reply, decode_error, encode_error
from micro.errors import (
    Closed,
    ConfigError,
    Gap,
    InvalidArgument,
    MicroError,
    ServiceNotFound,
    TooLarge,
    Unavailable,
)
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
from micro.transport import Channel, Limits, Listener, Transport, TransportFeatures
from micro.url import URL

#: How many changes a follower may be behind before it must take a new snapshot.
_HISTORY = 1024
#: Seconds that cancelled handlers have to end when their listener closes.
_LAST_WAIT = 0.3


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


class _Ports:
    """Which handler listens where."""

    def __init__(self) -> None:
        self.open: dict[str, _MemoryListener] = {}
        self.free = (f"memory:{port}" for port in itertools.count(1))


@asynccontextmanager
async def _ports() -> AsyncIterator[_Ports]:
    yield _Ports()


class MemoryTransport(Transport):
    """Calls straight into a handler of this process, with a copy of what they carry."""

    schemes: ClassVar[tuple[str, ...]] = ("memory",)
    features: TransportFeatures = TransportFeatures(name="memory", multi_process=False)
    _state: _Ports | None = None

    async def connect(self, connections: Connections) -> None:
        self.url.options(self.Options)
        place, key = _place(connections, self.url)
        self._state = await place.get((*key, "ports"), _ports)

    async def aclose(self) -> None:
        self._state = None

    async def dial(self, address: str, *, timeout: float) -> Channel:
        if ":" not in address:
            raise InvalidArgument(f"address {address!r}: write host:port")
        return _MemoryChannel(self._open(), address)

    async def listen(self, address: str, handler: Handler, limits: Limits) -> Listener:
        ports = self._open()
        if address.endswith(":0"):
            address = next(port for port in ports.free if port not in ports.open)
        if address in ports.open:
            raise ConfigError(
                f"address {address} is in use in this process; port 0 takes a free one"
            )
        listener = _MemoryListener(ports, address, handler, limits)
        ports.open[address] = listener
        return listener

    def _open(self) -> _Ports:
        if self._state is None:
            raise Closed("memory: the transport is not connected")
        return self._state


class _MemoryListener(Listener):
    def __init__(self, ports: _Ports, address: str, handler: Handler, limits: Limits) -> None:
        self.address = address
        self.limits = limits
        self._ports = ports
        self._handler = handler
        self._running: set[asyncio.Task[Reply]] = set()

    async def run(self, call: Call, body: Body) -> Reply:
        if len(body) > self.limits.message:
            raise TooLarge(f"the request has {len(body)} bytes, {self.limits.message} at most")
        task = asyncio.create_task(self._answer(call, body), context=contextvars.Context())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Unavailable(f"{self.address}: the server closed during the call") from None
            task.cancel()
            raise

    async def _answer(self, call: Call, body: Body) -> Reply:
        try:
            reply = await self._handler(call, body)
        except MicroError as exc:
            raise decode_error(encode_error(exc, id=call.service)) from None
        if len(reply.body) > self.limits.message:
            raise TooLarge(f"the reply has {len(reply.body)} bytes, {self.limits.message} at most")
        return reply

    async def drain(self, grace: float) -> None:
        self._ports.open.pop(self.address, None)
        if self._running:
            await asyncio.wait(self._running, timeout=grace)

    async def aclose(self) -> None:
        self._ports.open.pop(self.address, None)
        for task in self._running:
            task.cancel()
        if self._running:  # a handler that ignores its cancellation must not hold the process
            await asyncio.wait(self._running, timeout=_LAST_WAIT)


class _MemoryChannel(Channel):
    def __init__(self, ports: _Ports, address: str) -> None:
        self._ports = ports
        self._address = address
        self._running = 0
        self._idle = asyncio.Event()
        self._closed = False

    async def call(self, call: Call, body: Body) -> Reply:
        listener = self._ports.open.get(self._address)
        if self._closed:
            raise Closed(f"channel to {self._address}: used after it was closed")
        if listener is None:
            raise Unavailable(f"{self._address}: nobody listens there in this process", sent=False)
        sent = msgspec.structs.replace(call, metadata=dict(call.metadata), peer="memory")
        self._running += 1
        try:
            return await listener.run(sent, body)
        finally:
            self._running -= 1
            self._idle.set()

    async def aclose(self, *, grace: float = 0) -> None:
        self._closed = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()


def _place(connections: Connections, url: URL) -> tuple[Connections, tuple[str, ...]]:
    """Where the state lives: with the service, or with its Plugins when the URL has a name."""
    return (connections.shared if url.hosts else connections, ("memory", *url.hosts, url.path))
