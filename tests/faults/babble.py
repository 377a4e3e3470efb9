"""A server that answers with garbage: with noise, or with what is nearly an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
from tests.faults.wire import CREDIT, DATA, HELLO, PING, REPLY, SETTINGS, frame, said

from micro.testing import eventually

_NOISE = 4096
#: Bytes of what never ends, and how many are said at once.
_MOST = 64 * 1024 * 1024
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class Script:
    """What a server says: at once, and once it is asked the first time to echo ``hello``."""

    greeting: bytes
    answer: bytes


BODY = said("hello")
SCRIPTS = {
    "tcp": Script(
        frame(HELLO, 0, msgspec.msgpack.encode(SETTINGS)),
        frame(PING, 0) + frame(REPLY, 1, BODY) + frame(CREDIT, 2, aux=1000) + frame(DATA, 2, BODY),
    ),
    "http": Script(
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nMicro-Id: 1\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY),
    ),
}


def spoil(answer: bytes, chance: Random) -> bytes:
    """A few bytes of it are wrong, lost, there twice, or something else."""
    spoilt = bytearray(answer)
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(spoilt) + 1)
        stop = min(start + chance.choice([1, 1, 2, 4, 30]), len(spoilt))
        piece = bytes(spoilt[start:stop])
        noise = chance.choice([b"\xff", b"\x00", b"\r\n", b"-1", b"9" * 30, chance.randbytes(4)])
        spoilt[start:stop] = chance.choice([b"", piece * 2, noise, piece + noise])
    return bytes(spoilt)


@asynccontextmanager
async def babbling(script: Script, chance: Random) -> AsyncIterator[str]:
    """Its address; what it says is spoilt, or noise; then it ends, is silent, or goes on.

    At the end, clients have to have closed all connections.
    """
    serving: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        after = chance.choices(["end", "silence", "more"], [2, 2, 1])[0]
        try:
            await reader.read(_NOISE)
            if script.greeting:
                writer.write(_said(script.greeting, chance, 0.3))
                await reader.read(_NOISE)
            answer = _said(script.answer, chance, 0.9)
            writer.write(answer)
            if after == "more":
                await _go_on(
                    writer, chance.choice([answer, chance.randbytes(_NOISE), bytes(_NOISE)])
                )
            elif after == "silence":
                while await reader.read(_NOISE):
                    pass
        except ConnectionError:
            pass
        finally:
            writer.close()
            serving.discard(asyncio.current_task())

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname())
        await eventually(lambda: not serving)


def _said(script: bytes, chance: Random, spoilt: float) -> bytes:
    if chance.random() > spoilt:
        return script
    return spoil(script, chance) if chance.random() < 0.8 else chance.randbytes(_NOISE)


async def _go_on(writer: asyncio.StreamWriter, noise: bytes) -> None:
    chunk = (noise or b"\0") * (_CHUNK // max(len(noise), 1))
    for _ in range(_MOST // _CHUNK):
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(0)  # what is taken at once lets nobody else run
