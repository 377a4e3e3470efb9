"""The client's side of HTTP: the connections to one node, and the calls and streams on them."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from micro.backends._connecting import connect, connecting
from micro.backends._http_link import Connection, Link, StreamLink
from micro.backends._http_wire import (
    metadata_lines,
    request_beginning,
    request_bytes,
    request_ending,
)
from micro.call import Call, Reply
from micro.deadline import Alarm, Deadlines
from micro.errors import Closed, DeadlineExceeded, TooLarge
from micro.transport import Channel, Limits, split_address

if TYPE_CHECKING:
    from ssl import SSLContext

#: For how many endpoints the beginning of their requests is kept.
_BEGINNINGS = 1024

L = TypeVar("L", bound=Link)


class HTTPChannel(Channel):
    """Connections to one node; each carries one call at a time, as Go's server needs it."""

    def __init__(
        self,
        address: str,
        limits: Limits,
        deadlines: Deadlines,
        tls: SSLContext | None,
        timeout: float,
        *,
        pool_size: int,
        pool_ttl: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = address
        self._where = split_address(address)
        self._host = address if self._where[1] >= 0 else "localhost"
        self._limits = limits
        self._deadlines = deadlines
        self._tls = tls
        self._timeout = timeout
        self._pool_size = pool_size
        self._pool_ttl = pool_ttl
        self._beginnings: dict[tuple[str, str, str], bytes] = {}
        self._number = 0
        #: Those without a call, the one that was used last at the end; and all.
        self._idle: deque[Connection] = deque()
        self._links: set[Link] = set()
        #: How many calls wait for a connection.
        self._connecting = 0
        self._changed = asyncio.Event()
        #: No new call; and no call at all any more.
        self._closed = False
        self._ended = False

    async def call(self, call: Call, body: bytes) -> Reply:
        if len(body) > self._limits.message:
            text = f"the request has {len(body)} bytes, {self._limits.message} at most"
            raise TooLarge(text, sent=False)
        beginning = self._beginning(call)
        connection = self._reusable() or await self._connect(self._new_connection)
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        connection.waiter = waiter
        connection.number = number = self._next()
        try:
            if connection.is_go:
                beginning += connection.apart()
            ending = request_ending(call, number)
            connection.transport.write(request_bytes(beginning, ending, body))
            return await waiter
        finally:
            self._release(connection)

    @asynccontextmanager
    async def stream(self, call: Call, body: AsyncIterator[bytes]) -> AsyncIterator[Reply]:
        beginning = self._beginning(call)
        number = self._next()
        beginning += b"Micro-Stream: %b\r\n" % number
        ending = request_ending(call, number)
        link = await self._connect_in_time(call)
        link.open(beginning, ending)
        sending = asyncio.create_task(link.send_all(body))
        alarm = None
        if call.deadline is not None:
            alarm = Alarm(call.deadline, lambda: link.broken(_late(call)))
            self._deadlines.add(alarm)
        try:
            yield Reply(body=link.inbox, metadata=link.metadata, trailer=link.trailer)
        finally:
            if alarm is not None:
                self._deadlines.discard(alarm)
            link.abort()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def aclose(self, *, grace: float = 0) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while self._links or self._connecting:
                    self._changed.clear()
                    await self._changed.wait()
        self._ended = True
        for link in tuple(self._links):
            link.abort()

    def _next(self) -> bytes:
        """A Micro-Id."""
        number = self._number
        self._number = number + 1
        return b"%d" % number

    def _beginning(self, call: Call) -> bytes:
        """What the head of the call begins with, its metadata included."""
        if self._closed:
            raise Closed(f"channel to {self._address}: used after it was closed")
        key = (call.service, call.endpoint, call.content_type)
        beginning = self._beginnings.get(key)
        if beginning is None:
            if len(self._beginnings) >= _BEGINNINGS:
                self._beginnings.clear()
            beginning = self._beginnings[key] = request_beginning(self._host, *key)
        return beginning + metadata_lines(call.metadata) if call.metadata else beginning

    def _reusable(self) -> Connection | None:
        """An idle connection, if there is one that its server has not closed, nor soon will."""
        idle = self._idle
        if not idle:
            return None
        now = time.monotonic()
        oldest = now - self._pool_ttl
        if idle[0].used < oldest:
            idle.popleft().abort()
        while idle:
            connection = idle.pop()
            if connection.reusable and connection.used >= oldest:
                connection.used = now
                return connection
            connection.abort()
        return None

    def _release(self, connection: Connection) -> None:
        if (
            connection.waiter is None
            and connection.reusable
            and not self._closed
            and len(self._idle) < self._pool_size
        ):
            self._idle.append(connection)
        else:  # cancelled or broken: what still comes must not answer the next call
            connection.abort()

    def _new_connection(self) -> Connection:
        return Connection(self._address, self._limits, self._lost)

    async def _connect_in_time(self, call: Call) -> StreamLink:
        def make() -> StreamLink:
            return StreamLink(self._address, self._limits, self._lost, call.kind)

        try:
            with self._deadlines.until(math.inf if call.deadline is None else call.deadline):
                return await self._connect(make)
        except TimeoutError:
            raise _late(call) from None

    async def _connect(self, make: Callable[[], L]) -> L:
        within = connecting(
            self._address, self._deadlines, secure=self._tls is not None, timeout=self._timeout
        )
        self._connecting += 1
        try:
            with within:
                link = await connect(make, self._where, self._tls, timeout=self._timeout)
        finally:
            self._connecting -= 1
            self._changed.set()
        self._links.add(link)
        if self._ended:
            link.abort()
            raise Closed(f"channel to {self._address}: closed while it connected")
        return link

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        if isinstance(link, Connection) and link in self._idle:
            self._idle.remove(link)
        self._changed.set()


def _late(call: Call) -> DeadlineExceeded:
    return DeadlineExceeded(f"{call.service} {call.endpoint}: the stream did not end in time")
