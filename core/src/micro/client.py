"""The client's side of a call: whom to call, over which channel, and typed clients."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar, cast, overload

import msgspec

from micro.call import (
    INHERITED,
    Body,
    Call,
    Middleware,
    Reply,
    checked_metadata,
    compose,
    current,
)
from micro.codec import codec_for
from micro.contract import ENDPOINT, Method, content_type_of, read_contract
from micro.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidArgument,
    MicroError,
    ServiceNotFound,
    Unavailable,
)
from micro.follow import View, Watch
from micro.registry import Node, Registry, check_service
from micro.selector import at_random
from micro.transport import Channel, Transport

T = TypeVar("T")

_NO_METADATA: Mapping[str, str] = {}
#: Seconds that calls on the channel of a node that has gone have to end.
_GRACE = 10.0
#: Seconds that looking for similar names may add to the error of an unknown service.
_NEAR_MATCHES = 1.5


class _Options(msgspec.Struct, frozen=True, kw_only=True):
    """What ``using`` sets for all calls of one typed client."""

    timeout: float | None = None
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)


class Means(Protocol):
    """What a client needs of the service that owns it; both backends open at first use."""

    request_timeout: float
    register_ttl: float

    async def registry(self) -> Registry: ...

    async def transport(self) -> Transport: ...


class Client:
    """Calls services by name.

    It watches each service that it calls, so that no call asks the registry; picks a node; keeps
    channels to nodes as long as they are registered. ``means`` raises Closed while the service that
    owns the client is not open.
    """

    def __init__(
        self, means: Callable[[], Means], *, middleware: Iterable[Middleware] = ()
    ) -> None:
        self._means = means
        self._send = compose(middleware, self._transmit)
        self._ids = itertools.count()
        self._decoder = lru_cache(maxsize=1024)(_decoder)
        self._targets: dict[str, _Target] = {}
        self._views: dict[str | None, tuple[View, int]] = {}
        self._channels: dict[str, asyncio.Task[Channel]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def wrap(self, middleware: Middleware) -> None:
        """Put ``middleware`` around the calls, outside of what is around them already."""
        self._send = middleware(self._send)

    def __call__(self, service: str, contract: Callable[..., T], *, name: str | None = None) -> T:
        """A typed client: an object with the methods of ``contract``, each a call of ``service``.

        ``contract`` is a Protocol, an ABC or a class; ``name`` stands for its own name in the names
        of endpoints. No I/O happens before the first call.

        Raises:
            ConfigError: something public in the contract is no RPC; the text lists all of it.
            InvalidArgument: not the name of a service.
        """
        methods = read_contract(cast("type", contract), name)
        namespace = {method.attribute: _stub_method(method) for method in methods}
        stub = type(f"{getattr(contract, '__name__', 'Client')}Stub", (_Stub,), namespace)
        return cast("T", stub(self, check_service(service), _Options()))

    @overload
    async def call(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        returns: type[T],
        timeout: float | None = None,
        metadata: Mapping[str, str] = ...,
        content_type: str | None = None,
    ) -> T: ...

    @overload
    async def call(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] = ...,
        content_type: str | None = None,
    ) -> Any: ...

    async def call(
        self,
        service: str,
        endpoint: str,
        request: object = None,
        *,
        returns: Any = Any,
        timeout: float | None = None,
        metadata: Mapping[str, str] = _NO_METADATA,
        content_type: str | None = None,
    ) -> Any:
        """Call ``endpoint`` (``Handler.Method``) of ``service``; the reply is a ``returns``.

        ``timeout`` is in seconds, the service's ``request_timeout`` by default; inside a handler
        never longer than the handler's own. ``bytes`` and protobuf messages travel as they are,
        other requests as JSON, unless ``content_type`` says otherwise; the reply travels alike.

        Raises:
            ServiceNotFound: no node is registered; names similar ones that are.
            EndpointNotFound: the node has no such endpoint.
            DeadlineExceeded: there was no reply in time; it may have been executed.
            Unavailable: the node, or the registry, cannot be reached.
            DecodeError: the reply is not what ``returns`` says.
            InvalidArgument: the endpoint, the metadata or the request cannot be sent.
            UnsupportedContentType: not known, or none that holds a ``returns``.
            MicroError: whatever else the handler raised.
        """
        if content_type is None:
            content_type = content_type_of(type(request))
        if not ENDPOINT.fullmatch(endpoint):
            raise InvalidArgument(f"endpoint {endpoint[:80]!r}: write Handler.Method")
        codec = codec_for(content_type)
        body = codec.encode(request)
        call = Call(
            service=service,
            endpoint=endpoint,
            content_type=codec.content_type,
            metadata=checked_metadata(metadata) if metadata else {},
            id=str(next(self._ids)),
        )
        decode = self._decoder(codec.content_type, returns)
        reply = await self._in_time(call, body, timeout)
        return decode(reply.body)

    @asynccontextmanager
    async def watch(self, service: str | None) -> AsyncIterator[Watch]:
        """A live view of the nodes of ``service`` (None: of all); see Watch.

        Raises:
            Unavailable: the registry cannot be reached.
        """
        view = await self._hold(service)
        try:
            async with view.watch() as watch:
                yield watch
        finally:
            await self._release(service)

    async def registered(self) -> Registry:
        """The registry, connected: for one question, where a watch would be too much."""
        return await self._means().registry()

    async def aclose(self) -> None:
        """End watches and channels; calls that run fail. A second call does nothing."""
        views = [view for view, _ in self._views.values()]
        self._views.clear()
        self._targets.clear()
        for view in views:
            await view.aclose()
        channels = tuple(self._channels.values())
        self._channels.clear()
        for dialled in channels:
            dialled.cancel()
            if not dialled.cancelled() and dialled.done() and dialled.exception() is None:
                await dialled.result().aclose()
        await asyncio.gather(*channels, *self._closing, return_exceptions=True)

    async def _in_time(self, call: Call, body: Body, timeout: float | None) -> Reply:
        now = time.monotonic()
        call.deadline = now + (self._means().request_timeout if timeout is None else timeout)
        context = current()
        if context is not None:
            _inherit(call, context.metadata, context.deadline)
        timer = asyncio.timeout(call.deadline - now)
        try:
            async with timer:
                return await self._send(call, body)
        except TimeoutError:
            if not timer.expired():
                raise
            took = call.deadline - now
            raise DeadlineExceeded(
                f"{call.service} {call.endpoint}: no reply in {took:.3g} s"
            ) from None

    async def _transmit(self, call: Call, body: Body) -> Reply:
        target = self._targets.get(call.service) or await self._target(call.service)
        node = target.choose(target.candidates() or await self._nobody(target))
        channel = await self._channel(node.address)
        return await channel.call(call, body)

    async def _target(self, service: str) -> _Target:
        check_service(service)
        transport = await self._means().transport()
        view = await self._hold(service)
        try:
            await view.entered()
        except BaseException:
            await self._release(service)
            raise
        if service in self._targets:  # another call was first
            await self._release(service)
            return self._targets[service]
        target = _Target(view, service, transport.features.name, self._gone)
        self._targets[service] = target
        return target

    async def _hold(self, service: str | None) -> View:
        registry = await self._means().registry()
        known = self._views.get(service)
        view = known[0] if known else View(registry, service, ttl=self._means().register_ttl)
        self._views[service] = (view, known[1] + 1 if known else 1)
        return view

    async def _release(self, service: str | None) -> None:
        known = self._views.get(service)
        if known is None:
            return
        view, users = known
        if users > 1:
            self._views[service] = (view, users - 1)
            return
        del self._views[service]
        await view.aclose()

    async def _nobody(self, target: _Target) -> list[Node]:
        """Nodes that the consistent read finds, or the error that tells why there are none."""
        registry = await self._means().registry()
        # At once, since each may wait for answers from a network.
        hint = asyncio.create_task(_similar(registry, target.service))
        try:
            nodes = await registry.get(target.service)
        except ServiceNotFound:
            if self._targets.pop(target.service, None):
                await self._release(target.service)
            text = f"service {target.service!r} is not registered{await hint}"
            raise ServiceNotFound(text) from None
        finally:
            hint.cancel()
            await asyncio.gather(hint, return_exceptions=True)
        found = target.speaking(nodes)
        if not found:
            raise Unavailable(
                f"no node of {target.service!r} speaks {target.transport}; "
                "choose another with --transport",
                sent=False,
            )
        return found

    async def _channel(self, address: str) -> Channel:
        dialled = self._channels.get(address)
        if dialled is None:
            dialled = asyncio.create_task(self._dial(address))
            self._channels[address] = dialled
            dialled.add_done_callback(partial(self._dialled, address))
        if dialled.done():
            return dialled.result()
        return await asyncio.shield(dialled)

    def _dialled(self, address: str, dialled: asyncio.Task[Channel]) -> None:
        """Forget a failure, so that the next call dials again, whoever still waits for this one."""
        failed = dialled.cancelled() or dialled.exception() is not None
        if failed and self._channels.get(address) is dialled:
            del self._channels[address]

    async def _dial(self, address: str) -> Channel:
        transport = await self._means().transport()
        return await transport.dial(address, timeout=self._means().request_timeout)

    def _gone(self, addresses: set[str]) -> None:
        """Close the channels of nodes that are registered no more, once their calls have ended."""
        for target in self._targets.values():
            addresses = addresses - target.addresses
        for address in addresses:
            dialled = self._channels.pop(address, None)
            if dialled is not None:
                task = asyncio.create_task(_close(dialled))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)


class _Target:
    """The nodes of one service that can be called, worked out anew only when the view changes."""

    def __init__(
        self, view: View, service: str, transport: str, gone: Callable[[set[str]], None]
    ) -> None:
        self.service = service
        self.transport = transport
        self.addresses: set[str] = set()
        self.choose = at_random()
        self._view = view
        self._gone = gone
        self._seen: tuple[Node, ...] | None = None
        self._candidates: list[Node] = []

    def candidates(self) -> list[Node]:
        if self._view.nodes is not self._seen:
            self._seen = self._view.nodes
            self._candidates = self.speaking(self._seen)
            before, self.addresses = self.addresses, {node.address for node in self._seen}
            if before - self.addresses:
                self._gone(before - self.addresses)
        return self._candidates

    def speaking(self, nodes: Iterable[Node]) -> list[Node]:
        """Those that speak our transport; Go's gRPC servers share the registry, not the wire."""
        return [
            node
            for node in nodes
            if node.metadata.get("transport", self.transport) == self.transport
            and node.metadata.get("protocol", "mucp") == "mucp"
        ]


class _Stub:
    """A typed client; its methods are added by the contract."""

    def __init__(self, client: Client, service: str, options: _Options) -> None:
        self._micro = (client, service, options)


def _stub_method(method: Method) -> Callable[..., Awaitable[Any]]:
    void = method.response is type(None)

    async def invoke(self: _Stub, /, *args: Any, **kwargs: Any) -> Any:
        client, service, options = self._micro
        reply = await client.call(
            service,
            method.endpoint,
            method.pack(args, kwargs),
            returns=Any if void else method.response,
            timeout=options.timeout,
            metadata=options.metadata,
            content_type=method.content_type,
        )
        return None if void else reply

    invoke.__name__ = method.attribute
    invoke.__doc__ = method.doc
    return invoke


def using(
    client: T, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None
) -> T:
    """A typed client like ``client``, whose calls have this timeout (seconds) and this metadata.

    What is not given stays; metadata is added to what is there. ``client`` itself does not change.

    Raises:
        TypeError: not a typed client.
    """
    if not isinstance(client, _Stub):
        raise TypeError(f"micro.using() takes a typed client, not {type(client).__name__}")
    inner, service, options = client._micro
    merged = _Options(
        timeout=options.timeout if timeout is None else timeout,
        metadata={**options.metadata, **checked_metadata(metadata or {})},
    )
    return cast("T", type(client)(inner, service, merged))


def _inherit(call: Call, metadata: Mapping[str, str], deadline: float | None) -> None:
    if deadline is not None and (call.deadline is None or deadline < call.deadline):
        call.deadline = deadline
    for name in INHERITED:
        if name in metadata and name not in call.metadata:
            call.metadata[name] = metadata[name]


def _decoder(content_type: str, returns: Any) -> Callable[[bytes], Any]:
    try:
        return codec_for(content_type).decoder(returns)
    except TypeError as exc:
        raise ConfigError(f"returns={returns!r} is no type of a message: {exc}") from exc


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
