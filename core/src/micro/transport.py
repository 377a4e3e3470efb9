"""How calls travel between a client and a node."""

from __future__ import annotations

from abc import ABC, abstractmethod

import msgspec

from micro.backend import Backend
from micro.call import Body, Call, Handler, Reply


class TransportFeatures(msgspec.Struct, frozen=True, kw_only=True):
    """What a transport can do.

    ``name`` is what a node's ``transport`` metadata says of it; ``multi_process`` is False for one
    that ends at the process's border.
    """

    name: str
    multi_process: bool = True


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a server takes before it refuses.

    ``message`` is bytes of a body, ``headers`` bytes and ``fields`` number of all headers of a
    request, ``connections`` how many clients at once, ``head_timeout`` and ``body_timeout`` the
    seconds in which the head and the whole body of a request must have come.
    """

    message: int = 4 * 1024 * 1024
    headers: int = 32 * 1024
    fields: int = 100
    connections: int = 1000
    head_timeout: float = 5.0
    body_timeout: float = 60.0


class Channel(ABC):
    """The client's way to one node. Calls may run at once on it; each gets its own reply."""

    @abstractmethod
    async def call(self, call: Call, body: Body) -> Reply:
        """Send a call and wait for its reply, bounded by the caller.

        Cancelled, it tells the peer or drops the connection, and the channel stays usable.

        Raises:
            MicroError: what the peer raised, ``remote`` set.
            Unavailable: the peer cannot be reached or hung up; ``sent`` is False when no byte of
                the call was written.
            TooLarge: the reply is over the limit.
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
        """Close all connections; calls that still run are cancelled. A second call does nothing."""


class Transport(Backend[TransportFeatures]):
    """Moves calls, not bytes: in-process, HTTP and multiplexed protocols are equals."""

    @abstractmethod
    async def dial(self, address: str, *, timeout: float) -> Channel:
        """A channel to the node at ``address``, ``host:port``.

        ``timeout`` bounds each connection that the channel makes, in seconds. Dialling itself may
        or may not connect; an address that nobody listens at shows at the first call at the latest.

        Raises:
            InvalidArgument: not an address.
        """

    @abstractmethod
    async def listen(self, address: str, handler: Handler, limits: Limits) -> Listener:
        """Answer calls to ``address`` with ``handler``; port 0 takes a free one.

        Raises:
            ConfigError: the address cannot be listened at; the text says why and what to do.
        """
