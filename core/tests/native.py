"""The other side of a native connection by hand: it writes bytes, and reads frames.

It stands on docs/native.md alone and shares no code with the transport, so that a mistake of one is
none of the other.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from micro.backends.tcp import TCPTransport
from micro.call import Body, Call, Handler, Reply
from micro.errors import NotFound
from micro.plugins import Plugins
from micro.transport import Channel, Limits, Listener
from micro.url import URL

HEADER = struct.Struct(">IBBHII")
PREFACE = b"MICRO1\r\n"
HELLO, REQUEST, REPLY, ERROR, OPEN, DATA, END, CANCEL, CREDIT, PING, PONG, GOAWAY = range(1, 13)
JSON, RAW, METADATA, MORE = 1, 4, 16, 32
PIECE = 65_536
KIB, MIB = 1024, 1024 * 1024
WINDOW = 256 * KIB
#: Seconds in which what is to come has come, on a busy machine too.
SOON = 5.0
VECTORS = json.loads((Path(__file__).parent / "vectors" / "native.json").read_text())


class Frame(NamedTuple):
    kind: int
    flags: int = 0
    stream: int = 0
    aux: int = 0
    head: bytes = b""
    body: bytes = b""

    def encode(self) -> bytes:
        length = len(self.head) + len(self.body)
        numbers = (length, self.kind, self.flags, len(self.head), self.stream, self.aux)
        return HEADER.pack(*numbers) + self.head + self.body

    @property
    def text(self) -> str:
        """The text of an error."""
        return str(json.loads(self.body)["detail"])

    @property
    def error(self) -> str:
        """The class of an error."""
        return str(json.loads(self.body)["kind"])


def frames_in(data: bytes) -> list[Frame]:
    """The frames that ``data`` is."""
    found = []
    while data:
        length, kind, flags, head, stream, aux = HEADER.unpack_from(data)
        assert len(data) >= 16 + length, "half a frame"
        rest = data[16 : 16 + length]
        found.append(Frame(kind, flags, stream, aux, rest[:head], rest[head:]))
        data = data[16 + length :]
    return found


def hello(**settings: int) -> Frame:
    said = {"message": 4 * MIB, "headers": 32 * KIB, "calls": 1024, "streams": 100}
    return Frame(HELLO, body=msgspec.msgpack.encode(said | {"window": WINDOW} | settings))


def named(endpoint: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """The head of a call."""
    name = f"suite/{endpoint}".encode()
    return bytes([len(name)]) + name + (msgspec.msgpack.encode(metadata) if metadata else b"")


def request(
    stream: int, endpoint: str = "Echo.Call", body: bytes = b"", *, more: bool = False, ms: int = 0
) -> Frame:
    flags = RAW | MORE if more else RAW
    return Frame(REQUEST, flags, stream, ms, named(endpoint), body)


def opened(stream: int, endpoint: str = "Echo.Call", *, ms: int = 0) -> Frame:
    return Frame(OPEN, RAW, stream, ms, named(endpoint))


def reply(stream: int, body: bytes = b"", *, more: bool = False) -> Frame:
    return Frame(REPLY, MORE if more else 0, stream, stream, body=body)


def data(stream: int, body: bytes = b"", *, more: bool = False) -> Frame:
    return Frame(DATA, MORE if more else 0, stream, stream, body=body)


def end(stream: int) -> Frame:
    return Frame(END, 0, stream, stream)


def cancel(stream: int) -> Frame:
    return Frame(CANCEL, 0, stream, stream)


def credit(stream: int, count: int) -> Frame:
    return Frame(CREDIT, 0, stream, count)


def pieces(first: Callable[..., Frame], stream: int, body: bytes) -> list[Frame]:
    """The frames of a large message, as they have to be."""
    cuts = [body[at : at + PIECE] for at in range(0, len(body), PIECE)]
    begin = first(stream, body=cuts[0], more=True)
    rest = [data(stream, cut, more=True) for cut in cuts[1:-1]]
    return [begin, *rest, data(stream, cuts[-1])]


class Peer:
    """One end of a connection; what it waits for has to come soon."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def write(self, *said: Frame | bytes) -> None:
        for one in said:
            self.writer.write(one.encode() if isinstance(one, Frame) else one)

    async def send(self, *said: Frame | bytes) -> None:
        """Write, and wait until the kernel has most of it."""
        self.write(*said)
        async with asyncio.timeout(SOON):
            await self.writer.drain()

    async def exactly(self, count: int) -> bytes:
        async with asyncio.timeout(SOON):
            return await self._reader.readexactly(count)

    async def read(self) -> Frame:
        length, kind, flags, head, stream, aux = HEADER.unpack(await self.exactly(16))
        rest = await self.exactly(length)
        return Frame(kind, flags, stream, aux, rest[:head], rest[head:])

    async def until(self, kind: int) -> Frame:
        """The next frame of that kind; what comes before it does not matter."""
        while True:
            frame = await self.read()
            if frame.kind == kind:
                return frame

    async def rest(self) -> list[Frame]:
        """All that still comes until the connection is closed."""
        found = []
        while True:
            try:
                found.append(await self.read())
            except (asyncio.IncompleteReadError, ConnectionError):
                return found

    async def message(self) -> tuple[Frame, bytes]:
        """A reply that may come in pieces, alone on its connection: its first frame, its body."""
        first = await self.until(REPLY)
        body, more = [first.body], first.flags & MORE
        while more:
            frame = await self.until(DATA)
            body.append(frame.body)
            more = frame.flags & MORE
        return first, b"".join(body)

    async def gone(self) -> Frame:
        """The GOAWAY that is the last thing said."""
        last = (await self.rest())[-1]
        assert last.kind == GOAWAY
        return last


class Acting:
    """A handler that does what its endpoint says; what waits, waits for ``release``."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.bodies: list[bytes] = []
        self.read: list[bytes] = []
        self.running = 0
        self.cancelled = 0
        self.sent = 0
        self.release = asyncio.Event()

    async def __call__(self, call: Call, body: Body) -> Reply:
        self.calls.append(call)
        self.running += 1
        try:
            what, _, detail = call.endpoint.partition(".")
            if isinstance(body, bytes):
                self.bodies.append(body)
                return await self._answer(what, detail, call, body)
            replies: Callable[[str, AsyncIterator[bytes]], AsyncIterator[bytes]]
            replies = getattr(self, what.lower())
            return Reply(
                body=self._stream(replies(detail, body)),
                metadata=dict(call.metadata),
                trailer={"last": "word"} if call.metadata else {},
            )
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, what: str, detail: str, call: Call, body: bytes) -> Reply:
        if what == "Fail":
            raise NotFound("there is no such thing")
        if what == "Wait":
            await self.release.wait()
        if what == "Give":
            raise asyncio.CancelledError
        if what == "Large":
            return Reply(body=b"x" * int(detail))
        return Reply(body=body, metadata=dict(call.metadata))

    async def _stream(self, replies: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        self.running += 1
        try:
            async for message in replies:
                yield message
                self.sent += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def echo(self, _: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for message in body:
            self.read.append(message)
            yield message

    async def take(self, _: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """All that comes; then how much it was."""
        self.read += [message async for message in body]
        yield b"%d" % sum(map(len, self.read))

    async def hold(self, _: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Nothing is read before the release; then as ``take``."""
        await self.release.wait()
        async for message in self.take("", body):
            yield message

    async def pour(self, detail: str, _: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        while True:
            yield bytes(int(detail))

    async def drip(self, detail: str, _: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        while True:
            yield bytes(int(detail))
            await asyncio.sleep(0.01)

    async def fail(self, _: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for message in body:
            yield message
            raise NotFound("there is no such thing")


@asynccontextmanager
async def connected_transport() -> AsyncIterator[TCPTransport]:
    transport = TCPTransport(URL.parse("tcp"))
    await transport.connect(Plugins().connections())
    try:
        yield transport
    finally:
        await transport.aclose()


@asynccontextmanager
async def listening(handler: Handler, **limits: Any) -> AsyncIterator[Listener]:
    """A native server."""
    async with connected_transport() as transport:
        listener = await transport.listen("127.0.0.1:0", handler, Limits(**limits))
        try:
            yield listener
        finally:
            await listener.aclose()


@asynccontextmanager
async def dialled(address: str, *, timeout: float = SOON, **limits: Any) -> AsyncIterator[Channel]:
    """A native client."""
    async with connected_transport() as transport:
        channel = await transport.dial(address, Limits(**limits), timeout=timeout)
        try:
            yield channel
        finally:
            await channel.aclose()


def _socket(receives: int | None) -> socket.socket:
    """One whose kernel keeps so many bytes that were not read; None: as it likes."""
    sock = socket.socket()
    sock.setblocking(False)
    if receives is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    return sock


@asynccontextmanager
async def raw(address: str, *, receives: int | None = None) -> AsyncIterator[Peer]:
    """A connection on which nothing was said."""
    host, _, port = address.rpartition(":")
    sock = _socket(receives)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=PIECE)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def greeted(
    address: str, *, receives: int | None = None, **settings: int
) -> AsyncIterator[Peer]:
    """A client on whose connection both have said HELLO."""
    async with raw(address, receives=receives) as peer:
        peer.write(PREFACE, hello(**settings))
        assert (await peer.read()).kind == HELLO
        yield peer


@asynccontextmanager
async def acting(
    script: Callable[[Peer], Awaitable[None]],
    *,
    greets: bool = True,
    receives: int | None = None,
    **settings: int,
) -> AsyncIterator[str]:
    """A server that does with each connection what the script says, and then waits; its address.

    What the script raises is raised at the end.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def serve(peer: Peer) -> None:
        try:
            if greets:
                assert await peer.exactly(8) == PREFACE
                assert (await peer.read()).kind == HELLO
                peer.write(hello(**settings))
            await script(peer)
            await asyncio.Event().wait()
        finally:
            peer.writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(Peer(reader, writer))))

    sock = _socket(receives)
    sock.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(accept, sock=sock, limit=PIECE)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
