"""Where calls go: the nodes of each service that is called, and the channels to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from contextvars import ContextVar
from functools import partial
from typing import Protocol, TypeAlias, cast

from micro.call import Body, Call, Reply
from micro.errors import Internal, MicroError, ServiceNotFound, Unavailable
from micro.follow import View
from micro.registry import Node, Registry, check_service
from micro.selector import Candidate, least_busy_of_two
from micro.stats import Stats
from micro.transport import Channel, Limits, Transport

#: The metadata by which a node tells all transports of its port, the best first.
TRANSPORTS = "transports"

#: Seconds that calls on the channel of a node that has gone have to end.
_GRACE = 10.0
#: Seconds that looking for similar names may add to the error of an unknown service.
_NEAR_MATCHES = 1.5

#: Holds what a stream has entered, until its caller leaves it.
STACK: ContextVar[AsyncExitStack] = ContextVar("micro.routes.stack")

#: The transport's name, and the address.
_Way: TypeAlias = tuple[str, str]


class Means(Protocol):
    """What a client needs of the service that owns it; backends open at first use."""

    request_timeout: float
    register_ttl: float
    limits: Limits

    async def registry(self) -> Registry: ...

    async def transports(self) -> Sequence[Transport]:
        """The best first; the last is what every node speaks."""
        ...


class Peer(Candidate):
    """A node, the way to it, and its channel once there is one."""

    __slots__ = ("channel", "way")

    def __init__(self, node: Node, way: _Way) -> None:
        super().__init__(node)
        self.way = way
        self.channel: Channel | None = None

    def release(self) -> None:
        """A call on it has ended."""
        self.outstanding -= 1


class Routes:
    """Finds the node and the channel for a call; watches each service that is called."""

    def __init__(self, means: Callable[[], Means]) -> None:
        #: What the calls to addresses were.
        self.unregistered = Stats()
        self._means = means
        self._targets: dict[str, Target] = {}
        self._direct: dict[str, Peer] = {}
        self._views: dict[str | None, tuple[View, int]] = {}
        self._channels: dict[_Way, asyncio.Task[Channel]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, call: Call, body: Body) -> Reply:
        """Pick a node and send it the call: the innermost handler of a client.

        What a stream enters is left with the stack of its caller.
        """
        if call.address:
            peer = await self._direct_peer(call.address)
            stats = self.unregistered
        else:
            target = self._targets.get(call.service) or await self._target(call.service)
            peer = target.choose(target.peers() or await self._found(target))
            stats = target.stats
        channel = peer.channel or await self._channel(peer)
        if not isinstance(body, bytes):
            return await self._send_stream(call, body, channel, peer)
        peer.outstanding += 1
        began = time.monotonic()
        try:
            return await channel.call(call, body)
        except Exception:
            stats.errors += 1
            raise
        finally:
            peer.outstanding -= 1
            stats.add(time.monotonic() - began)

    async def _send_stream(
        self, call: Call, body: AsyncIterator[bytes], channel: Channel, peer: Peer
    ) -> Reply:
        stack = STACK.get()
        peer.outstanding += 1
        stack.callback(peer.release)
        reply = await stack.enter_async_context(channel.stream(call, body))
        if call.kind == "client":
            reply.body = await _only(cast("AsyncIterator[bytes]", reply.body))
        return reply

    async def _target(self, service: str) -> Target:
        """The nodes of ``service``.

        Raises:
            InvalidArgument: not the name of a service.
            Unavailable: the registry cannot be reached.
        """
        check_service(service)
        transports = await self._means().transports()
        view = await self.hold(service)
        try:
            await view.entered()
        except BaseException:
            await self.release(service)
            raise
        if service in self._targets:  # another call was first
            await self.release(service)
            return self._targets[service]
        names = tuple(transport.features.name for transport in transports)
        target = Target(view, service, names, self._gone)
        self._targets[service] = target
        return target

    async def _direct_peer(self, address: str) -> Peer:
        """The node at ``address``, registered or not; it speaks what every node speaks."""
        if address not in self._direct:
            transports = await self._means().transports()
            node = Node(service="", id="", address=address)
            self._direct[address] = Peer(node, (transports[-1].features.name, address))
        return self._direct[address]

    async def _found(self, target: Target) -> Sequence[Peer]:
        """Nodes that the consistent read finds, or the error that tells why there are none."""
        registry = await self._means().registry()
        # At once, since each may wait for answers from a network.
        hint = asyncio.create_task(_similar(registry, target.service))
        try:
            nodes = await registry.get(target.service)
        except ServiceNotFound:
            if self._targets.pop(target.service, None):
                await self.release(target.service)
            text = f"service {target.service!r} is not registered{await hint}"
            raise ServiceNotFound(text) from None
        finally:
            hint.cancel()
            await asyncio.gather(hint, return_exceptions=True)
        peers = target.reachable(nodes)
        if not peers:
            raise Unavailable(
                f"no node of {target.service!r} speaks {' or '.join(target.transports)}; "
                "choose another with --transport",
                sent=False,
            )
        return peers

    async def _channel(self, peer: Peer) -> Channel:
        """The channel to a node; whoever asks first dials for all."""
        dialled = self._channels.get(peer.way)
        if dialled is None:
            dialled = asyncio.create_task(self._dial(peer.way))
            self._channels[peer.way] = dialled
            dialled.add_done_callback(partial(self._dialled, peer.way))
        channel = await asyncio.shield(dialled)
        peer.channel = channel
        return channel

    async def hold(self, service: str | None) -> View:
        """The view of a service (None: of all), until it is released."""
        registry = await self._means().registry()
        known = self._views.get(service)
        view = known[0] if known else View(registry, service, ttl=self._means().register_ttl)
        self._views[service] = (view, known[1] + 1 if known else 1)
        return view

    async def release(self, service: str | None) -> None:
        known = self._views.get(service)
        if known is None:
            return
        view, users = known
        if users > 1:
            self._views[service] = (view, users - 1)
            return
        del self._views[service]
        await view.aclose()

    async def aclose(self) -> None:
        """End watches and channels; calls that run fail. A second call does nothing."""
        views = [view for view, _ in self._views.values()]
        self._views.clear()
        self._targets.clear()
        self._direct.clear()
        for view in views:
            await view.aclose()
        channels = tuple(self._channels.values())
        self._channels.clear()
        for dialled in channels:
            dialled.cancel()
            if not dialled.cancelled() and dialled.done() and dialled.exception() is None:
                await dialled.result().aclose()
        await asyncio.gather(*channels, *self._closing, return_exceptions=True)

    def _dialled(self, way: _Way, dialled: asyncio.Task[Channel]) -> None:
        """Forget a failure, so that the next call dials again, whoever still waits for this one."""
        failed = dialled.cancelled() or dialled.exception() is not None
        if failed and self._channels.get(way) is dialled:
            del self._channels[way]

    async def _dial(self, way: _Way) -> Channel:
        means = self._means()
        name, address = way
        for transport in await means.transports():
            if transport.features.name == name:
                return await transport.dial(address, means.limits, timeout=means.request_timeout)
        raise Unavailable(f"no transport {name} is open", sent=False)

    def _gone(self, ways: set[_Way]) -> None:
        """Close the channels of nodes that are registered no more, once their calls have ended."""
        for target in self._targets.values():
            ways = ways - target.ways
        for way in ways:
            dialled = self._channels.pop(way, None)
            if dialled is not None:
                task = asyncio.create_task(_close(dialled))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)


class Target:
    """The nodes of one service that can be called, worked out anew only when the view changes."""

    def __init__(
        self,
        view: View,
        service: str,
        transports: Sequence[str],
        gone: Callable[[set[_Way]], None],
    ) -> None:
        self.service = service
        self.transports = transports
        self.ways: set[_Way] = set()
        self.stats = Stats()
        self.choose = cast("Callable[[Sequence[Peer]], Peer]", least_busy_of_two())
        self._view = view
        self._gone = gone
        self._seen: tuple[Node, ...] | None = None
        self._peers: Sequence[Peer] = ()

    def peers(self) -> Sequence[Peer]:
        if self._view.nodes is not self._seen:
            self._renew(self._view.nodes)
        return self._peers

    def reachable(self, nodes: Iterable[Node]) -> list[Peer]:
        """Those that speak what we speak; Go's gRPC servers share the registry, not the wire."""
        known = {(peer.node.id, peer.way): peer for peer in self._peers}
        peers: list[Peer] = []
        for node in nodes:
            name = self._best(node)
            if name:
                way = (name, node.address)
                peer = known.get((node.id, way)) or Peer(node, way)
                peer.node = node
                peers.append(peer)
        return peers

    def _renew(self, nodes: tuple[Node, ...]) -> None:
        self._seen = nodes
        self._peers = self.reachable(nodes)
        before, self.ways = self.ways, {peer.way for peer in self._peers}
        if before - self.ways:
            self._gone(before - self.ways)

    def _best(self, node: Node) -> str:
        """The name of the best transport that both have; "" if there is none."""
        if node.metadata.get("protocol", "mucp") != "mucp":
            return ""
        offered = node.metadata.get("transport", self.transports[-1])
        spoken = {offered, *node.metadata.get(TRANSPORTS, "").split(",")}
        return next((name for name in self.transports if name in spoken), "")


async def _only(body: AsyncIterator[bytes]) -> bytes:
    """The one reply to a stream of requests."""
    found: bytes | None = None
    async for message in body:
        if found is not None:
            raise Internal("the server sent two replies where one was to come")
        found = message
    if found is None:
        raise Internal("the server ended without a reply")
    return found


async def _similar(registry: Registry, service: str) -> str:
    """The end of an error text: what is registered and has a similar name, or that nothing is."""
    from difflib import get_close_matches

    try:
        async with asyncio.timeout(_NEAR_MATCHES):
            names = await registry.services()
    except (MicroError, TimeoutError):
        return ""
    near = get_close_matches(service, names, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    shown = ", ".join(names[:10])
    return f"; registered are {shown}" if names else "; nothing is registered, is it running?"


async def _close(dialled: asyncio.Task[Channel]) -> None:
    channel = await dialled
    await channel.aclose(grace=_GRACE)
