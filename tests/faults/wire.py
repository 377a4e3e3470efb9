"""What goes over the wire, written by hand: frames of the native protocol, requests of HTTP."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import cast

import msgspec

#: docs/native.md: length of head and body, kind, flags, length of the head, stream, aux.
HEADER = struct.Struct(">IBBHII")
HELLO, REQUEST, REPLY, ERROR, DATA, CREDIT, PING, GOAWAY = 1, 2, 3, 4, 6, 9, 10, 12
#: Flags: the body is JSON, and there is more of it in frames of DATA.
JSON, MORE = 1, 32
FRAGMENT = 64 * 1024
SETTINGS = {"message": 4 << 20, "headers": 32768, "calls": 1024, "streams": 100, "window": 262144}


def frame(
    kind: int, stream: int, body: bytes = b"", *, head: bytes = b"", flags: int = 0, aux: int = -1
) -> bytes:
    """One frame; its aux is the number of the stream again, unless it is given."""
    aux = stream if aux < 0 else aux
    return HEADER.pack(len(head) + len(body), kind, flags, len(head), stream, aux) + head + body


def greeting() -> bytes:
    """What a native client says first."""
    return b"MICRO1\r\n" + frame(HELLO, 0, msgspec.msgpack.encode(SETTINGS))


def native_call(endpoint: str, body: bytes, stream: int = 1) -> bytes:
    """A call, in pieces if it is large."""
    name = f"faults/{endpoint}".encode()
    pieces = [body[start : start + FRAGMENT] for start in range(0, len(body), FRAGMENT)] or [b""]
    flags = JSON | (MORE if len(pieces) > 1 else 0)
    first = frame(REQUEST, stream, pieces[0], head=bytes([len(name)]) + name, flags=flags, aux=5000)
    rest = [frame(DATA, stream, piece, flags=MORE) for piece in pieces[1:-1]]
    return first + b"".join(rest) + (frame(DATA, stream, pieces[-1]) if len(pieces) > 1 else b"")


def http_call(endpoint: str, body: bytes, *headers: str, go: bool = False) -> bytes:
    """A call, as Go Micro writes it or as everybody does; a header may stand for the length."""
    path = "/" if go else f"/{endpoint.replace('.', '/')}"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if go:
        lines += ["Micro-Service: faults", f"Micro-Endpoint: {endpoint}"]
    if not headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def said(text: str) -> bytes:
    """A request for ``Work.Echo``."""
    return json.dumps({"text": text, "number": 0}).encode()


class Raw:
    """A connection on which anything can be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard = b""
        self.writer = writer
        self._reader = reader

    async def say(self, data: bytes) -> None:
        """Send it, all of it unless nobody takes it any more."""
        with suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def drip(self, data: bytes, every: float) -> None:
        """Send it byte by byte."""
        for byte in data:
            await asyncio.sleep(every)
            await self.say(bytes([byte]))

    async def status(self, within: float = 2.0) -> int:
        """The status of one HTTP response; 0 if the server closes without."""
        await self._hear(lambda: b"\r\n\r\n" in self.heard, within)
        return int(self.heard.split()[1]) if self.heard else 0

    async def frames(self, count: int, within: float = 2.0) -> list[tuple[int, int, int, bytes]]:
        """Kind, stream, aux and body of so many frames, or of all before the server closes."""
        await self._hear(lambda: len(list(self._frames())) >= count, within)
        return list(self._frames())

    async def closed(self, within: float = 2.0) -> bytes:
        """All that is heard until the server closes, or resets as more was said meanwhile."""
        await self._hear(lambda: False, within)
        return self.heard

    async def _hear(self, enough: Callable[[], bool], within: float) -> None:
        with suppress(ConnectionError):
            async with asyncio.timeout(within):
                while not enough():
                    data = await self._reader.read(65536)
                    if not data:
                        return
                    self.heard += data

    def _frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        start = 0
        while len(self.heard) - start >= HEADER.size:
            length, kind, _, head, stream, aux = HEADER.unpack_from(self.heard, start)
            start += HEADER.size
            yield kind, stream, aux, self.heard[start + head : start + length]
            start += length


@asynccontextmanager
async def connected(address: str, said: bytes = b"", *, unread: bool = False) -> AsyncIterator[Raw]:
    """A connection on which something has been said already; ``unread``: nothing is read of it."""
    host, _, port = address.rpartition(":")
    raw = Raw(*await asyncio.open_connection(host, int(port)))
    if unread:
        cast("asyncio.Transport", raw.writer.transport).pause_reading()
    try:
        await raw.say(said)
        yield raw
    finally:
        raw.writer.transport.abort()
