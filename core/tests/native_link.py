"""Native connections without a network: what is said to one, and what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from micro.backends._tcp_client import ClientLink
from micro.backends._tcp_frames import WINDOW
from micro.backends._tcp_link import Received
from micro.backends._tcp_server import TCPSession
from micro.backends._tcp_stream import Stream
from micro.call import Body, Call, Reply
from micro.deadline import Deadlines
from micro.transport import Limits


class Wire(asyncio.Transport):
    """Keeps what is written, and that it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.written += bytes(data)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is full here."""

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        """Nobody is asked to read."""

    def resume_reading(self) -> None:
        """As above."""

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Alone:
    """The port of a session that has none."""

    def lost(self, session: TCPSession) -> None:
        """Nobody wants to know."""

    def cancel(self, task: asyncio.Task[None]) -> None:
        task.cancel()


def link_of(side: str) -> ClientLink | TCPSession:
    """A client on which calls 1 to 3 and stream 4 run, or a server that echoes."""

    async def handler(call: Call, body: Body) -> Reply:
        return Reply(body=body if isinstance(body, bytes) else b"")

    if side == "client":
        link = ClientLink("here", Received(), Limits())
        for number in (1, 2, 3):
            link.pending[number] = link.greeted.get_loop().create_future()
            link.pending[number].add_done_callback(_looked_at)
        link.streams[4] = Stream(link, 4, WINDOW)
        return link
    session = TCPSession(Received(), handler, Limits(message=100_000), Deadlines())
    session.port = Alone()  # type: ignore[assignment] # a port has more, which is not used
    return session


def _looked_at(reply: asyncio.Future[Reply]) -> None:
    """Its error is what was to be seen."""
    if not reply.cancelled():
        reply.exception()


def feed(link: ClientLink | TCPSession, said: bytes, cuts: Sequence[int]) -> None:
    """Hand it all bytes, cut at these places."""
    places = sorted({0, len(said), *(cut % (len(said) + 1) for cut in cuts)})
    for start, stop in pairwise(places):
        part = said[start:stop]
        while part and not link.closing:
            buffer = link.get_buffer(-1)
            count = min(len(buffer), len(part))
            buffer[:count] = part[:count]
            link.buffer_updated(count)
            part = part[count:]


def what_is_said(
    side: str, said: bytes, cuts: Sequence[int], runner: asyncio.Runner | None = None
) -> tuple[bytes, bool]:
    """What a side answers to bytes that are cut so, and whether it hung up."""

    async def listen() -> tuple[bytes, bool]:
        link, wire = link_of(side), Wire()
        link.connection_made(wire)
        feed(link, said, cuts)
        for _ in range(5):
            await asyncio.sleep(0)
        answer = wire.written, wire.closed
        link.connection_lost(None)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return answer

    return runner.run(listen()) if runner else asyncio.run(listen())
