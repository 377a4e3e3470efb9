"""The native transport: many calls at once on one connection, in frames.

It shares the port of the others: a client begins with ``MICRO1`` and a line end. docs/native.md
describes the protocol byte by byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from micro.backend import Connections
from micro.backends._tcp_channel import TCPChannel
from micro.backends._tcp_frames import PREFACE
from micro.backends._tcp_link import Received
from micro.backends._tcp_server import TCPSession
from micro.call import Handler
from micro.deadline import Deadlines
from micro.errors import Closed, ConfigError
from micro.port import Session, SocketTransport
from micro.transport import Channel, Limits, Listener, TransportFeatures

if TYPE_CHECKING:
    from ssl import SSLContext


class TCPTransport(SocketTransport):
    """Framed calls over TCP or a unix socket."""

    schemes: ClassVar[tuple[str, ...]] = ("tcp",)
    alpn: ClassVar[str] = "micro/1"
    features: TransportFeatures = TransportFeatures(name="tcp")
    _memory: Received | None = None

    async def connect(self, connections: Connections) -> None:
        if self.url.hosts or self.url.path:
            raise ConfigError(
                f"{self.url.source}: {self.url} has a host or a path; "
                "where a service listens is --server_address, MICRO_SERVER_ADDRESS or address="
            )
        self.url.options(self.Options)
        self._memory = Received()
        self._deadlines = Deadlines()

    async def aclose(self) -> None:
        if self._memory is not None:
            self._memory = None
            self._deadlines.close()

    async def dial(
        self, address: str, limits: Limits, *, tls: SSLContext | None = None, timeout: float
    ) -> Channel:
        return TCPChannel(address, self._open(), limits, self._deadlines, tls, timeout)

    async def listen(
        self, address: str, handler: Handler, limits: Limits, *, tls: SSLContext | None = None
    ) -> Listener:
        self._open()
        return await super().listen(address, handler, limits, tls=tls)

    def claims(self, head: bytes) -> bool | None:
        if head.startswith(PREFACE):
            return True
        return None if PREFACE.startswith(head) else False

    def accept(self, handler: Handler, limits: Limits) -> Session:
        return TCPSession(self._open(), handler, limits, self._deadlines)

    def _open(self) -> Received:
        if self._memory is None:
            raise Closed("tcp: the transport is not connected")
        return self._memory
