"""What both sides of a native connection share: frames in and out, messages in pieces, streams."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from abc import abstractmethod
from typing import Any, ClassVar, cast

import msgspec

from micro.backends import _tcp_frames as frames
from micro.backends._tcp_stream import Stream
from micro.errors import DataLoss, MicroError, ResourceExhausted, TooLarge
from micro.transport import Limits

_SIZE = frames.SIZE
_FRAGMENT = frames.FRAGMENT
_STRANGE = 0xFF & ~frames.FLAGS
_MORE = frames.MORE
_unpack = frames.unpack
#: Bytes of calls that are gathered within one turn of the loop before they go to the socket: few,
#: so that the peer begins while the rest is made. Measured: with 64 KiB the two sides wait for each
#: other, and do half as many calls. A stream gathers more, as its reader has enough to do.
_GATHER = 1536
_GATHER_STREAM = 16 * 1024
#: Bytes that the socket has not taken: above the first nothing more is sent, or read to be
#: answered, until they are below the second.
_HIGH = 512 * 1024
_LOW = 128 * 1024
#: Also of what the kernel has taken and not sent: nothing can overtake that, and by itself it would
#: be megabytes. Python 3.11 does not have the name.
_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else 0)
#: Large messages that may be on their way in one direction at once, of which each is in pieces.
_UNFINISHED = 16


class Received:
    """The memory that all connections of one loop read into: each is done with it at once."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(256 * 1024))


class Pieces(msgspec.Struct):
    """A message of which the rest is still to come."""

    flags: int
    aux: int
    head: bytes
    bodies: list[bytes]
    size: int
    began: float = msgspec.field(default_factory=time.monotonic)


class Link(asyncio.BufferedProtocol):
    """One connection; its owner is a server's session or a client's channel."""

    __slots__ = (
        "_flushing",
        "_gathered",
        "_held",
        "_largest",
        "_memory",
        "_out",
        "_pieces",
        "_tail",
        "_turns",
        "_writers",
        "active",
        "closing",
        "heard",
        "limits",
        "loop",
        "paused",
        "peer",
        "streams",
        "transport",
    )

    #: The one kind of frame that comes in most: whole calls on a server, whole replies on a client.
    often: ClassVar[int]

    def __init__(self, memory: Received, limits: Limits) -> None:
        self.limits = limits
        self.peer = _UNKNOWN
        self.paused = False
        self.closing = False
        #: Whether a frame came since this was last set to False.
        self.heard = True
        #: The calls that run, by their stream.
        self.active: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self._largest = min(_FRAGMENT, limits.message)
        self._memory = memory.view
        self._tail = b""
        self._held = 0
        self._out: list[bytes] = []
        self._gathered = 0
        self._flushing = False
        self._pieces: dict[int, Pieces] = {}
        self._turns: asyncio.Semaphore | None = None
        self._writers: list[asyncio.Future[None]] = []

    # what an owner does

    @abstractmethod
    def whole(self, stream: int, flags: int, aux: int, head: bytes, body: bytes) -> None:
        """A complete message of the kind that comes often."""

    def assembled(self, stream: int, pieces: Pieces, body: bytes) -> None:
        """As ``whole``, of a message that came in pieces."""
        self.whole(stream, pieces.flags, pieces.aux, pieces.head, body)

    def odd(self, data: bytes, start: int) -> int:
        """Where to read on after what is no frame.

        Raises:
            Broken: nowhere.
        """
        raise frames.Broken("a frame has a bad length or an unknown flag")

    @abstractmethod
    def other(self, kind: int, flags: int, stream: int, aux: int, head: bytes, body: bytes) -> None:
        """A frame that only one of the sides gets.

        Raises:
            Broken: a frame that this side does not get.
        """

    @abstractmethod
    def reset(self, stream: Stream, error: MicroError) -> None:
        """End a stream that cannot go on, and tell the peer."""

    @abstractmethod
    def broken(self, error: MicroError) -> None:
        """The peer does not keep to the protocol: close."""

    @abstractmethod
    def refuse(self, stream: int, error: MicroError) -> None:
        """A message in pieces is not taken; the rest of it will be ignored."""

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.loop = asyncio.get_running_loop()
        self.transport.set_write_buffer_limits(high=_HIGH, low=_LOW)
        sock = transport.get_extra_info("socket")
        if _NOTSENT_LOWAT and sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, _HIGH)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = self.closing
        waiting, self._writers = self._writers, []
        for writer in waiting:
            if not writer.done():
                writer.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        self._held = held = len(self._tail)
        if not held:
            return self._memory
        self._memory[:held] = self._tail
        return self._memory[held:]

    def buffer_updated(self, nbytes: int) -> None:
        flushing, self._flushing = self._flushing, True
        try:
            self._read(self._held + nbytes)
        except frames.Broken as exc:
            self._tail = b""
            self.broken(DataLoss(str(exc)))
        finally:
            self._flushing = flushing
            if not flushing:
                self.flush()

    def _read(self, end: int) -> None:
        data = bytes(self._memory[:end])  # cheaper than many small pieces of a memoryview
        often, largest = self.often, self._largest
        start = 0
        while end - start >= _SIZE:
            length, kind, flags, head_length, stream, aux = _unpack(data, start)
            head_start = start + _SIZE
            body_start = head_start + head_length
            stop = head_start + length
            size = length - head_length
            if size < 0 or size > _FRAGMENT or flags & _STRANGE:
                start = self.odd(data, start)
                continue
            if stop > end:
                break
            head = data[head_start:body_start] if head_length else b""
            body = data[body_start:stop]
            start = stop
            if kind == often and not flags & _MORE and size <= largest:
                self.whole(stream, flags, aux, head, body)
            else:
                self._seldom(kind, flags, stream, aux, head, body)
            if self.closing:
                return
            self.heard = True
        self._tail = data[start:]

    def _seldom(
        self, kind: int, flags: int, stream: int, aux: int, head: bytes, body: bytes
    ) -> None:
        if flags & _MORE:
            self._check_piece(kind, len(body))
        if aux != stream and kind in frames.NUMBERED_TWICE:
            raise frames.Broken(f"a frame of kind {kind} names two streams")
        match kind:
            case frames.DATA:
                self._data(stream, flags, body)
            case frames.CREDIT:
                known = self.streams.get(stream)
                if known is not None:
                    known.credited(aux)
            case self.often:
                self.begin(stream, Pieces(flags & ~_MORE, aux, head, [body], len(body)))
                if not flags & _MORE or len(body) > self._largest:
                    self._over(stream)
            case frames.PING:
                if not self.paused:  # who does not read what we say is not told more of it
                    self.send(frames.frame(frames.PONG, 0, aux=aux))
            case frames.PONG:
                pass
            case _:
                self.other(kind, flags, stream, aux, head, body)

    def _check_piece(self, kind: int, size: int) -> None:
        if kind not in (self.often, frames.DATA):
            raise frames.Broken(f"a frame of kind {kind} cannot be in pieces")
        if size != _FRAGMENT:
            raise frames.Broken(f"a piece of a message has {size} bytes, not {_FRAGMENT}")

    def _data(self, stream: int, flags: int, body: bytes) -> None:
        known = self.streams.get(stream)
        if known is not None:
            known.received(body, more=bool(flags & _MORE))
        elif stream in self._pieces:
            self._piece(stream, flags, body)

    def begin(self, stream: int, pieces: Pieces) -> None:
        """The first piece of a message of the kind that comes often."""
        if stream in self._pieces:
            raise frames.Broken(f"stream {stream} is used twice")
        if len(self._pieces) >= _UNFINISHED:
            self.refuse(stream, ResourceExhausted("too many large messages at once", sent=False))
        else:
            self._pieces[stream] = pieces

    def _piece(self, stream: int, flags: int, body: bytes) -> None:
        if not body:
            raise frames.Broken("the last piece of a message is empty")
        pieces = self._pieces[stream]
        pieces.bodies.append(body)
        pieces.size += len(body)
        if pieces.size > self.limits.message:
            self._over(stream)
        elif not flags & _MORE:
            del self._pieces[stream]
            whole = b"".join(pieces.bodies)
            self.assembled(stream, pieces, whole)

    @property
    def unfinished(self) -> bool:
        """Whether the rest of a message is to come."""
        return bool(self._pieces)

    @property
    def is_within_frame(self) -> bool:
        """Whether the rest of a frame is to come."""
        return bool(self._tail)

    def _over(self, stream: int) -> None:
        if self._pieces.pop(stream, None) is not None:
            most = self.limits.message
            self.refuse(stream, TooLarge(f"the message is over {most} bytes", sent=False))

    def overdue(self, seconds: float) -> bool:
        """Whether a message has been coming for longer than that."""
        oldest = time.monotonic() - seconds
        return any(pieces.began < oldest for pieces in self._pieces.values())

    def forget(self, stream: int) -> None:
        """The rest of a message is not wanted any more."""
        self._pieces.pop(stream, None)

    # what goes out

    def send(self, data: bytes) -> None:
        """Send a frame with what else this turn of the loop has to send.

        When at most one call runs on the connection, it goes at once.
        """
        self._out.append(data)
        self._gathered += len(data)
        if self._gathered > _GATHER or (len(self.active) <= 1 and not self._flushing):
            self.flush()
        elif not self._flushing:
            self._flush_soon()

    def send_soon(self, data: bytes) -> None:
        """As ``send``, but more will follow, as in a stream: it waits for that."""
        self._out.append(data)
        self._gathered += len(data)
        if self._gathered > _GATHER_STREAM:
            self.flush()
        elif not self._flushing:
            self._flush_soon()

    def _flush_soon(self) -> None:
        self._flushing = True
        self.loop.call_soon(self._flush_gathered)

    def _flush_gathered(self) -> None:
        self._flushing = False
        self.flush()

    def flush(self) -> None:
        out = self._out
        if out:
            self._out = []
            self._gathered = 0
            if not self.closing:
                self.transport.write(out[0] if len(out) == 1 else b"".join(out))

    def send_from(self, head: bytes, body: memoryview) -> None:
        """Send a frame whose body is large, without another copy of it."""
        self.flush()
        if self.closing:
            return
        transport = self.transport
        if transport.get_write_buffer_size():
            # Not by writelines, which pauses nobody in Python 3.12.0 to 3.12.8 and 3.13.0, 3.13.1.
            transport.write(head)
            transport.write(body)
        else:
            transport.writelines((head, body))

    @property
    def turns(self) -> asyncio.Semaphore:
        """Held by who sends a message in pieces: the peer takes so many at once."""
        if self._turns is None:
            self._turns = asyncio.Semaphore(_UNFINISHED)
        return self._turns

    async def send_in_pieces(
        self, kind: int, stream: int, head: bytes, flags: int, aux: int, body: bytes
    ) -> None:
        """Send a message that needs several frames; what others have to send goes in between."""
        view = memoryview(body)
        first = frames.header(kind, flags | _MORE, len(head), _FRAGMENT, stream, aux) + head
        next_ones = frames.header(frames.DATA, _MORE, 0, _FRAGMENT, stream, stream)
        last = (len(body) - 1) // _FRAGMENT * _FRAGMENT
        for start in range(0, last, _FRAGMENT):
            if self.paused and start:  # not before the first: calls come in the order of numbers
                await self.writable()
            self.send_from(next_ones if start else first, view[start : start + _FRAGMENT])
        self.send(frames.frame(frames.DATA, stream, body[last:]))

    async def writable(self) -> None:
        """Wait until the socket has taken what waits, or the connection is lost.

        All who wait go on at once, each with one frame: the socket may then be full again, but who
        asked anew each time could wait for as long as another has something to send.
        """
        if self.closing:
            return
        writer = self.loop.create_future()
        self._writers.append(writer)
        await writer

    def close(self) -> None:
        """Send what waits, then close."""
        if not self.closing:
            self.flush()
            self.lost()
            if not self.transport.is_closing():  # asyncio's of TLS breaks when it is closed twice
                self.transport.close()

    def lost(self) -> None:
        """Nothing more is sent; wake all who wait to, they see that it is closing."""
        self.closing = True
        self.resume_writing()


_UNKNOWN = frames.Settings(message=0, headers=0, calls=0, streams=0)
