"""A naive echo on uvloop, the limit of simple designs.

A frame is its length, a number, and bytes; each is written by itself, and answered with itself.
"""

from __future__ import annotations

import asyncio
import struct
from typing import cast

from bench.load import Job, Point, load
from bench.peer import main, run

HEAD = struct.Struct("!II")
#: As many bytes as a small call of ours has in both directions, by halves.
BODY = b'{"name":"Alice of Echo"}'


class Echo(asyncio.Protocol):
    """The server; its client hears the frames instead of sending them back."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's own class derives from none of asyncio's.
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        start, end = 0, len(received)
        while end - start >= HEAD.size:
            length, number = HEAD.unpack_from(received, start)
            after = start + HEAD.size + length
            if after > end:
                break
            self.heard(number, received[start + HEAD.size : after])
            start = after
        self._received = received[start:]

    def heard(self, number: int, body: bytes) -> None:
        self.transport.write(HEAD.pack(len(body), number) + body)


class Caller(Echo):
    """The client."""

    def __init__(self) -> None:
        super().__init__()
        self._number = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._loop = asyncio.get_running_loop()

    def call(self) -> asyncio.Future[bytes]:
        self._number = number = self._number + 1
        self._waiting[number] = future = self._loop.create_future()
        self.transport.write(HEAD.pack(len(BODY), number) + BODY)
        return future

    def heard(self, number: int, body: bytes) -> None:
        self._waiting.pop(number).set_result(body)


async def listen(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", port)
    await server.serve_forever()


def serve(port: int, options: list[str]) -> None:
    run(listen(port), uvloop="uvloop" in options)


async def call(job: Job) -> Point:
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(Caller, "127.0.0.1", job.port)
    return await load(job, [caller.call], BODY.__eq__)


if __name__ == "__main__":
    main(serve, call)
