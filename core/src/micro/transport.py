"""How calls travel between a client and a node."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import msgspec

from micro.backend import Backend
from micro.call import Call, Handler, Reply
from micro.errors import InvalidArgument

if TYPE_CHECKING:
    from ssl import SSLContext

_PORT = re.compile(r"[0-9]{1,5}")
#: What a caller is told whose call runs on when its server has to stop.
STOPPED = "the server stopped before the call had ended"
#: What an address of a socket in the file system begins with.
UNIX = "unix:"


class TransportFeatures(msgspec.Struct, frozen=True, kw_only=True):
    """What a transport can do.

    ``name`` is what a node's metadata says of it; ``multi_process`` is False for one that ends at
    the process's border. With ``half_close`` a client may end its stream and still read the
    server's.
    """

    name: str
    multi_process: bool = True
    half_close: bool = True


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one side takes of the other before it refuses; checked before memory is given.

    Bytes: ``message`` of a body or of one message of a stream, ``headers`` of all metadata and
    names of a call, of which there are ``fields`` at most. Numbers: ``connections`` of one port,
    ``calls`` and ``streams`` that run at once on one connection, ``in_flight`` calls that run at
    once in the whole server: one more waits for 0.1 s. Seconds: ``head_timeout`` and
    ``body_timeout`` in which the head and the whole body of a request must have come, ``idle``
    after which a connection without a call is closed.
    """

    message: int = 4 * 1024 * 1024
    headers: int = 32 * 1024
    fields: int = 100
    connections: int = 1000
    calls: int = 1024
    streams: int = 100
    in_flight: int = 1024
    head_timeout: float = 5.0
    body_timeout: float = 60.0
    idle: float = 90.0


class Channel(ABC):
    """The client's way to one node. Calls may run at once on it; each gets its own reply."""

    @abstractmethod
    async def call(self, call: Call, body: bytes) -> Reply:
        """Send a call and wait for its reply, whose body is bytes; bounded by the caller.

        Cancelled, it tells the peer or drops the connection, and the channel stays usable.

        Raises:
            MicroError: what the peer raised, ``remote`` set.
            Unavailable: the peer cannot be reached or hung up; ``sent`` is False when no byte of
                the call was written.
            TooLarge: the call or the reply is over the limit.
        """

    @abstractmethod
    def stream(self, call: Call, body: AsyncIterator[bytes]) -> AbstractAsyncContextManager[Reply]:
        """Open a stream; the body of its reply is an iterator of the server's messages.

        Entered when the call is on its way, left when it is over: leaving it before the last
        message cancels it at the server. ``body`` is read in a task of its own, no faster than the
        server takes it; its end is the half-close, its exception cancels the stream. The iterator
        raises what ``call`` raises, and DeadlineExceeded when ``call.deadline`` has come.
        """

    @abstractmethod
    async def aclose(self, *, grace: float = 0) -> None:
        """Close, after calls that run had ``grace`` seconds to end. A second call does nothing."""


class Listener(ABC):
    """A server's open port."""

    #: Where clients reach it, ``host:port``; known port even when 0 was asked for.
    address: str

    @abstractmethod
    async def drain(self, grace: float) -> None:
        """Take no new connection, let the calls that run end, for ``grace`` seconds at most."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections. A second call does nothing.

        Calls that still run are cancelled; their callers get Unavailable, which says that the
        server has stopped.
        """


class Transport(Backend[TransportFeatures]):
    """Moves calls, not bytes: in-process, HTTP and multiplexed protocols are equals."""

    @abstractmethod
    async def dial(
        self, address: str, limits: Limits, *, tls: SSLContext | None = None, timeout: float
    ) -> Channel:
        """A channel to the node at ``address``, ``host:port`` or ``unix:/path``.

        ``limits`` bound what it takes of the server; ``timeout`` bounds each connection that the
        channel makes, in seconds. Dialling itself may or may not connect; an address that nobody
        listens at shows at the first call at the latest.

        Raises:
            InvalidArgument: not an address.
        """

    @abstractmethod
    async def listen(
        self, address: str, handler: Handler, limits: Limits, *, tls: SSLContext | None = None
    ) -> Listener:
        """Answer calls to ``address`` with ``handler``; port 0 takes a free one.

        Raises:
            ConfigError: the address cannot be listened at; the text says why and what to do.
        """


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; of ``unix:/path`` the path, and -1.

    Raises:
        InvalidArgument: neither.
    """
    if address.startswith(UNIX + "/"):
        return address.removeprefix(UNIX), -1
    host, _, port = address.rpartition(":")
    if not host or not _PORT.fullmatch(port) or int(port) > 65535:
        raise InvalidArgument(
            f"address {address[:80]!r}: write host:port, as 127.0.0.1:8080, or unix:/path"
        )
    return host.strip("[]"), int(port)
