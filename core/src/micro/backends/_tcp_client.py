"""The client's side of the native protocol: one connection to a node, and the calls on it."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, ClassVar

from micro.backends import _tcp_frames as frames
from micro.backends._tcp_link import Link, Pieces, Received, settings
from micro.backends._tcp_stream import Stream
from micro.call import Call, Reply
from micro.deadline import Alarm, Deadlines
from micro.errors import (
    Closed,
    DataLoss,
    DeadlineExceeded,
    MicroError,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from micro.transport import Channel, Limits, split_address

if TYPE_CHECKING:
    from ssl import SSLContext

#: Seconds between two looks at a connection.
_LOOK = 5.0
#: Looks without a frame, while calls wait, after which a server is asked, and given up.
_ASK, _GIVE_UP = 2, 3
#: Looks after which a connection that nobody uses is closed: sooner than a server does.
_IDLE = 12
#: The number of a connection's last call; then another connection takes over.
_LAST_STREAM = 0xFFFF_FFFF
_FRAGMENT = frames.FRAGMENT
#: Bytes of a message that goes even while the socket is full, so that it waits for no large ones.
_SMALL = 4096
_REQUEST = frames.REQUEST
_pack = frames.pack


class TCPChannel(Channel):
    """One connection to a node, made when it is needed; all calls share it."""

    def __init__(
        self,
        address: str,
        memory: Received,
        limits: Limits,
        deadlines: Deadlines,
        tls: SSLContext | None,
        timeout: float,
    ) -> None:
        self._address = address
        self._where = split_address(address)
        self._memory = memory
        self._limits = limits
        self._deadlines = deadlines
        self._tls = tls
        self._timeout = timeout
        self._current: ClientLink | None = None
        self._connecting: asyncio.Task[ClientLink] | None = None
        self._retired: set[ClientLink] = set()
        self._closed = False

    async def call(self, call: Call, body: bytes) -> Reply:
        link = self._current
        if link is None or link.retired:
            link = await self._connected()
        if len(body) > link.at_once:
            return await link.call_large(call, body)
        head, flags = frames.call_head(call, link.peer.headers)
        if len(link.pending) >= link.most or link.paused:
            await link.turn()  # what fails after it would leave a turn to nobody
        aux = frames.time_left(call.deadline)
        size = len(head)
        number = link.number()
        waiter: asyncio.Future[Reply]
        waiter = link.pending[number] = link.loop.create_future()
        link.send(_pack(size + len(body), _REQUEST, flags, size, number, aux) + head + body)
        try:
            return await waiter
        except asyncio.CancelledError:
            link.cancel(number)
            raise

    @asynccontextmanager
    async def stream(self, call: Call, body: AsyncIterator[bytes]) -> AsyncIterator[Reply]:
        link = self._current
        if link is None or link.retired:
            try:
                with self._deadlines.until(math.inf if call.deadline is None else call.deadline):
                    link = await self._connected()
            except TimeoutError:
                raise _late(call) from None
        stream = link.open(call)
        alarm = None
        if call.deadline is not None:
            alarm = Alarm(call.deadline, lambda: link.reset(stream, _late(call)))
            self._deadlines.add(alarm)
        sending = asyncio.create_task(link.send_body(stream, body))
        messages = stream.messages()
        try:
            yield Reply(body=messages, metadata=stream.metadata, trailer=stream.trailer)
        finally:
            if alarm is not None:
                self._deadlines.discard(alarm)
            sending.cancel()
            link.leave(stream)
            await messages.aclose()
            await asyncio.gather(sending, return_exceptions=True)

    async def aclose(self, *, grace: float = 0) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        links = [link for link in (self._current, *self._retired) if link is not None]
        self._current = None
        for link in links:
            link.retired = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    for link in links:
                        await link.quiet()
        finally:
            for link in links:
                link.fail(Unavailable(f"{self._address}: the channel was closed"))
                link.close_now()

    async def _connected(self) -> ClientLink:
        if self._closed:
            raise Closed(f"channel to {self._address}: used after it was closed")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
        connecting, task = self._connecting, asyncio.current_task()
        asked = task.cancelling() if task else 0
        try:
            link = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if task and task.cancelling() > asked:
                raise
            raise self._unavailable("the channel was closed") from None
        if link.retired:
            raise self._unavailable("the server hung up at once")
        return link

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(f"{self._address}: {why}", sent=False)

    async def _connect(self) -> ClientLink:
        if self._current is not None:
            self._retired.add(self._current)
        self._retired = {link for link in self._retired if not link.closing}
        link = ClientLink(self._address, self._memory, self._limits)
        loop = asyncio.get_running_loop()
        host, port = self._where
        try:
            async with asyncio.timeout(self._timeout):
                if port < 0:
                    name = "localhost" if self._tls else None  # a path has no other
                    await loop.create_unix_connection(
                        lambda: link, host, ssl=self._tls, server_hostname=name
                    )
                else:
                    await loop.create_connection(lambda: link, host, port, ssl=self._tls)
                await link.greeted
        except (OSError, TimeoutError, ValueError) as exc:  # the last: of a host that is no name
            link.give_up()
            why = getattr(exc, "strerror", None) or str(exc) or f"no answer in {self._timeout:g} s"
            raise self._unavailable(why) from exc
        except BaseException:
            link.give_up()
            raise
        self._current = link
        return link


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
        self.transport.write(frames.PREFACE + frames.hello(settings(self.limits)))
        self._timer = self.loop.call_later(_LOOK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost()
        if self._timer is not None:
            self._timer.cancel()
        why = str(exc) if exc else "it closed the connection"
        self.fail(Unavailable(f"{self._address}: no reply: {why}"))

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
            self.greeted.set_exception(
                Unavailable(f"{self._address}: it does not speak the native protocol", sent=False)
            )
        for waiter in self.pending.values():
            if not waiter.done():
                waiter.set_exception(_copy(error))
        self.pending.clear()
        for stream in self.streams.values():
            stream.finish(_copy(error))
        while self._queue:
            self._next()
        self._done.set()

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
        if body:
            told = frames.error_of(body, 0)
            if not self.greeted.done():
                told.sent = False
                self.greeted.set_exception(told)
            self.fail(told)
        for number in [one for one in (*self.pending, *self.streams) if one > last]:
            text = f"{self._address}: the server is stopping"
            self._failed(number, Unavailable(text, sent=False))
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
    return type(error)(error.detail, id=error.id, remote=error.remote, sent=error.sent)


def _late(call: Call) -> DeadlineExceeded:
    return DeadlineExceeded(f"{call.service} {call.endpoint}: the stream ran longer than it may")


def _looked_at(greeted: asyncio.Future[None]) -> None:
    """A failure that nobody waits for any more is no news."""
    if not greeted.cancelled():
        greeted.exception()
