"""Go Micro's HTTP transport, and plain JSON over HTTP, on one port.

A Go Micro call is ``POST /`` with the headers Content-Type and Micro-Endpoint; an error is status
200 with the header Micro-Error. Everything else is plain HTTP: ``POST /Helloworld/Call`` with a
JSON body, answered with a fitting status, ``GET /livez`` and ``GET /readyz``.
Source of the protocol: Go Micro's transport/http_transport.go and server/rpc_codec.go, and messages
captured from v2, v3, v4 and v5.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import sys
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, ClassVar, cast

import httptools
import msgspec

from micro.backend import Connections
from micro.call import Body, Call, Handler, Reply, decode_error, encode_error, reserved
from micro.errors import (
    Closed,
    ConfigError,
    Internal,
    InvalidArgument,
    MicroError,
    TooLarge,
    Unavailable,
    Unimplemented,
    UnsupportedContentType,
)
from micro.transport import Channel, Limits, Listener, Transport, TransportFeatures

_log = logging.getLogger("micro.http")

_FORM = "application/x-www-form-urlencoded"
_JSON = "application/json"
_PORT = re.compile(r"[0-9]{1,5}")
_PATH = re.compile(r"/([A-Za-z_]\w*)/([A-Za-z_]\w*)", re.ASCII)
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    499: "Client Closed Request",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
#: The headers of a Go Micro request that its answer repeats.
_ECHOED = ("micro-endpoint", "micro-id", "micro-method", "micro-service")
#: The headers that make a request one of Go Micro's.
_GO_HEADERS = (
    "micro-endpoint",
    "micro-method",
    "micro-service",
    "x-micro-endpoint",
    "x-micro-method",
)
#: A Go client keeps connections for 60 s and does not notice that a server closed one.
_IDLE = 90.0
#: Longest deadline that a caller can ask for, in seconds.
_MAX_DEADLINE = 300.0
_SWEEP = 0.5
_FOREVER = float("inf")
#: Seconds that a refused peer, which may still be sending, has to read why. Closing at once would
#: reset the connection and lose the answer.
_LINGER = 2.0
#: What a client takes of a reply.
_LIMITS = Limits()


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
        return _HTTPChannel(host, port, timeout, self._open())

    async def listen(self, address: str, handler: Handler, limits: Limits) -> Listener:
        self._open()
        host, port = _host_port(address)
        listener = _HTTPListener(handler, limits)
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
    if exc.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address; 127.0.0.1 and 0.0.0.0 always exist"
    if exc.errno == errno.EACCES:
        return "permission denied; ports below 1024 need more rights"
    return exc.strerror or str(exc)


# -- server ------------------------------------------------------------------------------------


class _HTTPListener(Listener):
    """The open port and its connections; one timer serves the timeouts of all of them."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler = handler
        self.limits = limits
        self.sessions: set[_Session] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._quiet = asyncio.Event()
        self._cancelled: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, host: str, port: int) -> None:
        self._server = await self.loop.create_server(
            lambda: _Session(self), host, port, backlog=1024
        )
        bound = self._server.sockets[0].getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        self._sweep()

    async def drain(self, grace: float) -> None:
        self.draining = True
        self._server.close()
        for session in tuple(self.sessions):
            session.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self.sessions:
                    self._quiet.clear()
                    await self._quiet.wait()

    async def aclose(self) -> None:
        self.draining = True
        self._server.close()
        if self._timer is not None:
            self._timer.cancel()
        for session in tuple(self.sessions):
            session.abort()
            self.lost(session)
        if self._cancelled:  # a handler that ignores its cancellation must not hold the process
            await asyncio.wait(self._cancelled, timeout=_LINGER)

    def lost(self, session: _Session) -> None:
        """The caller has gone: nobody waits for what runs."""
        self.sessions.discard(session)
        self._quiet.set()
        if session.task is not None:
            session.task.cancel()
            self._cancelled.add(session.task)
            session.task.add_done_callback(self._cancelled.discard)

    def _sweep(self) -> None:
        now = time.monotonic()
        for session in tuple(self.sessions):
            if now > session.expires:
                session.expire()
        self._timer = self.loop.call_later(_SWEEP, self._sweep)


class _Request:
    """A request as it comes in; then what its answer needs to know of it."""

    __slots__ = ("body", "headers", "keep_alive", "method", "size", "url")

    def __init__(self) -> None:
        self.url = b""
        self.method = ""
        self.headers: dict[str, str] = {}
        self.body: bytes | bytearray = b""
        self.size = 0
        self.keep_alive = True

    @property
    def is_go(self) -> bool:
        headers = self.headers
        return "micro-endpoint" in headers or any(name in headers for name in _GO_HEADERS)


class _Refused(Exception):
    """A request that ends with this status before any handler."""

    def __init__(self, status: int, error: MicroError) -> None:
        super().__init__(error.detail)
        self.status = status
        self.error = error


class _Session(asyncio.Protocol):
    """One accepted connection: one request after another, each in a task of its own."""

    def __init__(self, listener: _HTTPListener) -> None:
        self.task: asyncio.Task[None] | None = None
        self.expires = time.monotonic() + listener.limits.head_timeout
        self._allowed = self._timed = listener.limits.head_timeout
        self._listener = listener
        self._limits = listener.limits
        self._parser = httptools.HttpRequestParser(self)
        self._request = _Request()
        self._waiting: deque[_Request] = deque()
        self._head = 0
        self._in_head = True
        self._closing = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._peer = ""

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if peer else ""
        if len(self._listener.sessions) >= self._limits.connections or self._listener.draining:
            self._transport.abort()
            return
        self._listener.sessions.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._waiting.clear()
        self._writable.set()
        self._listener.lost(self)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._in_head:
            self._head += len(data)
        try:
            self._parser.feed_data(data)
        except _Refused as exc:
            self._refuse(exc)
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            self._refuse(cause if isinstance(cause, _Refused) else _bad_request(str(cause)))
        except httptools.HttpParserUpgrade:
            self._refuse(_bad_request("no protocol upgrade is offered"))
        except httptools.HttpParserError as exc:
            self._refuse(_bad_request(f"not an HTTP request: {exc}"))
        else:
            if self._in_head and self._head > self._limits.headers:
                self._refuse(_too_many_headers(self._limits))
            elif self._allowed != self._timed:  # a request that came in one piece needs no clock
                self._expect(self._allowed)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # httptools calls these

    def on_message_begin(self) -> None:
        self._request = _Request()
        self._in_head = True
        self._head = self._head or 1
        self._allowed = self._limits.head_timeout

    def on_url(self, url: bytes) -> None:
        self._request.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._request
        request.size += len(name) + len(value) + 4
        if request.size > self._limits.headers or len(request.headers) >= self._limits.fields:
            raise _too_many_headers(self._limits)
        key = _COMMON.get(name) or name.decode("ascii").lower()
        try:
            text = value.decode()
        except UnicodeDecodeError:
            raise _bad_request(f"header {key} is not UTF-8") from None
        if key in request.headers:
            text = f"{request.headers[key]}, {text}"
        request.headers[key] = text

    def on_headers_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method().decode("ascii")
        request.keep_alive = self._parser.should_keep_alive()
        self._in_head = False
        self._head = 0
        length = request.headers.get("content-length", "0")
        if int(length) > self._limits.message:
            raise _too_large(self._limits)
        if request.headers.get("expect", "").lower() == "100-continue" and self.task is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._allowed = self._limits.body_timeout

    def on_body(self, body: bytes) -> None:
        request = self._request
        if not request.body:
            request.body = body
        else:
            if isinstance(request.body, bytes):
                request.body = bytearray(request.body)
            request.body += body
        if len(request.body) > self._limits.message:
            raise _too_large(self._limits)

    def on_message_complete(self) -> None:
        self._allowed = _FOREVER
        self._in_head = True
        if self.task is None:
            self._start(self._request)
        else:
            self._waiting.append(self._request)
            self._transport.pause_reading()

    # the listener calls these

    def drain(self) -> None:
        """Close now when nothing runs, else after the answer."""
        if self.task is None and self._in_head and not self._head:
            self._close()

    def expire(self) -> None:
        """Too slow, or idle for too long."""
        if self._closing:
            self._transport.abort()
        elif self._in_head and not self._head:
            self._close()
        else:
            self._refuse(_Refused(408, InvalidArgument("the request did not arrive in time")))

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    # one call

    def _start(self, request: _Request) -> None:
        task = _task(self._listener.loop, self._serve(request))
        if not task.done():
            self.task = task

    async def _serve(self, request: _Request) -> None:
        answer = await self._answer(request)
        if self._closing:
            return
        self._transport.write(answer)
        if not self._writable.is_set():
            await self._writable.wait()
        self.task = None
        if not request.keep_alive or (self._listener.draining and not self._waiting):
            self._close()
        elif self._waiting:
            self._start(self._waiting.popleft())
        else:
            self._transport.resume_reading()
            self._expect(_IDLE)

    async def _answer(self, request: _Request) -> bytes:
        try:
            if request.is_go:
                return await self._answer_go(request)
            return await self._answer_plain(request)
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # a fault of ours must answer this call, and not end the process
            _log.exception("answering %s failed", request.url[:200])
            return self._plain_error(
                request, 500, Internal(f"internal error: {type(exc).__name__}")
            )

    async def _answer_go(self, request: _Request) -> bytes:
        headers = request.headers
        try:
            reply = await self._handle(self._go_call(request), request)
        except MicroError as exc:
            error = encode_error(exc, id=headers.get("micro-service", ""))
            return self._write(
                request, 200, b"", f"Micro-Error: {error}\r\nX-Micro-Error: {error}\r\n"
            )
        return self._write(request, 200, reply.body, _lines(reply.metadata))

    async def _handle(self, call: Call, request: _Request) -> Reply:
        reply = await self._listener.handler(call, bytes(request.body))
        if len(reply.body) > self._limits.message:
            raise TooLarge(f"the reply has {len(reply.body)} bytes, {self._limits.message} at most")
        return reply

    def _go_call(self, request: _Request) -> Call:
        headers = request.headers
        if "micro-topic" in headers or "x-micro-topic" in headers:
            raise Unimplemented("messages of a topic are not taken at this port")
        if "micro-stream" in headers or "x-micro-stream" in headers:
            raise Unimplemented(
                "streams are not supported yet by this version; call unary endpoints"
            )
        endpoint = next((headers[name] for name in _ENDPOINT_HEADERS if name in headers), "")
        if not endpoint or endpoint.count(".") != 1 or request.method != "POST":
            raise InvalidArgument(
                f"rpc: service/endpoint request ill-formed: {endpoint[:80]!r}; "
                "write POST / with Micro-Endpoint: Handler.Method"
            )
        if "content-type" not in headers:
            raise UnsupportedContentType(
                "no Content-Type, which in Go Micro means application/protobuf; "
                "send application/json"
            )
        return self._call(request, endpoint, headers["content-type"])

    async def _answer_plain(self, request: _Request) -> bytes:
        try:
            call = self._plain_call(request)
            reply = await self._handle(call, request)
        except _Refused as exc:
            return self._plain_error(request, exc.status, exc.error)
        except MicroError as exc:
            return self._plain_error(request, exc.status, exc)
        request.headers["content-type"] = call.content_type
        end = b"\n" if call.content_type.startswith(_JSON) else b""
        return self._write(request, 200, reply.body + end, _lines(reply.metadata))

    def _plain_call(self, request: _Request) -> Call:
        path = request.url.decode("ascii", "replace").partition("?")[0]
        if path in ("/livez", "/readyz") and request.method in ("GET", "HEAD"):
            return Call(service="", endpoint=path, peer=self._peer)
        match = _PATH.fullmatch(path)
        if match is None:
            raise _Refused(404, InvalidArgument(_no_endpoint(path)))
        if request.method != "POST":
            raise _Refused(405, InvalidArgument(f"{request.method} {path}: send it with POST"))
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() in ("", _FORM):
            if "origin" in request.headers:
                raise _Refused(415, UnsupportedContentType("a web page must send application/json"))
            content_type = _JSON
        return self._call(request, f"{match[1]}.{match[2]}", content_type)

    def _call(self, request: _Request, endpoint: str, content_type: str) -> Call:
        headers = request.headers
        return Call(
            service=headers.get("micro-service", ""),
            endpoint=endpoint,
            content_type=content_type,
            metadata={name: text for name, text in headers.items() if not reserved(name)},
            deadline=_deadline(headers.get("timeout")),
            id=headers.get("micro-id", ""),
            peer=self._peer,
        )

    # bytes out

    def _plain_error(self, request: _Request, status: int, error: MicroError) -> bytes:
        body = encode_error(error, id=request.headers.get("micro-service", ""))
        request.headers["content-type"] = _JSON
        return self._write(request, status, body.encode() + b"\n", "")

    def _write(self, request: _Request, status: int, body: Body, lines: str) -> bytes:
        headers = request.headers
        if self._listener.draining:
            request.keep_alive = False
        echoed = "".join(
            f"{_TITLES[name]}: {headers[name]}\r\n" for name in _ECHOED if name in headers
        )
        close = "" if request.keep_alive else "Connection: close\r\n"
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"Content-Type: {headers.get('content-type', _JSON)}\r\n"
            f"{echoed}{lines}{close}\r\n"
        )
        return head.encode() + (b"" if request.method == "HEAD" else body)

    def _refuse(self, refused: _Refused) -> None:
        """Answer what cannot be read on; then let the peer read the answer, and close."""
        if self._closing or self.task is not None:
            self.abort()
            return
        request = _Request()
        request.keep_alive = False
        self._transport.write(self._plain_error(request, refused.status, refused.error))
        self._transport.write_eof()
        self._closing = True
        self._expect(_LINGER)

    def _close(self) -> None:
        self._closing = True
        self._transport.close()

    def _expect(self, within: float) -> None:
        self._allowed = self._timed = within
        self.expires = time.monotonic() + within


_ENDPOINT_HEADERS = ("micro-endpoint", "x-micro-endpoint", "micro-method", "x-micro-method")
#: Header names as clients write them, lowered once.
_COMMON = {
    name.encode(): name.lower()
    for name in (
        "Host",
        "User-Agent",
        "Content-Length",
        "Content-Type",
        "Accept",
        "Micro-Endpoint",
        "Micro-Id",
        "Micro-Method",
        "Micro-Service",
        "Timeout",
    )
}
_TITLES = {name: "-".join(part.capitalize() for part in name.split("-")) for name in _ECHOED}


def _task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task of its own for each call, started at once where Python can."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, eager_start=True)
    return loop.create_task(work)


def _no_endpoint(path: str) -> str:
    return (
        f"path {path[:80]!r} names no endpoint; send POST /Handler/Method with a JSON body, "
        "or a Go Micro call with the header Micro-Endpoint"
    )


def _bad_request(text: str) -> _Refused:
    return _Refused(400, InvalidArgument(text[:200]))


def _too_large(limits: Limits) -> _Refused:
    return _Refused(413, TooLarge(f"the request is over {limits.message} bytes"))


def _too_many_headers(limits: Limits) -> _Refused:
    text = f"the headers are over {limits.headers} bytes or {limits.fields} fields"
    return _Refused(431, TooLarge(text))


def _deadline(timeout: str | None) -> float | None:
    """The moment that a Timeout header means; it is in nanoseconds."""
    if timeout is None:
        return None
    if not timeout.isascii() or not timeout.isdigit() or len(timeout) > 19:
        raise InvalidArgument(f"header Timeout {timeout[:40]!r}: write decimal nanoseconds")
    return time.monotonic() + min(int(timeout) / 1e9, _MAX_DEADLINE)


def _lines(metadata: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in metadata.items()) if metadata else ""


# -- client ------------------------------------------------------------------------------------


class _HTTPChannel(Channel):
    """Connections to one node; each carries one call at a time, as Go's server needs it."""

    def __init__(self, host: str, port: int, timeout: float, options: HTTPOptions) -> None:
        self._host = host
        self._port = port
        self._timeout = timeout
        self._options = options
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
            return await connection.call(self._head(call, body) + body)
        finally:
            self._busy.discard(connection)
            self._released.set()
            room = len(self._idle) < self._options.pool_size
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
        oldest = time.monotonic() - self._options.pool_ttl
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

    def _head(self, call: Call, body: Body) -> bytes:
        left = max(call.deadline - time.monotonic(), 0.0) if call.deadline is not None else None
        timeout = f"Timeout: {int(left * 1e9)}\r\n" if left is not None else ""
        return (
            f"POST / HTTP/1.1\r\n"
            f"Host: {self._address}\r\n"
            f"Content-Length: {len(body)}\r\n"
            f"Accept: {call.content_type}\r\n"
            f"Content-Type: {call.content_type}\r\n"
            f"Micro-Endpoint: {call.endpoint}\r\n"
            f"Micro-Id: {call.id}\r\n"
            f"Micro-Method: {call.endpoint}\r\n"
            f"Micro-Service: {call.service}\r\n"
            f"{timeout}{_lines(call.metadata)}\r\n"
        ).encode()


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
        key = _COMMON.get(name) or name.decode("ascii").lower()
        self._headers[key] = value.decode("utf-8", "replace")

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
        error = self._error()
        if error is None:
            metadata = {name: text for name, text in self._headers.items() if not reserved(name)}
            waiter.set_result(Reply(body=b"".join(self._chunks), metadata=metadata))
        else:
            waiter.set_exception(error)

    def _error(self) -> MicroError | None:
        """What a reply says instead of an answer, in the ways in which servers say it."""
        text = self._headers.get("micro-error")
        if text:
            return decode_error(text)
        body = b"".join(self._chunks)
        if self._status != 200:
            error = decode_error(body.decode("utf-8", "replace"))
            return error if error.id or error.detail else Unavailable(f"status {self._status}")
        if body.startswith(b"unsupported Content-Type"):
            return UnsupportedContentType(body.decode("utf-8", "replace")[:200], remote=True)
        return None

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
