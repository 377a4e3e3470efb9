"""Go Micro's HTTP transport, and plain JSON over HTTP, on one port.

A Go Micro call is ``POST /`` with the headers Content-Type and Micro-Endpoint; an error is status
200 with the header Micro-Error. Everything else is plain HTTP: ``POST /Helloworld/Call`` with a
JSON body, answered with a fitting status, ``GET /livez`` and ``GET /readyz``.
"""

from __future__ import annotations

import errno
import re
from typing import ClassVar

import msgspec

from micro.backend import Connections
from micro.backends._http_client import HTTPChannel
from micro.backends._http_server import HTTPListener
from micro.call import Handler
from micro.errors import Closed, ConfigError, InvalidArgument
from micro.transport import Channel, Limits, Listener, Transport, TransportFeatures

_PORT = re.compile(r"[0-9]{1,5}")


class HTTPOptions(msgspec.Struct, frozen=True):
    """The options of ``http``: how many idle connections are kept to a node, and for how long."""

    pool_size: int = 100
    pool_ttl: float = 60.0


class HTTPTransport(Transport):
    """HTTP/1.1, as Go Micro speaks it and as everybody does."""

    schemes: ClassVar[tuple[str, ...]] = ("http",)
    Options: ClassVar[type[msgspec.Struct]] = HTTPOptions
    features: TransportFeatures = TransportFeatures(name="http")
    _options: HTTPOptions | None = None

    async def connect(self, connections: Connections) -> None:
        if self.url.hosts or self.url.path:
            raise ConfigError(
                f"{self.url.source}: {self.url} has a host or a path; "
                "where a service listens is --server_address, MICRO_SERVER_ADDRESS or address="
            )
        self._options = self.url.options(HTTPOptions)

    async def aclose(self) -> None:
        self._options = None

    async def dial(self, address: str, *, timeout: float) -> Channel:
        host, port = _host_port(address)
        options = self._open()
        return HTTPChannel(
            host, port, timeout, pool_size=options.pool_size, pool_ttl=options.pool_ttl
        )

    async def listen(self, address: str, handler: Handler, limits: Limits) -> Listener:
        self._open()
        host, port = _host_port(address)
        listener = HTTPListener(handler, limits)
        try:
            await listener.open(host, port)
        except OSError as exc:
            raise ConfigError(f"cannot listen at {address}: {_why(exc)}") from exc
        return listener

    def _open(self) -> HTTPOptions:
        if self._options is None:
            raise Closed("http: the transport is not connected")
        return self._options


def _host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise InvalidArgument(f"address {address[:80]!r}: write host:port, as 127.0.0.1:8080")
    return host.strip("[]"), int(port)


def _why(exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "the port is in use; choose another, or port 0 for a free one"
    if exc.errno == errno.EADDRNOTAVAIL or "could not bind on any" in str(exc):  # 3.13
        return "this machine has no such address; 127.0.0.1 and 0.0.0.0 always exist"
    if exc.errno == errno.EACCES:
        return "permission denied; ports below 1024 need more rights"
    return exc.strerror or str(exc)
