"""Go Micro's HTTP transport, and plain JSON over HTTP.

A Go Micro call is ``POST /`` with the headers Content-Type and Micro-Endpoint; an error is status
200 with the header Micro-Error. Everything else is plain HTTP: ``POST /Helloworld/Call`` with a
JSON body, answered with a fitting status, ``GET /livez`` and ``GET /readyz``. docs/http.md tells
the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from micro.backend import Connections
from micro.backends._http_client import HTTPChannel
from micro.backends._http_server import HTTPSession
from micro.call import Handler
from micro.deadline import Deadlines
from micro.errors import Closed, ConfigError
from micro.port import Session, SocketTransport
from micro.transport import Channel, Limits, Listener, TransportFeatures

if TYPE_CHECKING:
    from ssl import SSLContext


class HTTPOptions(msgspec.Struct, frozen=True):
    """The options of ``http``: how many idle connections are kept to a node, and for how long."""

    pool_size: int = 100
    pool_ttl: float = 60.0


class HTTPTransport(SocketTransport):
    """HTTP/1.1, as Go Micro speaks it and as everybody does."""

    schemes: ClassVar[tuple[str, ...]] = ("http",)
    alpn: ClassVar[str] = "http/1.1"
    takes_the_rest: ClassVar[bool] = True
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
        self._deadlines = Deadlines()

    async def aclose(self) -> None:
        if self._options is not None:
            self._options = None
            self._deadlines.close()

    async def dial(
        self, address: str, limits: Limits, *, tls: SSLContext | None = None, timeout: float
    ) -> Channel:
        options = self._open()
        return HTTPChannel(
            address,
            limits,
            self._deadlines,
            tls,
            timeout,
            pool_size=options.pool_size,
            pool_ttl=options.pool_ttl,
        )

    async def listen(
        self, address: str, handler: Handler, limits: Limits, *, tls: SSLContext | None = None
    ) -> Listener:
        self._open()
        return await super().listen(address, handler, limits, tls=tls)

    def claims(self, head: bytes) -> bool | None:
        """It takes whatever may be a method, to tell those what to send who send something else."""
        return head[:1].isalpha() if head else None

    def accept(self, handler: Handler, limits: Limits) -> Session:
        self._open()
        return HTTPSession(handler, limits, self._deadlines)

    def _open(self) -> HTTPOptions:
        if self._options is None:
            raise Closed("http: the transport is not connected")
        return self._options
