"""The client's side of HTTP: the connections to one node."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import cast

import httptools

from micro.backends._http_wire import lower, reply_of, request_bytes
from micro.call import Body, Call, Reply
from micro.errors import Closed, Internal, MicroError, TooLarge, Unavailable
from micro.transport import Channel, Limits

#: What a client takes of a reply.
_LIMITS = Limits()


class HTTPChannel(Channel):
    """Connections to one node; each carries one call at a time, as Go's server needs it."""

    def __init__(
        self, host: str, port: int, timeout: float, *, pool_size: int, pool_ttl: float
    ) -> None:
        self._host = host
        self._port = port
        self._timeout = timeout
        self._pool_size = pool_size
        self._pool_ttl = pool_ttl
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
        self._released = asyncio.Event()
        self._closed = False

    async def call(self, call: Call, body: Body) -> Reply:
        if len(body) > _LIMITS.message:
            text = f"the request has {len(body)} bytes, {_LIMITS.message} at most"
            raise TooLarge(text, sent=False)
        connection = self._reusable() or await self._connect()
        self._busy.add(connection)
        try:
            return await connection.call(request_bytes(call, body, self._address))
        finally:
            self._busy.discard(connection)
            self._released.set()
            room = len(self._idle) < self._pool_size
            if connection.reusable and room and not self._closed:
                self._idle.append(connection)
            else:  # cancelled or broken: what still comes must not answer the next call
                connection.abort()

    async def aclose(self, *, grace: float = 0) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._busy:
                    self._released.clear()
                    await self._released.wait()
        for connection in tuple(self._busy):
            connection.abort()

    def _reusable(self) -> _Connection | None:
        if self._closed:
            raise Closed(f"channel to {self._address}: used after it was closed")
        oldest = time.monotonic() - self._pool_ttl
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.made > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._address), self._host, self._port
                )
        except (OSError, TimeoutError) as exc:
            why = getattr(exc, "strerror", None) or str(exc) or f"no answer in {self._timeout:g} s"
            raise Unavailable(f"{self._address}: {why}", sent=False) from exc
        return connection


class _Connection(asyncio.Protocol):
    """One connection to a server, with at most one call on it."""

    def __init__(self, address: str) -> None:
        self.made = time.monotonic()
        self._address = address
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Reply] | None = None
        self._keep_alive = True
        self._reset()

    @property
    def reusable(self) -> bool:
        return self._waiter is None and self._keep_alive and not self._transport.is_closing()

    async def call(self, message: bytes) -> Reply:
        self._waiter = asyncio.get_running_loop().create_future()
        self._reset()
        self._transport.write(message)
        return await self._waiter

    def abort(self) -> None:
        self._keep_alive = False
        self._waiter = None
        self._transport.abort()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._keep_alive = False
        if self._waiter is None:
            return
        if self._in_body and self._until_close:
            self.on_message_complete()
        else:
            why = str(exc) if exc else "it closed the connection"
            self._fail(Unavailable(f"{self._address}: no reply: {why}"))

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            self.abort()  # nobody asked: what it says must not become an answer
            return
        try:
            self._parser.feed_data(data)
        except MicroError as exc:
            self._broken(exc)
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            self._broken(cause if isinstance(cause, MicroError) else Internal(str(cause)))
        except httptools.HttpParserError as exc:
            self._broken(Internal(f"{self._address}: the answer is not HTTP: {exc}"))

    # httptools calls these

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += len(name) + len(value)
        if self._size > _LIMITS.headers:
            raise TooLarge(f"{self._address}: the headers of the reply are too large")
        self._headers[lower(name)] = value.decode("utf-8", "replace")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._in_body = True
        self._until_close = not {"content-length", "transfer-encoding"} & self._headers.keys()

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
        if self._received > _LIMITS.message:
            raise TooLarge(f"{self._address}: the reply is over {_LIMITS.message} bytes")
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if self._status < 200:
            self._reset()
            return
        self._keep_alive = self._keep_alive and self._parser.should_keep_alive()
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            self._keep_alive = False
            return
        said = reply_of(self._status, self._headers, b"".join(self._chunks))
        if isinstance(said, MicroError):
            waiter.set_exception(said)
        else:
            waiter.set_result(said)

    def _reset(self) -> None:
        self._status = 0
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._size = 0
        self._received = 0
        self._in_body = False
        self._until_close = False

    def _broken(self, error: MicroError) -> None:
        self._fail(error)
        self.abort()

    def _fail(self, error: MicroError) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
