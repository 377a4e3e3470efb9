"""A service: its backends, its server and its client, from start to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec

from micro.backend import Backend
from micro.call import Middleware
from micro.client import Client
from micro.errors import Closed, ConfigError, MicroError
from micro.plugins import Plugins
from micro.registration import Registration
from micro.registry import Node, Registry, check_node, check_service
from micro.server import Server
from micro.transport import Limits, Listener, Transport

if TYPE_CHECKING:
    from micro.settings import Settings

_log = logging.getLogger("micro.service")

B = TypeVar("B", bound=Backend[Any])
Lifespan = Callable[["Service"], AbstractAsyncContextManager[None]]

#: Seconds that a stopping service still serves, at most, until its callers know that it goes.
_PROPAGATION = 2.0
#: Seconds that calls have to end once nothing new is taken.
_GRACE = 7.0


class Service:
    """A named service: handlers that it serves, and a client for others.

    ``registry`` and ``transport`` are URLs, which the environment and flags override, or objects,
    which nothing overrides. Times are in seconds. ``middleware`` wraps the calls that come in,
    ``client_middleware`` those that go out; the first is outermost. ``extensions`` are names of
    installed ones, which add to the service before it starts. ``lifespan(service)`` brackets the
    handlers: entered before the service is registered, left when its calls have ended.

    Making it does no I/O. ``async with service`` reads the environment and runs it inside of a
    program of yours; ``service.run()`` is the program.
    """

    def __init__(
        self,
        name: str,
        *,
        registry: Registry | str | None = None,
        transport: Transport | str | None = None,
        version: str | None = None,
        id: str | None = None,
        address: str | None = None,
        advertise: str | None = None,
        metadata: Mapping[str, str] | None = None,
        register_ttl: float | None = None,
        register_interval: float | None = None,
        request_timeout: float | None = None,
        middleware: Iterable[Middleware] = (),
        client_middleware: Iterable[Middleware] = (),
        extensions: Iterable[str] = (),
        lifespan: Lifespan | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        self.name: str = check_service(name)
        self._given = _Code(
            registry=registry,
            transport=transport,
            version=version,
            id=id,
            address=address,
            advertise=advertise,
            metadata=dict(metadata or {}),
            register_ttl=register_ttl,
            register_interval=register_interval,
            request_timeout=request_timeout,
        )
        self._middleware = list(middleware)
        self._extensions = tuple(extensions)
        self._configured: set[str] = set()
        self._lifespan = lifespan
        self._plugins = plugins or Plugins()
        self._server = Server(name)
        self._running: _Running | None = None
        self._stack = AsyncExitStack()
        self.client: Final = Client(self._means, middleware=client_middleware)
        #: ``client.call``, which see.
        self.call: Final = self.client.call

    def handle(self, handler: object, *, name: str | None = None) -> None:
        """Serve the public methods of ``handler``.

        Method ``say_hello`` of class ``Greeter`` is the endpoint ``Greeter.SayHello``. ``name``
        stands for the class's name.

        Raises:
            ConfigError: a method cannot be an endpoint, or the endpoint exists; lists all that
                is wrong.
        """
        self._check_not_running("handlers")
        self._server.handle(handler, name=name)

    def wrap_handler(self, middleware: Middleware) -> None:
        """Put ``middleware`` around the calls that come in, outside of what is there already.

        Raises:
            ConfigError: the service runs already.
        """
        self._check_not_running("middleware")
        self._middleware.insert(0, middleware)

    def wrap_client(self, middleware: Middleware) -> None:
        """As ``wrap_handler``, around the calls that go out."""
        self._check_not_running("middleware")
        self.client.wrap(middleware)

    async def __aenter__(self) -> Self:
        """Read the environment, open, serve, register.

        Raises:
            ConfigError: a setting is wrong; the text says where it came from.
            Unavailable: a backend cannot be reached.
        """
        from micro.settings import Settings

        await self._stack.enter_async_context(self.opened(Settings()))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def opened(self, settings: Settings) -> AsyncIterator[Service]:
        """As ``async with service``, with these settings instead of the environment's."""
        if self._running is not None:
            raise ConfigError(f"{self.name}: the service is running already")
        self._configure(settings)
        running = _Running(self.name, self._given, settings, self._plugins)
        async with AsyncExitStack() as stack:
            self._running = running
            stack.callback(self._closed)
            stack.push_async_callback(running.aclose)
            stack.push_async_callback(self.client.aclose)
            await running.open_given()
            if self._lifespan is not None:
                await stack.enter_async_context(self._lifespan(self))
            if self._server.endpoints():
                await stack.enter_async_context(self._serving(running))
            yield self

    def run(self, args: Sequence[str] | None = None) -> None:
        """Be the program: flags (``sys.argv`` by default), environment, serve until a signal.

        SIGTERM or SIGINT drains and returns, within 10 s; a second one stops at once. A wrong
        setting, or a backend that cannot be reached, ends the process with a text and status 2 or
        1.
        """
        from micro.program import run

        run(self.name, self.opened, args)

    def _check_not_running(self, what: str) -> None:
        if self._running is not None:
            raise ConfigError(f"{self.name}: add {what} before the service starts")

    def _configure(self, settings: Settings) -> None:
        """Let each extension that is named add to this service, once."""
        for name, source in settings.names("extensions", self._extensions).items():
            if name not in self._configured:
                self._plugins.configure(self, name, source=source)
                self._configured.add(name)

    def _means(self) -> _Running:
        if self._running is None:
            raise Closed(f"service {self.name!r} is not open; use it inside 'async with service'")
        return self._running

    def _closed(self) -> None:
        self._running = None

    @asynccontextmanager
    async def _serving(self, running: _Running) -> AsyncIterator[None]:
        registry, transport = await running.registry(), await running.transport()
        listener = await self._listen(running, transport)
        try:
            node = self._node(running, listener.address, transport, registry)
            registration = Registration(registry, node, running.register_ttl, running.interval)
            await registration.start()
            self._server.ready = True
            where = (node.service, node.address, registry.url)
            _log.info("%s: serving at %s, registered with %s", *where)
            try:
                yield
            finally:
                self._server.ready = False
                await self._leave(registration, listener, registry)
        finally:
            await listener.aclose()
            self._server.close()

    async def _leave(
        self, registration: Registration, listener: Listener, registry: Registry
    ) -> None:
        """Leave so that no call fails: tell all, serve those who have not heard, end what runs."""
        wait = min(registry.features.converge, _PROPAGATION)
        _log.info(
            "%s: stopping; serving %g s more until callers know (again to force)", self.name, wait
        )
        await registration.stop()
        await asyncio.sleep(wait)
        await listener.drain(_GRACE)

    async def _listen(self, running: _Running, transport: Transport) -> Listener:
        given = running.address
        if transport.features.multi_process and not _is_loopback(given.text):
            if not running.insecure:
                raise ConfigError(
                    f"{given.source}: server_address {given.text} can be reached from other "
                    "machines, without TLS; listen at 127.0.0.1, or accept it with "
                    "--server_insecure (MICRO_SERVER_INSECURE=true)"
                )
            _log.warning("%s: listening at %s without TLS, as asked", self.name, given.text)
        try:
            handler = self._server.handler(self._middleware)
            return await transport.listen(given.text, handler, Limits())
        except MicroError as exc:
            raise ConfigError(f"{given.source}: server_address: {exc}") from exc

    def _node(
        self, running: _Running, address: str, transport: Transport, registry: Registry
    ) -> Node:
        spoken = {
            "transport": transport.features.name,
            "protocol": "mucp",
            "registry": registry.url.scheme,
            "server": "mucp",
        }
        node = Node(
            service=running.name.text,
            id=running.id.text,
            address=running.advertise.text or _reachable(address),
            version=running.version.text,
            metadata={**running.metadata, **spoken},
            endpoints=self._server.endpoints(),
        )
        try:
            return check_node(node)
        except MicroError as exc:
            sources = {running.name.source, running.id.source, running.advertise.source}
            raise ConfigError(f"{' or '.join(sorted(sources))}: {exc}") from exc


class _Code(msgspec.Struct, frozen=True, kw_only=True):
    """What the program gave to Service; None where it said nothing."""

    registry: Any
    transport: Any
    version: str | None
    id: str | None
    address: str | None
    advertise: str | None
    metadata: Mapping[str, str]
    register_ttl: float | None
    register_interval: float | None
    request_timeout: float | None


class _Running:
    """One run of a service: its settings, resolved, and its backends, opened when asked for."""

    def __init__(self, name: str, code: _Code, settings: Settings, plugins: Plugins) -> None:
        self.name = settings.text("server_name", name)
        self.version = settings.text("server_version", code.version, "latest")
        self.id = settings.text("server_id", code.id, _new_id())
        self.address = settings.text("server_address", code.address, "127.0.0.1:0")
        self.advertise = settings.text("server_advertise", code.advertise)
        self.metadata = settings.pairs("server_metadata", code.metadata)
        self.insecure = settings.switch("server_insecure")
        self.register_ttl = settings.duration("register_ttl", code.register_ttl, 30.0)
        third = self.register_ttl / 3
        self.interval = settings.duration("register_interval", code.register_interval, third)
        self.request_timeout = settings.duration(
            "client_request_timeout", code.request_timeout, 5.0
        )
        if self.interval > self.register_ttl / 2:
            raise ConfigError(
                f"register_interval {self.interval:g} s is more than half of register_ttl "
                f"{self.register_ttl:g} s; one lost heartbeat would lose the node"
            )
        self._code = code
        self._connections = plugins.connections()
        self._opening = asyncio.Lock()
        self._open: list[Backend[Any]] = []
        self._registry = _backend(Registry, code.registry, settings, plugins, "mdns")
        self._transport = _backend(Transport, code.transport, settings, plugins, "http")

    async def open_given(self) -> None:
        """Open what the code names; the rest opens at first use."""
        if self._code.registry is not None:
            await self.registry()
        if self._code.transport is not None:
            await self.transport()

    async def registry(self) -> Registry:
        return await self._opened(self._registry)

    async def transport(self) -> Transport:
        return await self._opened(self._transport)

    async def aclose(self) -> None:
        while self._open:
            await self._open.pop().aclose()
        await self._connections.aclose()

    async def _opened(self, backend: B) -> B:
        if backend not in self._open:
            async with self._opening:
                if backend not in self._open:
                    await backend.connect(self._connections)
                    self._open.append(backend)
        return backend


def _backend(
    kind: type[B], code: B | str | None, settings: Settings, plugins: Plugins, default: str
) -> B:
    if isinstance(code, kind):
        return code
    if code is not None and not isinstance(code, str):
        raise ConfigError(f"code: {code!r} is no {kind.__name__}; give one, or a URL as text")
    return plugins.create(kind, settings.url(kind.__name__.lower(), code, default))


def _new_id() -> str:
    import uuid

    return str(uuid.uuid4())


def _is_loopback(address: str) -> bool:
    import ipaddress

    host = address.rpartition(":")[0].strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _reachable(address: str) -> str:
    """``address``, with this machine's own in place of one that means "all of them"."""
    host, _, port = address.rpartition(":")
    if host not in ("0.0.0.0", "[::]"):  # noqa: S104 - it asks whether somebody bound to it
        return address
    family = socket.AF_INET6 if host == "[::]" else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing: it only asks which way the packets would go.
        probe.connect(("2001:db8::1" if host == "[::]" else "192.0.2.1", 9))
        own = probe.getsockname()[0]
        return f"[{own}]:{port}" if ":" in own else f"{own}:{port}"
    raise ConfigError(
        f"server_address {address}: this machine has no route to tell its own address from; "
        "say where others reach it: --server_advertise host:port"
    )
