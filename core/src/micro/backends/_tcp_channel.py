"""The client's channel of the native protocol: one connection to a node, made when needed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from micro.backends import _tcp_frames as frames
from micro.backends._connecting import connect, connecting
from micro.backends._tcp_client import ClientLink
from micro.backends._tcp_link import Received
from micro.call import Call, Reply
from micro.deadline import Alarm, Deadlines
from micro.errors import Closed, DeadlineExceeded, Unavailable
from micro.transport import Channel, Limits, split_address

if TYPE_CHECKING:
    from ssl import SSLContext

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
        #: How many calls wait for a connection.
        self._waiting = 0
        self._waited = asyncio.Event()
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
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._quiet()
        finally:
            if self._connecting is not None:
                self._connecting.cancel()
                await asyncio.gather(self._connecting, return_exceptions=True)
            for link in self._links():
                link.fail(Unavailable(f"{self._address}: the channel was closed"))
                link.close_now()
            self._current = None

    async def _quiet(self) -> None:
        """Wait until no call runs, nor waits for a connection; no new one is taken."""
        self._retire()
        while self._waiting:
            self._waited.clear()
            await self._waited.wait()
        self._retire()  # the one that they waited for
        for link in self._links():
            await link.quiet()

    def _retire(self) -> None:
        for link in self._links():
            link.retired = True

    def _links(self) -> list[ClientLink]:
        return [link for link in (self._current, *self._retired) if link is not None]

    async def _connected(self) -> ClientLink:
        if self._closed:
            raise Closed(f"channel to {self._address}: used after it was closed")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._connect())
        connecting, task = self._connecting, asyncio.current_task()
        asked = task.cancelling() if task else 0
        self._waiting += 1
        try:
            link = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if task and task.cancelling() > asked:
                raise
            raise self._unavailable("the channel was closed") from None
        finally:
            self._waiting -= 1
            self._waited.set()
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
        within = connecting(
            self._address, self._deadlines, secure=self._tls is not None, timeout=self._timeout
        )
        try:
            with within:
                await connect(lambda: link, self._where, self._tls, timeout=self._timeout)
                await link.greeted
        except BaseException:
            link.give_up()
            raise
        self._current = link
        return link


def _late(call: Call) -> DeadlineExceeded:
    return DeadlineExceeded(f"{call.service} {call.endpoint}: the stream ran longer than it may")
