"""The server's side of HTTP: the open port, its connections, and their time limits."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, cast

import httptools

from micro.backends._http_wire import Refused, Request, call_of, error_bytes, lower, reply_bytes
from micro.call import Handler, Reply
from micro.errors import Internal, InvalidArgument, MicroError, TooLarge
from micro.transport import Limits, Listener

_log = logging.getLogger("micro.http")

#: A Go client keeps connections for 60 s and does not notice that a server closed one.
_IDLE = 90.0
_SWEEP = 0.5
_FOREVER = float("inf")
#: Seconds that a refused peer, which may still be sending, has to read why. Closing at once would
#: reset the connection and lose the answer.
_LINGER = 2.0
#: Seconds that cancelled handlers have to end when the port closes.
_LAST_WAIT = 0.3


class HTTPListener(Listener):
    """The open port and its connections; one timer serves the timeouts of all of them."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler = handler
        self.limits = limits
        self.sessions: set[Session] = set()
        self.draining = False
        self.loop = asyncio.get_running_loop()
        self._quiet = asyncio.Event()
        self._cancelled: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def open(self, host: str, port: int) -> None:
        self._server = await self.loop.create_server(
            lambda: Session(self), host, port, backlog=1024
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
            await asyncio.wait(self._cancelled, timeout=_LAST_WAIT)

    def lost(self, session: Session) -> None:
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


class Session(asyncio.Protocol):
    """One accepted connection: one request after another, each in a task of its own."""

    def __init__(self, listener: HTTPListener) -> None:
        self.task: asyncio.Task[None] | None = None
        self.expires = time.monotonic() + listener.limits.head_timeout
        self._allowed = self._timed = listener.limits.head_timeout
        self._listener = listener
        self._limits = listener.limits
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._waiting: deque[Request] = deque()
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
        except Refused as exc:
            self._refuse(exc)
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            self._refuse(cause if isinstance(cause, Refused) else _bad_request(str(cause)))
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
        self._request = Request()
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
        key = lower(name)
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
            self._refuse(Refused(408, InvalidArgument("the request did not arrive in time")))

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    # one call

    def _start(self, request: Request) -> None:
        task = _task(self._listener.loop, self._serve(request))
        if not task.done():
            self.task = task

    async def _serve(self, request: Request) -> None:
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

    async def _answer(self, request: Request) -> bytes:
        try:
            call = call_of(request, self._peer)
            reply = await self._listener.handler(call, bytes(request.body))
            self._check_size(reply)
            self._keep_or_close(request)
            return reply_bytes(request, call, reply)
        except (MicroError, Refused) as exc:
            self._keep_or_close(request)
            return error_bytes(request, exc)
        except Exception as exc:  # a fault of ours must answer this call, and not end the process
            _log.exception("answering %s failed", request.url[:200])
            return error_bytes(request, Internal(f"internal error: {type(exc).__name__}"))

    def _check_size(self, reply: Reply) -> None:
        size, most = len(reply.body), self._limits.message
        if size > most:
            raise TooLarge(f"the reply has {size} bytes, {most} at most")

    def _keep_or_close(self, request: Request) -> None:
        if self._listener.draining:
            request.keep_alive = False

    def _refuse(self, refused: Refused) -> None:
        """Answer what cannot be read on; then let the peer read the answer, and close."""
        if self._closing or self.task is not None:
            self.abort()
            return
        request = Request()
        request.keep_alive = False
        self._transport.write(error_bytes(request, refused))
        self._transport.write_eof()
        self._closing = True
        self._expect(_LINGER)

    def _close(self) -> None:
        self._closing = True
        self._transport.close()

    def _expect(self, within: float) -> None:
        self._allowed = self._timed = within
        self.expires = time.monotonic() + within


def _task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task of its own for each call, started at once where Python can."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, eager_start=True)
    return loop.create_task(work)


def _bad_request(text: str) -> Refused:
    return Refused(400, InvalidArgument(text[:200]))


def _too_large(limits: Limits) -> Refused:
    return Refused(413, TooLarge(f"the request is over {limits.message} bytes"))


def _too_many_headers(limits: Limits) -> Refused:
    text = f"the headers are over {limits.headers} bytes or {limits.fields} fields"
    return Refused(431, TooLarge(text))
