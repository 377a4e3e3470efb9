"""A service: its backends, its server and its client, from start to stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, Self

from micro._running import Code, Running
from micro.call import Middleware
from micro.client import Client
from micro.errors import Closed, ConfigError, MicroError
from micro.plugins import Plugins
from micro.port import SocketTransport, open_port
from micro.readiness import Presence, ReadyCheck
from micro.registration import Registration
from micro.registry import Node, Registry, check_node, check_service
from micro.retries import Retries
from micro.routes import TRANSPORTS
from micro.selector import Selector
from micro.server import Server
from micro.tls import TLS
from micro.transport import UNIX, Limits, Listener, Transport

if TYPE_CHECKING:
    from micro.settings import Settings

_log = logging.getLogger("micro.service")

Lifespan = Callable[["Service"], AbstractAsyncContextManager[None]]

#: Seconds that a stopping service still serves, at most, until its callers know that it goes.
_PROPAGATION = 2.0
#: Seconds that calls have to end once nothing new is taken.
_GRACE = 7.0
#: Seconds that all of this takes at most, also when the registry is slow to be told.
_LEAVING = 9.1


class Service:
    """A named service: handlers that it serves, and a client for others.

    ``registry`` and ``transport`` are URLs, which the environment and flags override, or objects,
    which nothing overrides; several transports, comma separated, share one port, and a client takes
    the first of them that a node has too. ``limits`` hold for what comes in, as server and as
    client. ``retries`` and ``selector`` say how its client repeats calls and chooses nodes. With
    ``tls`` it speaks nothing else, as server and as client. Times are in seconds. ``middleware``
    wraps the calls that come in,
    ``client_middleware`` those that go out; the first is outermost. ``extensions`` are names of
    installed ones, which add to the service before it starts. ``lifespan(service)`` brackets the
    handlers: entered before the service is registered, left when its calls have ended.
    ``ready_check`` says whether it should get calls, asked every second: None or True, else False,
    or it raises; the service is registered, and ``/readyz`` is 200, while it says yes.

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
        retries: Retries | None = None,
        selector: Selector | None = None,
        tls: TLS | None = None,
        limits: Limits | None = None,
        middleware: Iterable[Middleware] = (),
        client_middleware: Iterable[Middleware] = (),
        extensions: Iterable[str] = (),
        lifespan: Lifespan | None = None,
        ready_check: ReadyCheck | None = None,
        plugins: Plugins | None = None,
    ) -> None:
        self.name: str = check_service(name)
        self._given = Code(
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
            retries=retries or Retries(),
            selector=selector or Selector(),
            tls=tls,
            limits=limits or Limits(),
        )
        self._middleware = list(middleware)
        self._extensions = tuple(extensions)
        self._configured: set[str] = set()
        self._lifespan = lifespan
        self._ready_check = ready_check
        self._plugins = plugins or Plugins()
        self._server = Server(name)
        self._running: Running | None = None
        self._stack = AsyncExitStack()
        self.client: Final = Client(self._means, middleware=client_middleware)
        self._server.counts = self.client.counts
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
        running = Running(self.name, self._given, settings, self._plugins)
        async with AsyncExitStack() as stack:
            self._running = running
            stack.callback(self._closed)
            stack.push_async_callback(running.aclose)
            stack.push_async_callback(self.client.aclose)
            if running.tls is not None:
                serves = running.name.text if self._server.endpoints() else ""
                await stack.enter_async_context(running.tls.kept(serves=serves))
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
        1. With ``--workers N`` it is N processes, each a node with a port of its own.
        """
        from micro.program import run

        run(self.name, self.opened, args, check=self._check)

    def _check(self, settings: Settings) -> Running:
        """What these settings come to; nothing is opened.

        Raises:
            ConfigError: one of them is wrong.
        """
        return Running(self.name, self._given, settings, self._plugins)

    def _check_not_running(self, what: str) -> None:
        if self._running is not None:
            raise ConfigError(f"{self.name}: add {what} before the service starts")

    def _configure(self, settings: Settings) -> None:
        """Let each extension that is named add to this service, once."""
        for name, source in settings.names("extensions", self._extensions).items():
            if name not in self._configured:
                self._plugins.configure(self, name, source=source)
                self._configured.add(name)

    def _means(self) -> Running:
        if self._running is None:
            raise Closed(f"service {self.name!r} is not open; use it inside 'async with service'")
        return self._running

    def _closed(self) -> None:
        self._running = None

    @asynccontextmanager
    async def _serving(self, running: Running) -> AsyncIterator[None]:
        registry, transports = await running.registry(), await running.transports()
        async with AsyncExitStack() as stack:
            stack.callback(self._server.close)
            self._server.tell("it is starting")
            listener = await self._listen(running, transports)
            stack.push_async_callback(listener.aclose)
            node = self._node(running, listener.address, transports, registry)
            registration = Registration(registry, node, running.register_ttl, running.interval)
            presence = Presence(self.name, registration, self._ready_check, self._server.tell)
            await presence.start()
            state = "registered" if registration.registered else "not yet registered"
            where = (node.service, node.address, state, registry.url)
            _log.info("%s: serving at %s, %s with %s", *where)
            try:
                yield
            finally:
                self._server.tell("it is stopping")
                spreads = min(registry.features.converge, _PROPAGATION)
                await self._leave(presence, registration, listener, spreads)

    async def _leave(
        self, presence: Presence, registration: Registration, listener: Listener, spreads: float
    ) -> None:
        """Leave so that no call fails: tell all, serve those who have not heard, end what runs.

        ``spreads`` are the seconds that it takes until all have heard.
        """
        until = time.monotonic() + _LEAVING
        wait = spreads if registration.registered else 0.0
        _log.info(
            "%s: stopping; serving %g s more until callers know (again to force)", self.name, wait
        )
        await presence.stop()
        await asyncio.sleep(max(registration.left + spreads - time.monotonic(), 0.0))
        await listener.drain(max(min(_GRACE, until - time.monotonic()), 0.0))

    async def _listen(self, running: Running, transports: Sequence[Transport]) -> Listener:
        given = running.address
        crosses = any(transport.features.multi_process for transport in transports)
        if crosses and running.tls is None and not _is_local(given.text):
            if not running.insecure:
                raise ConfigError(
                    f"{given.source}: server_address {given.text} can be reached from other "
                    "machines, without TLS; listen at 127.0.0.1, give a certificate with "
                    "--tls_cert_file, or accept it with --server_insecure "
                    "(MICRO_SERVER_INSECURE=true)"
                )
            _log.warning("%s: listening at %s without TLS, as asked", self.name, given.text)
        handler = self._server.handler(self._middleware, running.limits)
        sharing = [one for one in transports if isinstance(one, SocketTransport)]
        tls = None
        if running.tls is not None:
            tls = running.tls.server(handshakes=running.limits.connections)
        try:
            if len(sharing) == len(transports):
                return await open_port(given.text, sharing, handler, running.limits, tls=tls)
            return await transports[0].listen(given.text, handler, running.limits, tls=tls)
        except MicroError as exc:
            raise ConfigError(f"{given.source}: server_address: {exc}") from exc

    def _node(
        self,
        running: Running,
        address: str,
        transports: Sequence[Transport],
        registry: Registry,
    ) -> Node:
        names = [transport.features.name for transport in transports]
        spoken = {
            "transport": names[-1],
            "protocol": "mucp",
            "registry": registry.url.scheme,
            "server": "mucp",
        }
        if len(names) > 1:
            spoken[TRANSPORTS] = ",".join(names)
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


def _is_local(address: str) -> bool:
    """Whether nobody beyond this machine reaches it."""
    import ipaddress

    if address.startswith(UNIX):
        return True
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
