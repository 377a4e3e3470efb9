"""A client's connections to a server: one for calls, one after another, or one for a stream."""

from __future__ import annotations

import asyncio
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable
from typing import cast

from micro.backends._http_head import Refused
from micro.backends._http_reader import Reader
from micro.backends._http_stream import Inbox, Lost, Outlet, close_iterator, notice_loss
from micro.backends._http_wire import EOS, Answer, read_answer, request_bytes
from micro.call import Kind, Reply
from micro.errors import DeadlineExceeded, Internal, MicroError, TooLarge, Unavailable
from micro.handshake import ALERT, SPEAKS_TLS, explained, is_refusal
from micro.transport import Limits


class Link(asyncio.Protocol):
    """One connection; ``lost`` is told of its end."""

    def __init__(self, address: str, limits: Limits, lost: Callable[[Link], None]) -> None:
        self.address = address
        self.limits = limits
        self._lost = lost
        self._reader: Reader[Answer] = Reader(read_answer, limits, begins=b"HTTP/1.")

    def abort(self) -> None:
        self.transport.abort()

    def broken(self, error: MicroError) -> None:
        """It cannot go on."""
        self.fail(error)
        self.abort()

    @abstractmethod
    def fail(self, error: MicroError) -> None:
        """Tell whoever waits."""

    @abstractmethod
    def take(self, answer: Answer, id: bytes, body: bytes) -> None:
        """An answer has come, to the request of this Micro-Id, if it says so."""

    @abstractmethod
    def expects(self) -> bool:
        """Whether something may still come."""

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        message = self._reader.end() if exc is None else None
        if message is not None:
            self.take(message[0], message[1][1], message[2])
        else:
            why = str(exc) if exc else "it closed the connection"
            sent = False if is_refusal(exc) else None
            text = explained(exc) or f"no reply: {why}"
            self.fail(Unavailable(f"{self.address}: {text}", sent=sent))
        self._lost(self)

    def data_received(self, data: bytes) -> None:
        if not self.expects():
            self.abort()  # nobody asked: what it says must not become an answer
            return
        try:
            message = self._reader.read(data)
            while message is not None:
                answer, numbers, body = message
                if answer.status >= 200:
                    self.take(answer, numbers[1], body)
                if not self._reader.rest:
                    return
                message = self._reader.read(b"")
        except Refused as exc:
            if data.startswith(ALERT):
                self.broken(Unavailable(f"{self.address}: {SPEAKS_TLS}", sent=False))
            else:
                self.broken(self._garbled(exc.error))

    def _garbled(self, error: MicroError) -> MicroError:
        text = f"{self.address}: {error.detail}"
        return TooLarge(text) if isinstance(error, TooLarge) else Internal(text)


class Connection(Link):
    """A connection for calls, at most one at a time."""

    def __init__(self, address: str, limits: Limits, lost: Callable[[Link], None]) -> None:
        super().__init__(address, limits, lost)
        self.used = time.monotonic()
        self.reusable = True
        #: Whether the server is one of Go Micro; known with the first answer.
        self.is_go = False
        #: Of the call, its Micro-Id.
        self.number = b""
        self.waiter: asyncio.Future[Reply] | None = None
        self._apart = 0

    def apart(self) -> bytes:
        """A header that keeps a call apart from the one before in a server of Go Micro.

        Without it, such a server hands a request that comes before it is done with the last one to
        that one's handler, and nobody answers it (server/rpc_server.go, the pool of sockets). Our
        server does not read this form of the header, which no client uses for a stream.
        """
        self._apart += 1
        return b"X-Micro-Stream: %d\r\n" % self._apart

    def expects(self) -> bool:
        return self.waiter is not None

    def fail(self, error: MicroError) -> None:
        self.reusable = False
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def take(self, answer: Answer, id: bytes, body: bytes) -> None:
        # One of Go Micro repeats that of the connection's first call.
        if id != self.number and id and not answer.is_go:
            self.broken(Internal(f"{self.address}: it answers another call"))
            return
        if self._reader.rest or not answer.keep_alive:
            self.reusable = False  # or it has said more than it was asked
        self.is_go = answer.is_go
        waiter, self.waiter = self.waiter, None
        if waiter is None or waiter.done():
            self.reusable = False
            return
        error = None if answer.is_reply else answer.error(body)
        if error is None:
            waiter.set_result(Reply(body=body, metadata=answer.metadata.copy()))
        else:
            waiter.set_exception(error)

    def eof_received(self) -> None:
        self.reusable = False


class StreamLink(Link):
    """A connection for one stream; ``inbox`` has what the server says."""

    def __init__(
        self, address: str, limits: Limits, lost: Callable[[Link], None], kind: Kind
    ) -> None:
        super().__init__(address, limits, lost)
        #: What the server said first, and last.
        self.metadata: dict[str, str] = {}
        self.trailer: dict[str, str] = {}
        self._kind = kind
        self._begun = False
        self._beginning = b""
        self._ending = b""

    def open(self, beginning: bytes, ending: bytes) -> None:
        """Send the request that opens it; all others have the same head, but for their lengths."""
        self._beginning, self._ending = beginning, ending
        self.transport.write(request_bytes(beginning, ending, b""))

    async def send_all(self, body: AsyncIterator[bytes]) -> None:
        """Send what the client says, and its end.

        The one message of a stream of the server is no stream: it has no end. Go Micro's server
        would take it for that of the whole stream.
        """
        try:
            async for message in body:
                await self._outlet.send(self._request(message))
            if self._kind != "server":
                beginning = self._beginning + b"Micro-Error: EOS\r\n"
                await self._outlet.send(request_bytes(beginning, self._ending, b""))
        except Lost:
            pass  # who reads is told
        except Exception as exc:  # of whatever kind: the reader of the stream gets it
            self.inbox.end(exc)
            self.abort()
        finally:
            await close_iterator(body)

    def _request(self, message: bytes) -> bytes:
        if len(message) > self.limits.message:
            most = self.limits.message
            raise TooLarge(f"the message has {len(message)} bytes, {most} at most")
        return request_bytes(self._beginning, self._ending, message)

    def expects(self) -> bool:
        return True

    def fail(self, error: MicroError) -> None:
        self.inbox.end(error, at_once=isinstance(error, DeadlineExceeded))

    def take(self, answer: Answer, id: bytes, body: bytes) -> None:
        if answer.told == EOS:
            self.trailer |= answer.metadata
            self.inbox.end()
            return
        error = answer.error(body)
        if error is not None:
            self.inbox.end(error)
            return
        if not self._begun:
            self._begun = True
            self.metadata |= answer.metadata
        self.inbox.put(body)
        if self._kind == "client":  # the one message, and a server of Go Micro tells no end
            self.inbox.end()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.inbox = Inbox(self.transport)
        self._outlet = Outlet(self.transport)
        notice_loss(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._outlet.close()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._outlet.pause()

    def resume_writing(self) -> None:
        self._outlet.resume()
