"""One connection to one server, by nats-py, and its end."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import BadSubjectError, Error, MaxPayloadError, SlowConsumerError

from micro.errors import (
    Closed,
    InvalidArgument,
    MicroError,
    PermissionDenied,
    TooLarge,
    Unavailable,
)
from micro_plugin_nats import _dialing
from micro_plugin_nats._dialing import Host, Login

_log = logging.getLogger("micro.nats")

# What is waited for by the server or by us, at most.
_UNSENT = 8 * 1024 * 1024
_UNREAD = 64 * 1024 * 1024
_UNREAD_MESSAGES = 64 * 1024

_NO_RESPONDERS = "503"


class Message(NamedTuple):
    """What came: ``status`` is the server's own word, as ``503`` when nobody listens."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str]

    @property
    def status(self) -> str:
        return self.headers.get("Status", "")

    @property
    def is_unheard(self) -> bool:
        """Whether it tells that nobody listens to what was asked."""
        return self.status == _NO_RESPONDERS and not self.data


#: Takes what comes, one message after the other.
Heard = Callable[[Message], Awaitable[None] | None]
#: Is told why nothing more comes, or that something was missed.
Lost = Callable[[MicroError], None]


class Concern(ABC):
    """Somebody to be told of the end, or that a right to one of ``subjects`` is missing."""

    __slots__ = ("subjects", "subscription")

    def __init__(self, *subjects: str, subscription: Subscription | None = None) -> None:
        self.subjects: tuple[str, ...] = subjects
        self.subscription: Subscription | None = subscription

    @abstractmethod
    def lose(self, error: MicroError) -> None:
        """Something was missed, or no more comes."""


class _Listener(Concern):
    __slots__ = ("_lost",)

    def __init__(self, subject: str, subscription: Subscription, lost: Lost) -> None:
        super().__init__(subject, subscription=subscription)
        self._lost = lost

    def lose(self, error: MicroError) -> None:
        self._lost(error)


class Connection:
    """From the first handshake to its end, after which it never comes back.

    nats-py could reconnect by itself. It would send late what nobody waits for any more, and a
    stream of JetStream would be silent for up to 15 s; here all of a connection ends with it.
    """

    def __init__(self, where: str, *, is_again: bool) -> None:
        self.where: str = where
        #: Whether there was one before, and the moment at which this one was open.
        self.is_again: bool = is_again
        self.opened: float = math.inf
        self.ended: asyncio.Event = asyncio.Event()
        #: Why it has ended.
        self.error: MicroError | None = None
        self._nats = NatsClient()
        self._is_opening = True
        self._concerns: set[Concern] = set()

    async def open(
        self, host: Host, login: Login | None, tls: ssl.SSLContext | None, *, within: float
    ) -> None:
        """Connect to ``host``; cancelled or failed, it leaves nothing open.

        Raises:
            Unavailable: it does not answer within so many seconds.
            Unauthenticated: it refuses the login.
            ConfigError: TLS is not as the options say.
        """
        told = (self._on_error, self._on_closed)
        try:
            async with asyncio.timeout(within):
                with _dialing.cancellable():
                    await _dialing.dial(self._nats, host, login, tls, within, *told)
        except Exception as exc:  # nats-py lets those of sockets, TLS and JSON through
            error = _dialing.translated(exc, self._nats, self.where, within)
            await self.aclose()
            raise error from None
        except BaseException:  # cancelled: the socket must not stay
            await self.aclose()
            raise
        self._is_opening = False
        self.opened = time.monotonic()

    @property
    def others(self) -> tuple[str, ...]:
        """Servers of the same cluster that this one has named so far, ``host:port``."""
        netlocs = (server.netloc for server in self._nats.discovered_servers)
        return tuple(netloc.rpartition("@")[2] for netloc in netlocs)

    async def aclose(self) -> None:
        self._end(Closed(f"{self.where}: closed"))
        await _dialing.bury(self._nats, [concern.subscription for concern in self._concerns])

    async def publish(
        self, subject: str, data: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Hand a message over. Only what is answered later proves that the server took it.

        Raises:
            Unavailable: the connection has ended, or the server does not take what is sent.
            TooLarge: over what the server takes.
        """
        self.check()
        if self._nats.pending_data_size > _UNSENT:
            raise Unavailable(f"{self.where}: the server does not take what is sent")
        try:
            await self._nats.publish(subject, data, reply, headers)
        except MaxPayloadError:
            most = self._nats.max_payload
            raise TooLarge(f"{self.where}: {len(data)} bytes, {most} at most") from None
        except BadSubjectError:
            raise InvalidArgument(f"{self.where}: {subject[:80]!r} is no subject") from None
        except (Error, OSError) as exc:
            self._end(Unavailable(f"{self.where}: {exc}"))
            self.check()

    @asynccontextmanager
    async def listening(self, subject: str, heard: Heard, lost: Lost) -> AsyncIterator[None]:
        """Hear what is published to ``subject``; ``lost`` is told when that is not all."""

        async def take(msg: Msg) -> None:
            outcome = heard(Message(msg.subject, msg.reply, msg.data, msg.headers or {}))
            if outcome is not None:
                await outcome

        self.check()
        try:
            subscription = await self._nats.subscribe(
                subject,
                cb=take,
                pending_msgs_limit=_UNREAD_MESSAGES,
                pending_bytes_limit=_UNREAD,
            )
        except (Error, OSError) as exc:
            raise Unavailable(f"{self.where}: {exc}") from None
        concern = _Listener(subject, subscription, lost)
        try:
            self.add_concern(concern)
            yield
        finally:
            self.remove_concern(concern)
            await _dialing.unsubscribe(subscription)

    def add_concern(self, concern: Concern) -> None:
        self.check()
        self._concerns.add(concern)

    def remove_concern(self, concern: Concern) -> None:
        self._concerns.discard(concern)

    def check(self) -> None:
        """Notice an end; nats-py does not tell of all.

        Raises:
            Unavailable: it has ended.
        """
        if self._nats.is_closed:
            self._end(Unavailable(f"{self.where}: the connection is lost"))
        if self.error is not None:
            raise type(self.error)(self.error.detail)

    def _end(self, error: MicroError) -> None:
        """Tell all whom it concerns, once."""
        if self.error is None:
            self.error = error
            self.ended.set()
            for concern in tuple(self._concerns):
                concern.lose(error)

    async def _on_error(self, error: Exception) -> None:
        """What nats-py has to say: while it connects, it would go on for ever."""
        if self._is_opening:
            raise error
        text = str(error)
        if isinstance(error, SlowConsumerError):
            missed = Unavailable(f"{self.where}: more comes than can be read")
            self._tell(missed, lambda concern: concern.subscription is error.sub)
        elif "permissions violation" in text.lower():
            refused = PermissionDenied(f"{self.where}: {text}; give the user this right")
            self._tell(refused, lambda concern: _is_about(text, concern))
        elif isinstance(error, Error | OSError):
            self._end(Unavailable(f"{self.where}: {text or type(error).__name__}"))
        else:
            _log.error("%s: what came could not be taken", self.where, exc_info=error)

    async def _on_closed(self) -> None:
        self._end(Unavailable(f"{self.where}: the connection is lost"))

    def _tell(self, error: MicroError, concerned: Callable[[Concern], bool]) -> None:
        for concern in [concern for concern in self._concerns if concerned(concern)]:
            concern.lose(error)


def _is_about(text: str, concern: Concern) -> bool:
    """Whether the server misses a right for this; it tells the subject, in small letters."""
    said = text.lower()
    if ("for subscription to" in said) != (concern.subscription is not None):
        return False
    return any(f'"{subject.lower()}"' in said for subject in concern.subjects)
