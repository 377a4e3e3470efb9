"""The client's side of a native connection: the calls that wait on it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import ClassVar

from micro.backends import _tcp_frames as frames
from micro.backends._tcp_link import Link, Pieces, Received
from micro.backends._tcp_stream import Stream
from micro.call import Call, Reply
from micro.errors import (
    DataLoss,
    MicroError,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from micro.handshake import ALERT, HUNG_UP, SPEAKS_TLS, explained
from micro.transport import Limits

#: Seconds between two looks at a connection.
_LOOK = 5.0
#: Looks without a frame, while calls wait, after which a server is asked, and given up.
_ASK, _GIVE_UP = 2, 3
#: Looks after which a connection that nobody uses is closed: sooner than a server does.
_IDLE = 12
#: The number of a connection's last call; then another connection takes over.
_LAST_STREAM = 0xFFFF_FFFF
_FRAGMENT = frames.FRAGMENT


class ClientLink(Link):
    """A connection to a server, and the calls that wait on it."""

    __slots__ = (
        "_address",
        "_done",
        "_last",
        "_queue",
        "_silent",
        "_timer",
        "at_once",
        "greeted",
        "most",
        "pending",
        "retired",
    )

    often: ClassVar[int] = frames.REPLY

    def __init__(self, address: str, memory: Received, limits: Limits) -> None:
        super().__init__(memory, limits)
        self.pending: dict[int, asyncio.Future[Reply]] = {}
        self.active = self.pending
        #: How many of them the server takes at once, less those whose turn has come.
        self.most = 0
        #: Most bytes that one frame may carry to the server.
        self.at_once = 0
        #: No new call: the server stops, or the connection is lost.
        self.retired = False
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.greeted.add_done_callback(_looked_at)
        self._address = address
        self._last = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._silent = 0
        self._timer: asyncio.TimerHandle | None = None
        self._done: asyncio.Event = asyncio.Event()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(frames.PREFACE + frames.hello(frames.Settings.of(self.limits)))
        self._timer = self.loop.call_later(_LOOK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost()
        if self._timer is not None:
            self._timer.cancel()
        why = str(exc) if exc else "it closed the connection"
        text = explained(exc)
        if not self.greeted.done():
            self._greet_not(text or self._why_not())
        self.fail(Unavailable(f"{self._address}: {text or f'no reply: {why}'}"))

    # calls

    def number(self) -> int:
        """The number of the next call; none is used twice."""
        self._last = number = self._last + 1
        if number == _LAST_STREAM:
            self.retired = True
        return number

    async def turn(self) -> None:
        """Wait until the socket takes more and the server another call; the first come first."""
        if self.paused:
            await self.writable()
        if len(self.pending) >= self.most and not self.retired:
            waiter = self.loop.create_future()
            self._queue.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if not waiter.cancelled():
                    self.most += 1
                    self._next()
                raise
            self.most += 1
        if self.retired:
            raise Unavailable(f"{self._address}: the connection was lost", sent=False)

    async def call_large(self, call: Call, body: bytes) -> Reply:
        """A call whose message needs several frames."""
        most = self.peer.message
        if len(body) > most:
            raise TooLarge(f"the request has {len(body)} bytes, {most} at most", sent=False)
        head, flags = frames.call_head(call, self.peer.headers)
        async with self.turns:
            await self.turn()
            aux = frames.time_left(call.deadline)
            number = self.number()
            waiter: asyncio.Future[Reply]
            waiter = self.pending[number] = self.loop.create_future()
            try:
                await self.send_in_pieces(frames.REQUEST, number, head, flags, aux, body)
            except asyncio.CancelledError:
                self.cancel(number)
                raise
        try:
            return await waiter
        except asyncio.CancelledError:
            self.cancel(number)
            raise

    def cancel(self, number: int) -> None:
        """Nobody waits for this call any more."""
        if self.pending.pop(number, None) is not None:
            self.forget(number)
            self.send(frames.frame(frames.CANCEL, number))
            self._next()

    def open(self, call: Call) -> Stream:
        """Begin a stream.

        Raises:
            ResourceExhausted: as many streams run as the server takes.
        """
        if len(self.streams) >= self.peer.streams:
            text = f"{self._address}: {self.peer.streams} streams run already, its most"
            raise ResourceExhausted(text, sent=False)
        head, flags = frames.call_head(call, self.peer.headers)
        aux = frames.time_left(call.deadline)
        number = self.number()
        stream = self.streams[number] = Stream(self, number, self.peer.window)
        self.send(frames.frame(frames.OPEN, number, head=head, flags=flags, aux=aux))
        return stream

    async def send_body(self, stream: Stream, body: AsyncIterator[bytes]) -> None:
        """Send what the caller streams; what that raises ends the stream."""
        try:
            await stream.send_all(body)
            self.send(frames.frame(frames.END, stream.number))
        except Exception as exc:  # it is the caller's, who gets it where the replies are read
            self.reset(stream, exc)
        finally:
            if isinstance(body, AsyncGenerator):
                await body.aclose()

    def leave(self, stream: Stream) -> None:
        """The caller is done with a stream."""
        if self.streams.pop(stream.number, None) is not None:
            if not stream.ended:
                self.send(frames.frame(frames.CANCEL, stream.number))
            self._check_done()

    async def quiet(self) -> None:
        """Wait until nothing runs."""
        while (self.pending or self.streams) and not self.closing:
            self._done.clear()
            await self._done.wait()

    def fail(self, error: MicroError) -> None:
        """End all calls with ``error``, and take no more."""
        self.retired = True
        if not self.greeted.done():
            self._greet_not("it does not speak the native protocol")
        for waiter in self.pending.values():
            if not waiter.done():
                waiter.set_exception(_copy(error))
        self.pending.clear()
        for stream in self.streams.values():
            stream.finish(_copy(error))
        while self._queue:
            self._next()
        self._done.set()

    def _greet_not(self, why: str) -> None:
        self.greeted.set_exception(Unavailable(f"{self._address}: {why}", sent=False))

    def _why_not(self) -> str:
        """Why a server may have hung up before it said anything that we know."""
        if self._tail.startswith(ALERT):
            return SPEAKS_TLS
        if self.transport.get_extra_info("ssl_object") is not None:
            return HUNG_UP
        return "it does not speak the native protocol"

    def close_now(self) -> None:
        """Close, also when the server does not read what is left to say."""
        self.close()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def give_up(self) -> None:
        """Close a connection that came to nothing."""
        self.greeted.cancel()
        self.retired = self.closing = True
        transport = getattr(self, "transport", None)
        if transport is not None:
            transport.abort()

    # frames

    def odd(self, data: bytes, start: int) -> int:
        if data.startswith(ALERT, start) and not self.greeted.done():
            self._greet_not(SPEAKS_TLS)
        return super().odd(data, start)

    def whole(self, stream: int, flags: int, aux: int, head: bytes, body: bytes) -> None:
        if aux != stream:
            raise frames.Broken("a reply names two calls")
        metadata = self._metadata(stream, head, flags) if flags else {}
        waiter = self.pending.pop(stream, None)
        if waiter is None:
            opened = self.streams.get(stream)
            if opened is not None:
                opened.metadata |= metadata
            return
        if not waiter.done():
            waiter.set_result(Reply(body=body, metadata=metadata))
        if self._queue or self.retired:
            self._next()
            self._check_done()

    def other(self, kind: int, flags: int, stream: int, aux: int, head: bytes, body: bytes) -> None:
        match kind:
            case frames.ERROR:
                self._failed(stream, frames.error_of(body, aux))
            case frames.END:
                opened = self.streams.get(stream)
                if opened is not None:
                    opened.trailer |= self._metadata(stream, head, flags)
                    opened.finish()
            case frames.GOAWAY:
                self._go_away(aux, body)
            case frames.HELLO if not self.greeted.done():
                self.peer = frames.settings_of(body)
                self.most = self.peer.calls
                self.at_once = min(_FRAGMENT, self.peer.message)
                self.greeted.set_result(None)
            case _:
                raise frames.Broken(f"a server sends no frame of kind {kind} here")

    def begin(self, stream: int, pieces: Pieces) -> None:
        if stream in self.pending:  # else it was cancelled, and its reply is on its way
            super().begin(stream, pieces)

    def _metadata(self, stream: int, head: bytes, flags: int) -> dict[str, str]:
        """What goes with a reply, which fails when that is over the limits."""
        metadata = frames.metadata_of(head, flags)
        limits = self.limits
        if len(head) > limits.headers or len(metadata) > limits.fields:
            text = f"over {limits.headers} bytes or {limits.fields} fields"
            self.refuse(stream, TooLarge(f"the metadata of the reply is {text}"))
        return metadata

    def reset(self, stream: Stream, error: Exception) -> None:
        if stream.number in self.streams and not stream.ended:
            self.send(frames.frame(frames.CANCEL, stream.number))
        stream.finish(error)

    def refuse(self, stream: int, error: MicroError) -> None:
        self.send(frames.frame(frames.CANCEL, stream))
        error.sent = None  # it was the reply that was too large
        self._failed(stream, error)

    def broken(self, error: MicroError) -> None:
        self.fail(DataLoss(f"{self._address}: {error.detail}"))
        self.closing = True
        self.transport.abort()

    def _failed(self, number: int, error: MicroError) -> None:
        waiter = self.pending.pop(number, None)
        if waiter is not None:
            self.forget(number)
            if not waiter.done():
                waiter.set_exception(error)
            self._next()
        opened = self.streams.get(number)
        if opened is not None:
            opened.finish(error)
        self._check_done()

    def _go_away(self, last: int, body: bytes) -> None:
        """The server stops: what it has not seen may go to another, the rest ends here."""
        self.retired = True
        for number in [one for one in (*self.pending, *self.streams) if one > last]:
            text = f"{self._address}: the server is stopping"
            self._failed(number, Unavailable(text, sent=False))
        if body:
            told = frames.error_of(body, 0)
            if not self.greeted.done():
                told.sent = False
                self.greeted.set_exception(told)
            self.fail(told)
        while self._queue:
            self._next()
        self._check_done()

    def _next(self) -> None:
        """Let one more of those who wait for their turn go on."""
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                self.most -= 1
                waiter.set_result(None)
                return

    def _check_done(self) -> None:
        if not self.pending and not self.streams:
            self._done.set()
            if self.retired:
                self.close()

    def _look(self) -> None:
        """Ask a server that is silent while calls wait; close what nobody uses."""
        self._timer = self.loop.call_later(_LOOK, self._look)
        if self.closing:
            self.transport.abort()
            return
        self._silent = 0 if self.heard else self._silent + 1
        self.heard = False
        if self.pending or self.streams:
            if self._silent == _ASK:
                self.send(frames.frame(frames.PING, 0))
            elif self._silent >= _GIVE_UP:
                waited = _LOOK * _GIVE_UP
                self.fail(Unavailable(f"{self._address}: silent for {waited:g} s"))
                self.transport.abort()
        elif self._silent >= _IDLE:
            self.retired = True
            self.close()


def _copy(error: MicroError) -> MicroError:
    """An error of its own for each caller: one raised twice would gather two tracebacks."""
    return type(error)(
        error.detail,
        id=error.id,
        details=error.details,
        remote=error.remote,
        sent=error.sent,
        retry_after=error.retry_after,
    )


def _looked_at(greeted: asyncio.Future[None]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not greeted.cancelled():
        greeted.exception()
