"""Calls and streams to one server: the only module that imports gRPC, whose errors end here."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from micro.errors import (
    Closed,
    FailedPrecondition,
    MicroError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unknown,
)
from micro_plugin_etcd._tls import TLS

M = TypeVar("M", bound=Message)

Metadata = Sequence[tuple[str, str]]

#: Most bytes of one answer.
_MESSAGE = 32 * 1024 * 1024
# A keepalive below 5 s makes a healthy server end the connection; without the ping time-out a
# stopped one is not noticed. Source: measured on etcd 3.6; server/embed/config.go of etcd.
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # This, and not a pause, is what it does: so long may it take to connect.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.max_receive_message_length", _MESSAGE),
    # Else all clients of one address in the process share a connection, and its fate.
    ("grpc.use_local_subchannel_pool", 1),
)


_FAILURES = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.CancelledError)


class StaleToken(Unavailable):
    """The token is not known any more: ask for another, and again."""


class Channel:
    """One host of a URL. ``name`` is what the texts of errors begin with, ``where`` says more."""

    def __init__(self, host: str, port: int, tls: TLS | None, name: str) -> None:
        self.host, self.port = host, port
        self.where: str = f"{name}: {self.host}:{self.port}"
        self._name = name
        self._closed = False
        self._asks: dict[str, grpc.aio.UnaryUnaryMultiCallable[Any, Any]] = {}
        target = f"{self.host}:{self.port}"
        if tls is None:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
            self._channel = grpc.aio.secure_channel(target, credentials, options=_OPTIONS)

    async def aclose(self) -> None:
        self._closed = True
        await self._channel.close()

    async def unary(self, method: str, answer: type[M], request: Message, metadata: Metadata) -> M:
        """The answer to ``request``."""
        ask = self._asks.get(method)
        if ask is None:
            path = f"/etcdserverpb.{method}"
            ask = self._channel.unary_unary(path, _serialized, answer.FromString)
            self._asks[method] = ask
        try:
            return cast("M", await ask(request, metadata=metadata))
        except _FAILURES as exc:
            raise self._told(exc) from None

    @asynccontextmanager
    async def stream(
        self, method: str, answer: type[M], metadata: Metadata
    ) -> AsyncIterator[Stream[M]]:
        """A stream of messages both ways."""
        path = f"/etcdserverpb.{method}"
        ask: grpc.aio.StreamStreamMultiCallable[Message, M] = self._channel.stream_stream(
            path, _serialized, answer.FromString
        )
        try:
            stream = Stream(ask(metadata=metadata), self._told)
        except _FAILURES as exc:
            raise self._told(exc) from None
        try:
            yield stream
        finally:
            stream.end(Closed(f"{self._name}: the stream was closed"))

    def _told(self, failure: BaseException) -> BaseException:
        """What a failure of gRPC is here; our own cancellation stays what it is."""
        if isinstance(failure, grpc.aio.AioRpcError):
            return self._translated(failure.code(), failure.details() or "")
        if isinstance(failure, grpc.aio.UsageError):
            return Closed(f"{self._name}: {failure}")
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return failure
        # So gRPC tells of a channel that was closed under a call.
        kind = Closed if self._closed else Unavailable
        return kind(f"{self._name}: closed during the call")

    def _translated(self, code: grpc.StatusCode, detail: str) -> MicroError:
        if code is grpc.StatusCode.UNAVAILABLE:
            if "Connection refused" in detail:  # gRPC tells it at length
                detail = "connection refused; does etcd run there?"
            return Unavailable(f"{self.where}: {detail}")
        for text, kind, says in _TOLD_BY_TEXT:
            if text in detail:
                return kind(f"{self._name}: {says or detail}")
        return _TOLD_BY_CODE.get(code, Unknown)(f"{self._name}: {detail}")


class Stream(Generic[M]):
    """Messages both ways, until it breaks; one reads, and no task stands between it and gRPC."""

    def __init__(
        self,
        call: grpc.aio.StreamStreamCall[Message, M],
        told: Callable[[BaseException], BaseException],
    ) -> None:
        self._call = call
        self._told = told
        self._waits_since = math.inf
        self._why: MicroError | None = None

    @property
    def silence(self) -> float:
        """Seconds that the reader has been waiting for the next message."""
        return time.monotonic() - self._waits_since

    async def write(self, message: Message, *, within: float) -> None:
        """Send ``message`` within so many seconds; when that cannot be done, reading says why."""
        try:
            async with asyncio.timeout(within):
                with suppress(asyncio.InvalidStateError):
                    await self._call.write(message)
        except TimeoutError:  # what was not asked for is not to be waited for
            self.end(Unavailable(f"etcd: the server takes nothing for {within:g} s"))
        except _FAILURES as exc:
            raise self._told(exc) from None

    async def read(self) -> M:
        """The next message.

        Raises:
            Unavailable: it is over. Closed: it was closed meanwhile.
        """
        self._waits_since = time.monotonic()
        try:
            message = await self._call.read()
        except _FAILURES as exc:
            told = self._told(exc)
            raise told if told is exc else (self._why or told) from None
        finally:
            self._waits_since = math.inf
        if message is grpc.aio.EOF:
            raise Unavailable("etcd: the server ended the stream")
        return cast("M", message)

    def end(self, why: MicroError) -> None:
        """Have it break, and who reads be told so."""
        if self._why is None:
            self._why = why
        self._call.cancel()


# etcd puts several causes under one code. Source: api/v3rpc/rpctypes/error.go of etcd.
_LOGIN = "the server asks for a login: etcd://user:password@host, or ?password_file=FILE"
_RIGHTS = "permission denied; its user needs the right to read these keys, and to write its own"
_TOLD_BY_TEXT: tuple[tuple[str, type[MicroError], str], ...] = (
    ("invalid auth token", StaleToken, ""),
    ("revision of auth store is old", StaleToken, ""),
    ("invalid user ID or password", Unauthenticated, "wrong user name or password"),
    ("user name is empty", Unauthenticated, _LOGIN),
    ("permission denied", PermissionDenied, _RIGHTS),
    ("request is too large", TooLarge, ""),
    ("larger than max", TooLarge, ""),
)
_TOLD_BY_CODE: dict[grpc.StatusCode, type[MicroError]] = {
    grpc.StatusCode.CANCELLED: Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
