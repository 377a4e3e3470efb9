"""One stream of the native protocol, the same on both sides: messages in, messages out, credit."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

from micro.backends import _tcp_frames as frames
from micro.errors import MicroError, TooLarge, Unavailable

if TYPE_CHECKING:
    from micro.backends._tcp_link import Link

_DATA = frames.DATA
_pack = frames.pack
_SIZE = frames.SIZE
_FRAGMENT = frames.FRAGMENT
#: How much of a window is read before its credit goes back.
_HALF = frames.WINDOW // 2


class Stream:
    """Both directions of one stream.

    What may be on its way is bounded by credit in bytes, which the reader gives back; the pieces of
    a large message are paid for as long as nothing else waits to be read.
    """

    def __init__(self, link: Link, number: int, credit: int) -> None:
        self.number = number
        #: Bytes that may be sent.
        self.credit = credit
        #: What the peer said first and last; on a client.
        self.metadata: dict[str, str] = {}
        self.trailer: dict[str, str] = {}
        self.ended = False
        self.error: BaseException | None = None
        self._link = link
        self._most = link.limits.message + _SIZE
        self._queue: deque[bytes] = deque()
        self._pieces: list[bytes] = []
        self._costs: deque[int] = deque()
        self._size = 0
        self._granted = frames.WINDOW
        self._owed = 0
        self._taken = 0
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    # what comes in; called by the link

    def received(self, body: bytes, *, more: bool) -> None:
        """A frame of data.

        Raises:
            Broken: the peer sends more than it has credit for.
        """
        if self.ended:
            return
        cost = len(body) + _SIZE
        self._granted -= cost
        if self._granted < 0:
            raise frames.Broken("the peer sends more on a stream than it was given credit for")
        if more or self._pieces or cost > self._most:
            self._piece(body, cost, more=more)
        else:
            self._queue.append(body)
        self.wake_reader()

    def _piece(self, body: bytes, cost: int, *, more: bool) -> None:
        if not body:  # it would make a message that looks small, and is paid for twice
            raise frames.Broken("the last piece of a message is empty")
        self._pieces.append(body)
        self._size += len(body)
        if self._size > self._link.limits.message:
            most = self._link.limits.message
            self._link.reset(self, TooLarge(f"a message of the stream is over {most} bytes"))
            return
        if more:
            self._owed += cost
            if not self._queue:
                self._pay()
            return
        self._costs.append(cost)  # of the last piece; the others are paid for on their own
        self._queue.append(b"".join(self._pieces))
        self._pieces = []
        self._size = 0

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more comes in; what came before is still read."""
        if not self.ended:
            self.ended = True
            self.error = error
            self.wake_reader()
            if error is not None:
                self.wake_writer()

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """What comes in; its end is the peer's, its error too."""
        queue = self._queue
        while True:
            while queue:
                message = queue.popleft()
                size = len(message)
                self._taken += size + _SIZE if size <= _FRAGMENT else self._costs.popleft()
                if self._taken >= _HALF:
                    self._give()
                yield message
            if self.ended:
                if self.error is not None:
                    raise self.error
                return
            await self.readable()

    async def readable(self) -> None:
        """Wait until there is a message, the peer's metadata, or the end."""
        if self._owed:
            self._pay()
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _pay(self) -> None:
        self._taken += self._owed
        self._owed = 0
        if self._taken >= _HALF:
            self._give()

    def _give(self) -> None:
        self._granted += self._taken
        self._link.send(frames.frame(frames.CREDIT, self.number, aux=self._taken))
        self._taken = 0

    def wake_reader(self) -> None:
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    # what goes out

    async def send_all(self, body: AsyncIterator[bytes]) -> None:
        """Send the messages of ``body``, no faster than the peer and the connection take them."""
        link, number, most = self._link, self.number, self._link.peer.message
        async for message in body:
            size = len(message)
            if size > most:
                raise TooLarge(f"a message has {size} bytes, the peer takes {most}")
            if size > _FRAGMENT:
                await self._send_large(message)
                continue
            size += _SIZE
            if size > self.credit or link.paused:
                await self._room(size)
            self.credit -= size
            link.send_soon(_pack(len(message), _DATA, 0, 0, number, number) + message)

    async def _send_large(self, message: bytes) -> None:
        view = memoryview(message)
        for start in range(0, len(message), _FRAGMENT):
            piece = view[start : start + _FRAGMENT]
            size = len(piece) + _SIZE
            await self._room(size)
            self.credit -= size
            flags = frames.MORE if start + _FRAGMENT < len(message) else 0
            head = frames.header(frames.DATA, flags, 0, len(piece), self.number, self.number)
            self._link.send_from(head, piece)

    async def _room(self, size: int) -> None:
        """Wait for credit, then for the connection."""
        link = self._link
        while self.credit < size and not link.closing:
            if isinstance(self.error, MicroError):
                raise self.error
            self._writer = asyncio.get_running_loop().create_future()
            try:
                await self._writer
            finally:
                self._writer = None
        if link.paused:
            await link.writable()
        if link.closing:
            raise Unavailable("the connection was lost")

    def credited(self, count: int) -> None:
        """The peer takes so many bytes more.

        Raises:
            Broken: more than anybody may be given.
        """
        self.credit += count
        if self.credit > 0x7FFF_FFFF:
            raise frames.Broken("the peer gives more credit than there can be")
        self.wake_writer()

    def wake_writer(self) -> None:
        writer = self._writer
        if writer is not None and not writer.done():
            writer.set_result(None)
