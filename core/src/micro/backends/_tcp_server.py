"""The server's side of the native protocol: one connection and the calls on it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar

from micro.backends import _tcp_frames as frames
from micro.backends._answering import begun, broke
from micro.backends._tcp_link import Link, Pieces, Received
from micro.backends._tcp_stream import Stream
from micro.call import Call, Handler, Reply, encode_error
from micro.deadline import Deadlines
from micro.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    MicroError,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from micro.handshake import identity_of
from micro.port import Session
from micro.transport import STOPPED, Limits

#: Seconds between two looks at a client; of silence, after which one with calls is asked whether it
#: lives, and given up.
_LOOK = 10.0
_SILENCE = 20.0
_GIVE_UP = 30.0
#: How many times the largest message may wait, in replies, for a client to read them.
_UNSENT = 4
#: The number of the last call before HELLO: no number comes after it.
_NONE = -2


class TCPSession(Link, Session):
    """One accepted connection; each call is a task of its own."""

    __slots__ = (
        "_at_once",
        "_deadlines",
        "_draining",
        "_final",
        "_from",
        "_greeted",
        "_handler",
        "_identity",
        "_last",
        "_leaving",
        "_look",
        "_most_unsent",
        "_named",
        "_quiet",
        "_tasks",
        "_unsent",
        "expires",
        "port",
    )

    often: ClassVar[int] = frames.REQUEST

    def __init__(
        self, memory: Received, handler: Handler, limits: Limits, deadlines: Deadlines
    ) -> None:
        Session.__init__(self)
        Link.__init__(self, memory, limits)
        self.expires = time.monotonic() + limits.head_timeout
        self._handler = handler
        self._deadlines = deadlines
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.active = self._tasks
        self._named = False
        self._greeted = False
        self._at_once = 0
        self._draining = False
        self._last = _NONE
        self._final = 0xFFFF_FFFF
        self._leaving = 0
        self._look = min(_LOOK, limits.idle, limits.body_timeout)
        self._quiet = 0.0
        self._unsent = 0
        self._most_unsent = _UNSENT * limits.message
        self._from = ""
        self._identity = ""

    # the port and asyncio call these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._from = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        self._identity = identity_of(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost()
        for stream in tuple(self.streams.values()):
            stream.finish(Cancelled("the caller has gone"))
        Session.connection_lost(self, exc)

    def resume_writing(self) -> None:
        self.heard = True  # it reads, if slowly, and may have no more to say
        super().resume_writing()
        if not self.closing:
            self.transport.resume_reading()

    def drain(self) -> None:
        if not self._draining:
            self._draining = True
            self._final = self._last
            self.send(frames.frame(frames.GOAWAY, 0, aux=max(self._last, 0)))
            self._close_if_done()

    def stop(self) -> None:
        if self.closing:
            self.abort()
        else:
            self.broken(Unavailable(STOPPED))

    def expire(self) -> None:
        self._expect(self._look)
        self._quiet = 0.0 if self.heard else self._quiet + self._look
        self.heard = False
        if not self._greeted or self.closing:
            self.abort()
        elif self._is_late():
            self.broken(DeadlineExceeded("a message did not arrive in time"))
        elif not self._tasks:
            if self._quiet >= self.limits.idle:
                self.drain()
        elif self._quiet >= _GIVE_UP:
            self.abort()
        elif self._quiet >= _SILENCE:
            self.send(frames.frame(frames.PING, 0))

    def abort(self) -> None:
        self.lost()
        self.transport.abort()

    def running(self) -> Collection[asyncio.Task[None]]:
        return tuple(self._tasks.values())

    def _is_late(self) -> bool:
        """Whether a message, or a single frame, has been coming for too long."""
        limit = self.limits.body_timeout
        return self.overdue(limit) or (self.is_within_frame and self._quiet >= limit)

    def _expect(self, within: float) -> None:
        self.expires = time.monotonic() + within

    # frames

    def odd(self, data: bytes, start: int) -> int:
        end = start + len(frames.PREFACE)
        if self._named or data[start:end] != frames.PREFACE:
            return super().odd(data, start)
        self._named = True
        return end

    def whole(self, stream: int, flags: int, aux: int, head: bytes, body: bytes) -> None:
        if stream != self._last + 1:
            self._count(stream)
        self._last = stream
        self._take(stream, flags, aux, head, body)

    def begin(self, stream: int, pieces: Pieces) -> None:
        self._count(stream)
        super().begin(stream, pieces)

    def assembled(self, stream: int, pieces: Pieces, body: bytes) -> None:
        aux = pieces.aux
        if aux:  # its time began with the first piece
            aux = max(aux - int((time.monotonic() - pieces.began) * 1000), 1)
        self._take(stream, pieces.flags, aux, pieces.head, body)

    def _take(self, stream: int, flags: int, aux: int, head: bytes, body: bytes) -> None:
        try:
            call = self._call(stream, flags, aux, head)
        except MicroError as exc:
            self._answer(stream, exc)
            return
        task = begun(self._serve(stream, call, body), self.loop)
        if not task.done():
            self._tasks[stream] = task

    def other(self, kind: int, flags: int, stream: int, aux: int, head: bytes, body: bytes) -> None:
        match kind:
            case frames.OPEN:
                self._count(stream)
                self._open(stream, flags, aux, head)
            case frames.END:
                known = self.streams.get(stream)
                if known is not None:
                    known.finish()
            case frames.CANCEL:
                self._cancel(stream)
            case frames.HELLO if not self._greeted and self._named:
                self._greet(body)
            case frames.GOAWAY:
                pass
            case _:
                raise frames.Broken(f"a client sends no frame of kind {kind} here")

    def _greet(self, body: bytes) -> None:
        self.peer = frames.settings_of(body)
        self._at_once = min(frames.FRAGMENT, self.limits.message, self.peer.message)
        self._greeted = True
        self._last = 0
        self.send(frames.hello(frames.Settings.of(self.limits)))
        self._expect(self._look)

    def reset(self, stream: Stream, error: MicroError) -> None:
        stream.finish(error)
        self._answer(stream.number, error)
        self._cancel(stream.number)

    def refuse(self, stream: int, error: MicroError) -> None:
        self._answer(stream, error)

    def broken(self, error: MicroError) -> None:
        told = encode_error(error, id="").encode()
        self.send(frames.frame(frames.GOAWAY, 0, told, aux=max(self._last, 0)))
        self.close()

    def _answer(self, stream: int, error: MicroError) -> None:
        self.send(frames.error(stream, error, ""))
        if self.paused and not self.closing:  # refusals wait for nobody, and must not pile up
            self.transport.pause_reading()
        if self._draining:
            self._close_if_done()

    def _cancel(self, stream: int) -> None:
        self.forget(stream)
        self.streams.pop(stream, None)
        task = self._tasks.pop(stream, None)
        if task is not None:
            self._leaving += 1
            task.add_done_callback(self._left)
            self.port.cancel(task)
        if self._draining:
            self._close_if_done()

    def _left(self, task: asyncio.Task[None]) -> None:
        self._leaving -= 1

    def _count(self, stream: int) -> None:
        """Take note of a call's number: each is the one after the last."""
        if stream != self._last + 1:
            raise frames.Broken("a call before HELLO, or with a number that is not the next")
        self._last = stream

    def _call(self, stream: int, flags: int, aux: int, head: bytes) -> Call:
        """The call that a frame begins, if it is taken; raises the MicroError if it is not."""
        most = self.limits.calls  # of those that were cancelled and go on, as many more
        running = len(self._tasks) - len(self.streams)
        if stream > self._final or running >= most or self._leaving > most:
            raise self._refusal()
        if len(head) > self.limits.headers:
            raise TooLarge(f"the metadata is over {self.limits.headers} bytes", sent=False)
        call = frames.call_of(stream, flags, aux, head, self._from)
        if self._identity:
            call.identity = self._identity
        if flags & frames.METADATA and len(call.metadata) > self.limits.fields:
            raise TooLarge(f"the metadata has over {self.limits.fields} fields", sent=False)
        return call

    def _refusal(self) -> MicroError:
        if self._draining:
            return Unavailable("the server is stopping", sent=False)
        most = self.limits.calls
        return ResourceExhausted(f"{most} calls run on this connection already", sent=False)

    # calls

    async def _serve(self, stream: int, call: Call, body: bytes) -> None:
        try:
            reply = await self._handler(call, body)
            result = reply.body
            if type(result) is bytes and len(result) <= self._at_once and not reply.metadata:
                frame = frames.pack(len(result), frames.REPLY, 0, 0, stream, stream) + result
            else:
                frame = await self._replied(stream, reply)
            if self.paused:
                with self._held_back(len(frame)):
                    await self.writable()
        except MicroError as exc:
            frame = frames.error(stream, exc, call.service)
        except asyncio.CancelledError as exc:
            frame = frames.error(stream, _given_up(call, exc), call.service)
        except Exception as exc:  # a fault of ours must answer this call, and not end the process
            frame = frames.error(stream, broke(call.endpoint, exc), call.service)
        finally:
            self._tasks.pop(stream, None)
        if frame:
            self.send(frame)
        if self._draining:
            self._close_if_done()

    async def _replied(self, stream: int, reply: Reply) -> bytes:
        """The frame that is a reply; none when it needed several, which have been sent."""
        body = reply.body
        if not isinstance(body, bytes):
            raise TypeError("the reply of a unary call is no bytes")
        head, flags = (
            frames.metadata_head(reply.metadata, self.peer.headers) if reply.metadata else (b"", 0)
        )
        most = min(self.limits.message, self.peer.message)
        if len(body) > most:
            raise TooLarge(f"the reply has {len(body)} bytes, {most} at most")
        if len(body) <= frames.FRAGMENT:
            start = frames.header(frames.REPLY, flags, len(head), len(body), stream, stream)
            return start + head + body
        with self._held_back(len(body)):
            async with self.turns:
                await self.send_in_pieces(frames.REPLY, stream, head, flags, stream, body)
        return b""

    @contextmanager
    def _held_back(self, size: int) -> Iterator[None]:
        """While a reply waits to be sent: when they are too much, no call is read that adds one."""
        self._unsent += size
        if self._unsent > self._most_unsent and not self.closing:
            self.transport.pause_reading()
        try:
            yield
        finally:
            self._unsent -= size
            if self._unsent <= self._most_unsent and not self.closing:
                self.transport.resume_reading()

    def _open(self, stream: int, flags: int, aux: int, head: bytes) -> None:
        try:
            call = self._call(stream, flags, aux, head)
            if len(self.streams) >= self.limits.streams:
                most = self.limits.streams
                text = f"{most} streams run on this connection already"
                raise ResourceExhausted(text, sent=False)
        except MicroError as exc:
            self._answer(stream, exc)
            return
        call.kind = "bidi"
        opened = self.streams[stream] = Stream(self, stream, self.peer.window)
        self._tasks[stream] = self.loop.create_task(self._serve_stream(opened, call))

    async def _serve_stream(self, stream: Stream, call: Call) -> None:
        number = stream.number
        until = self._deadlines.until(math.inf if call.deadline is None else call.deadline)
        try:
            with until:
                trailer = await self._stream(stream, call)
            head, flags = frames.metadata_head(trailer, self.peer.headers)
            frame = frames.frame(frames.END, number, head=head, flags=flags)
        except MicroError as exc:
            frame = frames.error(number, exc, call.service)
        except asyncio.CancelledError as exc:
            frame = frames.error(number, _given_up(call, exc), call.service)
        except Exception as exc:  # as in _serve
            late = isinstance(exc, TimeoutError) and until.expired
            told = DeadlineExceeded("the stream ran longer than it may") if late else None
            frame = frames.error(number, told or broke(call.endpoint, exc), call.service)
        finally:
            self._tasks.pop(number, None)
            self.streams.pop(number, None)
        self.send(frame)
        if self._draining:
            self._close_if_done()

    async def _stream(self, stream: Stream, call: Call) -> dict[str, str]:
        reply = await self._handler(call, stream.messages())
        head, flags = frames.metadata_head(reply.metadata, self.peer.headers)
        self.send(frames.frame(frames.REPLY, stream.number, head=head, flags=flags))
        body = reply.body
        try:
            await stream.send_all(_one(body) if isinstance(body, bytes) else body)
        finally:
            if isinstance(body, AsyncGenerator):
                await body.aclose()
        return reply.trailer

    def _close_if_done(self) -> None:
        if not self._tasks and not self.unfinished:
            self.close()


def _given_up(call: Call, exc: asyncio.CancelledError) -> Internal:
    """What a caller is told of a handler that gave up though nobody asked for it."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise exc
    return broke(call.endpoint, exc)


async def _one(message: bytes) -> AsyncIterator[bytes]:
    yield message
