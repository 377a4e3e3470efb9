"""Streams over HTTP, as Go Micro has them: what both sides need, and the server's side.

A stream has a connection of its own. The client's messages are requests, the first of which only
opens it; the server's are responses, which come whenever there is one. The end is an error, EOS.
"""

from __future__ import annotations

import asyncio
import math
import select
import socket
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Self

from micro.backends._http_reader import Numbers
from micro.backends._http_wire import EOS, Request
from micro.call import Body, Call, Handler, Reply
from micro.deadline import Deadlines
from micro.errors import Cancelled, DeadlineExceeded, TooLarge, Unimplemented
from micro.transport import Limits

#: How many messages may wait to be read, and how many bytes of them, before reading stops.
_MESSAGES = 64
_BYTES = 256 * 1024
#: Also errors, which are always told. Not everywhere is there one for a peer that closed in peace.
_HUNG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)


class Lost(Exception):
    """The connection has ended."""


class Inbox:
    """Messages that have come and wait to be read, by one reader.

    What would be too many waits in the peer: the connection is not read on.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._messages: deque[bytes] = deque()
        self._size = 0
        #: Whether reading has stopped.
        self.paused = False
        self._ended = False
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, message: bytes) -> None:
        if self._ended:
            return
        self._messages.append(message)
        self._size += len(message)
        if not self.paused and (len(self._messages) >= _MESSAGES or self._size >= _BYTES):
            self.paused = True
            self._transport.pause_reading()
        self._wake()

    def end(self, error: BaseException | None = None, *, at_once: bool = False) -> None:
        """No more comes; ``error`` is raised after what waits, or instead of it."""
        if self._ended:
            return
        if at_once:
            self._messages.clear()
        self._ended, self._error = True, error
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._messages:
            if self._ended:
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._messages.popleft()
        self._size -= len(message)
        if self.paused and len(self._messages) <= _MESSAGES // 2 and self._size <= _BYTES // 2:
            self._resume()
        return message

    def close(self) -> None:
        """Nobody reads any more: what still comes is for others."""
        self.end(at_once=True)
        if self.paused:
            self._resume()

    def _resume(self) -> None:
        self.paused = False
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Outlet:
    """The way out of a connection, which waits while the socket is full."""

    __slots__ = ("_closed", "_transport", "_waiter", "full")

    def __init__(self, transport: asyncio.Transport) -> None:
        self.full = False
        self._closed = False
        self._transport = transport
        self._waiter: asyncio.Future[None] | None = None

    async def send(self, data: bytes) -> None:
        """Send; return when the socket has taken enough of it.

        Raises:
            Lost: the connection has ended.
        """
        if self._closed:
            raise Lost
        self._transport.write(data)
        if self.full:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def pause(self) -> None:
        self.full = True

    def resume(self) -> None:
        self.full = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        self._closed = True
        self.resume()


class ServerStream:
    """A stream at the server, from the request that opened it to its end.

    It is also the iterator of what the client says.
    """

    def __init__(
        self,
        request: Request,
        numbers: Numbers,
        body: bytes,
        call: Call,
        transport: asyncio.Transport,
    ) -> None:
        self.name = request.stream
        self._request = request
        self._number = numbers[1]
        self._body: bytes | None = body
        self._call = call
        self._call.kind = "bidi"
        self._inbox = Inbox(transport)

    @property
    def was_call(self) -> bool:
        """Whether it was none: a call that Go Micro makes while it handles a stream has its id.

        The server knows, which puts the kind of the endpoint into the call.
        """
        return self._call.kind == "unary"

    @property
    def is_held_up(self) -> bool:
        """Whether nothing is read, since the handler does not read either."""
        return self._inbox.paused

    def take(self, told: str, body: bytes) -> None:
        """One more request of it has come."""
        if not told:
            self._inbox.put(body)
        elif told == EOS:
            self._inbox.end()
        else:
            self._inbox.end(Cancelled(f"the caller gave up: {told[:200]}"))

    async def serve(
        self, handler: Handler, outlet: Outlet, limits: Limits, deadlines: Deadlines
    ) -> None:
        """Have it handled, and send what the handler says.

        Raises:
            DeadlineExceeded: that took longer than its caller allows.
            MicroError: what else the caller has to be told.
        """
        deadline = self._call.deadline
        limit = deadlines.until(math.inf if deadline is None else deadline)
        try:
            with limit:
                reply = await handler(self._call, self)
                await self._answer(reply, outlet, limits)
        except TimeoutError:
            if not limit.expired:
                raise
            text = f"{self._call.endpoint}: not done within its deadline"
            raise DeadlineExceeded(text) from None
        finally:
            self._inbox.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if not self.was_call:
            return await anext(self._inbox)
        if self._body is None:
            raise StopAsyncIteration
        body, self._body = self._body, None
        return body

    async def _answer(self, reply: Reply, outlet: Outlet, limits: Limits) -> None:
        if isinstance(reply.body, bytes):
            await self._send(reply.body, reply.metadata, outlet, limits)
        else:
            await self._send_all(reply.body, reply.metadata, outlet, limits)
        if not self.was_call:
            await outlet.send(self._request.end(reply.trailer, self._number))

    async def _send_all(
        self,
        messages: AsyncIterator[bytes],
        metadata: dict[str, str],
        outlet: Outlet,
        limits: Limits,
    ) -> None:
        try:
            async for message in messages:
                await self._send(message, metadata, outlet, limits)
                metadata = {}
        finally:
            await close_iterator(messages)

    async def _send(
        self, message: bytes, metadata: dict[str, str], outlet: Outlet, limits: Limits
    ) -> None:
        message = checked_reply(message, limits)
        await outlet.send(self._request.reply(message, metadata, self._number))


def checked_reply(body: Body, limits: Limits) -> bytes:
    """``body``, if it can be sent.

    Raises:
        Unimplemented: it is a stream.
        TooLarge: it is over the limit.
    """
    if not isinstance(body, bytes):
        raise Unimplemented("the reply is a stream; call this endpoint as a stream")
    if len(body) > limits.message:
        raise TooLarge(f"the reply has {len(body)} bytes, {limits.message} at most")
    return body


def notice_loss(transport: asyncio.Transport) -> None:
    """Have the kernel find out within 20 seconds that a silent peer is lost.

    A stream may be silent for long, and HTTP has nothing to ask with.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def hung_up(transport: asyncio.Transport) -> bool:
    """Whether the peer has closed; asked while nothing is read, when nobody else would notice."""
    if transport.is_closing():
        return True
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), _HUNG_UP)
    return bool(poll.poll(0))


async def close_iterator(messages: AsyncIterator[bytes]) -> None:
    """End a generator that was not read to its end; what else is no generator needs none."""
    if isinstance(messages, AsyncGenerator):
        await messages.aclose()
