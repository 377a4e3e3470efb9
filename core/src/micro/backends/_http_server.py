"""The server's side of HTTP: one connection, its calls, its stream, its time limits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Coroutine
from contextlib import suppress
from typing import Any, cast

from micro.backends._answering import begun, broke
from micro.backends._http_head import Refused
from micro.backends._http_reader import Numbers, Reader
from micro.backends._http_stream import (
    Lost,
    Outlet,
    ServerStream,
    checked_reply,
    hung_up,
    notice_loss,
)
from micro.backends._http_wire import Request, read_request, refusal
from micro.call import Call, Handler
from micro.deadline import Deadlines
from micro.errors import (
    FailedPrecondition,
    InvalidArgument,
    MicroError,
    Unavailable,
)
from micro.handshake import identity_of
from micro.port import Session
from micro.transport import STOPPED, Limits

#: How long, in seconds and in messages of the largest size, a refused peer may go on sending before
#: it reads why. Closing at once would reset the connection and lose the answer.
_LINGER = 2.0
_LINGER_MESSAGES = 4
#: Seconds between two looks at whether a peer of which nothing is read has hung up.
_LOOK = 0.5


class HTTPSession(Session, asyncio.Protocol):
    """One accepted connection: one request after another, each in a task of its own."""

    __slots__ = (
        "_asked",
        "_closing",
        "_deadlines",
        "_draining",
        "_ended",
        "_handler",
        "_held",
        "_identity",
        "_limits",
        "_loop",
        "_outlet",
        "_partial",
        "_peer",
        "_reader",
        "_reading",
        "_stream",
        "_swallowed",
        "_task",
        "_transport",
        "expires",
        "port",
    )

    def __init__(self, handler: Handler, limits: Limits, deadlines: Deadlines) -> None:
        super().__init__()
        self.expires = time.monotonic() + limits.head_timeout
        self._handler = handler
        self._limits = limits
        self._deadlines = deadlines
        self._reader: Reader[Request] = Reader(read_request, limits)
        #: What runs: a call, or the stream in ``_stream``.
        self._task: asyncio.Task[None] | None = None
        #: Of what runs, the request and its Micro-Id.
        self._asked: tuple[Request, bytes] | None = None
        self._stream: ServerStream | None = None
        #: The id of the last stream, whose client may not know yet that it has ended.
        self._ended: str | None = None
        #: What a message has to bring that has begun to come: "head" or "body".
        self._partial = ""
        self._reading = False
        self._held = False
        self._closing = False
        self._draining = False
        self._swallowed = 0

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self._loop = asyncio.get_running_loop()
        self._outlet = Outlet(self._transport)
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        self._identity = identity_of(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._outlet.close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            self._swallow(data)
        elif self._busy():
            self._reader.rest += data
            self._held = True
            self._transport.pause_reading()
            if self._task is not None:
                self.expires = time.monotonic() + _LOOK
        else:
            self._read(data)

    def pause_writing(self) -> None:
        self._outlet.pause()
        if self._stream is None:  # the reader of a stream has as long as the stream
            self.expires = time.monotonic() + self._limits.body_timeout

    def resume_writing(self) -> None:
        self._outlet.resume()
        if self._task is None and not self._closing:
            self.expires = time.monotonic() + self._limits.idle
            self._read_on()

    # the port calls these

    def drain(self) -> None:
        """Close now when nothing runs, else after the answer."""
        self._draining = True
        if self._task is None and not self._partial and not self._closing:
            self._close()

    def stop(self) -> None:
        if self._task is not None and self._asked is not None and not self._closing:
            request, number = self._asked
            self._transport.write(request.error(Unavailable(STOPPED), number, last=True))
            self._close()
        elif self._partial and not self._closing:
            self._refuse(Refused(503, Unavailable(STOPPED, sent=False)))
        else:
            self.abort()

    def expire(self) -> None:
        """Too slow, or idle for too long; or time to look after a peer of which nothing is read."""
        if self._closing:
            self.abort()
        elif self._partial:
            self._refuse(Refused(408, InvalidArgument("the request did not arrive in time")))
        elif self._task is not None and not hung_up(self._transport):
            self.expires = time.monotonic() + _LOOK
        elif self._task is not None or self._outlet.full:
            self.abort()
        else:
            self._close()

    def abort(self) -> None:
        self._closing = True
        self._transport.abort()

    def running(self) -> Collection[asyncio.Task[None]]:
        return () if self._task is None else (self._task,)

    # what comes in

    def _busy(self) -> bool:
        """Whether the next request has to wait."""
        return self._stream is None and (self._task is not None or self._outlet.full)

    def _read(self, data: bytes) -> None:
        reader = self._reader
        self._reading = True
        try:
            message = reader.read(data)
            while message is not None:
                self._take(*message)
                if not reader.rest or self._closing or self._busy():
                    return
                message = reader.read(b"")
            self._await_rest()
        except Refused as exc:
            self._refuse(exc)
        finally:
            self._reading = False

    def _read_on(self) -> None:
        """Read what came while a call ran, or while the socket was full."""
        if self._reading or self._busy():
            return
        if self._held:
            self._held = False
            self._transport.resume_reading()
        if self._reader.rest:
            self._read(b"")

    def _await_rest(self) -> None:
        """A message has begun: see that the rest of it comes in time."""
        request = self._reader.meaning
        partial = "head" if request is None else "body"
        held_up = self._stream is not None and self._stream.is_held_up
        if partial == self._partial or held_up:  # then it is not the peer that is slow
            return
        self._partial = partial
        limits = self._limits
        within = limits.head_timeout if request is None else limits.body_timeout
        self.expires = time.monotonic() + within
        if request is not None and request.expects:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take(self, request: Request, numbers: Numbers, body: bytes) -> None:
        self._partial = ""
        if self._stream is not None:
            self._take_streamed(self._stream, request, numbers, body)
        elif request.refusal is not None:
            error = request.error(request.refusal, numbers[1], last=self._draining)
            self._answered(error, request)
        elif request.stream is None:
            self._start(self._serve(request, numbers, body), request, numbers)
        elif not request.told and request.stream != self._ended:
            self._open_stream(request, numbers, body)
        else:  # of a stream that has ended
            self.expires = time.monotonic() + self._limits.idle

    def _take_streamed(
        self, stream: ServerStream, request: Request, numbers: Numbers, body: bytes
    ) -> None:
        self.expires = time.monotonic() + _LOOK
        if stream.name == request.stream and request.refusal is None:
            stream.take(request.told, body)
        else:
            text = "a stream runs on this connection; send calls and other streams on another one"
            self._transport.write(request.error(FailedPrecondition(text), numbers[1]))

    def _refuse(self, refused: Refused) -> None:
        """Answer what cannot be read on; then let the peer read the answer, and close."""
        request = self._reader.meaning
        self._closing = True
        if self._task is not None:
            self._task.cancel()
        answer = refusal(refused) if request is None else request.error(refused, b"", last=True)
        self._transport.write(answer)
        if self._transport.can_write_eof():
            with suppress(OSError):  # the peer has gone
                self._transport.write_eof()
        self.expires = time.monotonic() + _LINGER

    def _swallow(self, data: bytes) -> None:
        self._swallowed += len(data)
        if self._swallowed > _LINGER_MESSAGES * self._limits.message:
            self._transport.abort()

    # calls

    def _start(self, work: Coroutine[Any, Any, None], request: Request, numbers: Numbers) -> None:
        """A task of its own for each call, started at once where Python can."""
        task = begun(work, self._loop)
        if not task.done():
            self._task = task
            self._asked = request, numbers[1]
            self.expires = math.inf

    def _call(self, request: Request, numbers: Numbers) -> Call:
        call = request.call(numbers, self._peer)
        if self._identity:
            call.identity = self._identity
        return call

    async def _serve(self, request: Request, numbers: Numbers, body: bytes) -> None:
        number = numbers[1]
        try:
            reply = await self._handler(self._call(request, numbers), body)
            said = checked_reply(reply.body, self._limits)
            answer = request.reply(said, reply.metadata, number, last=self._draining)
        except asyncio.CancelledError:
            if not self._closing:
                self.abort()
            raise
        except Exception as exc:  # whatever it is has to answer this call, and not end the process
            answer = request.error(_told(exc, request), number, last=self._draining)
        self._answered(answer, request)

    def _open_stream(self, request: Request, numbers: Numbers, body: bytes) -> None:
        try:
            call = self._call(request, numbers)
        except MicroError as exc:
            self._answered(request.error(exc, numbers[1]), request)
            return
        stream = self._stream = ServerStream(request, numbers, body, call, self._transport)
        notice_loss(self._transport)
        self._start(self._serve_stream(stream, request, numbers[1]), request, numbers)

    async def _serve_stream(self, stream: ServerStream, request: Request, number: bytes) -> None:
        answer = b""
        try:
            await stream.serve(self._handler, self._outlet, self._limits, self._deadlines)
        except asyncio.CancelledError:
            if not self._closing:
                self.abort()
            raise
        except Lost:
            pass
        except Exception as exc:  # as in _serve
            answer = request.error(_told(exc, request), number)
        self._stream = None
        if not stream.was_call:
            self._ended = stream.name
        self._answered(answer, request)

    def _answered(self, answer: bytes, request: Request) -> None:
        """A call has ended, or was none: send what is left to say, and go on."""
        self._task = None
        if self._closing:
            return
        self.expires = time.monotonic() + self._limits.idle
        if answer:
            self._transport.write(answer)
        if self._draining or not request.keep_alive:
            self._close()
        elif not self._reading:
            self._read_on()

    def _close(self) -> None:
        self._closing = True
        if not self._transport.is_closing():  # asyncio's of TLS breaks when it is closed twice
            self._transport.close()


def _told(exc: Exception, request: Request) -> MicroError | Refused:
    return exc if isinstance(exc, MicroError | Refused) else broke(request.endpoint, exc)
