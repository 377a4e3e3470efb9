"""What the tests of transports share: a handler that does as it is told, listeners, channels."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from ssl import SSLContext
from typing import Any, ClassVar

import pytest
import pytest_asyncio

from micro.call import Body, Call, Handler, Kind, Reply
from micro.errors import BY_NAME, ResourceExhausted, Unavailable
from micro.plugins import Plugins
from micro.port import SocketTransport
from micro.testing.lifecycle import LifecycleSuite
from micro.testing.proxy import FaultProxy
from micro.transport import Channel, Limits, Listener, Transport

MIB = 1024 * 1024
#: Seconds in which a handler learns that its caller has gone; less the slack.
CANCELLED = 0.1
#: Seconds in which a channel of ``hasty_url`` gives a silent peer up; less the slack.
HASTY = 2.0
#: Bytes that a handler pours out, or a caller, if nothing holds them back.
POURED = 64 * MIB


class Peer:
    """A handler that does what the endpoint says, ``What.Detail``, and counts.

    ``running`` is how many calls run, ``most`` how many did at once, ``cancelled`` how many were;
    ``read`` and ``sent`` count messages of streams. What waits, waits for ``release``.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.running: int = 0
        self.most: int = 0
        self.cancelled: int = 0
        self.read: int = 0
        self.sent: int = 0
        self.release: asyncio.Event = asyncio.Event()

    async def __call__(self, call: Call, body: Body) -> Reply:
        self.calls.append(call)
        what, _, detail = call.endpoint.partition(".")
        if isinstance(body, bytes):
            with self._counted():
                return await self._answer(what, detail, call, body)
        if what == "Refuse":
            raise _error(detail)
        if what == "Sum":
            with self._counted():
                return Reply(body=b"%d" % sum([int(message) async for message in body]))
        reply = Reply(body=b"", metadata=dict(call.metadata))
        reply.body = self._stream(what, detail, body, reply)
        return reply

    async def _answer(self, what: str, detail: str, call: Call, body: bytes) -> Reply:
        if what == "Fail":
            raise _error(detail)
        if what == "Lose":
            raise Unavailable("lost")
        if what == "Shed":
            raise ResourceExhausted("too much to do", sent=False, retry_after=0.5)
        if what == "Break":
            raise ValueError("a secret")
        if what == "Wait":
            await self.release.wait()
        if what == "Slow":
            await asyncio.sleep(random.random() / 200)
        if what == "Large":
            body = b"x" * int(detail.removeprefix("N"))
        if what == "Talk":
            return Reply(body=b"", metadata={"long": "v" * int(detail.removeprefix("N"))})
        return Reply(body=body, metadata=dict(call.metadata))

    async def _stream(
        self, what: str, detail: str, body: AsyncIterator[bytes], reply: Reply
    ) -> AsyncIterator[bytes]:
        act: Callable[[str, AsyncIterator[bytes]], AsyncIterator[bytes]]
        act = getattr(self, what.lower())
        with self._counted():
            async for message in act(detail, body):
                yield message
                self.sent += 1
        reply.trailer["messages"] = str(self.sent)

    async def echo(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for message in body:
            self.read += 1
            yield message

    async def count(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """As many messages as the first one says, whatever else comes."""
        for number in range(int(await anext(body))):
            yield b"%d" % number

    async def tail(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Nothing before the end of what comes, then all of it."""
        for message in [message async for message in body]:
            yield message

    async def large(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"before"
        yield b"x" * int(detail.removeprefix("N"))

    async def fail(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield b"one"
        yield b"two"
        if detail == "Break":
            raise ValueError("a secret")
        raise _error(detail)

    async def wait(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Read nothing; say that it began, and that it was released."""
        yield b"begun"
        await self.release.wait()
        yield b"released"

    async def sip(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Read one message; the others once it is released, and tell how many they were."""
        yield await anext(body)
        await self.release.wait()
        async for _ in body:
            self.read += 1
            yield b"%d" % self.read

    async def pour(self, detail: str, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        message = bytes(int(detail.removeprefix("N")))
        for _ in range(POURED // len(message)):
            yield message

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def _error(kind: str) -> Exception:
    text = f'as asked: {kind} ünï \\ "quoted" \n second line'
    return BY_NAME[kind](text, details={"kind": kind, "list": [1, None, "ü"]}, retry_after=0.5)


class TransportClients(LifecycleSuite[Transport]):
    """A connected ``transport``, a ``listener`` with a ``peer``, and a ``channel`` to it."""

    #: Bytes that one direction of a stream may hold on its way, what the kernel buffers included.
    window: ClassVar[int] = 16 * MIB
    #: Whether calls of one channel share a connection; else each has one of its own.
    multiplexed: ClassVar[bool] = True

    @pytest.fixture
    def url(self) -> str:
        return self.backend.schemes[0]

    @pytest_asyncio.fixture
    async def transport(
        self, url: str, plugins: Plugins, request: pytest.FixtureRequest
    ) -> AsyncIterator[Transport]:
        async with self.connected(url, plugins) as transport:
            declared = ("micro.features", _text(transport))
            request.node.user_properties.append(declared)
            yield transport

    @pytest.fixture
    def peer(self) -> Peer:
        return Peer()

    @pytest_asyncio.fixture
    async def listener(self, transport: Transport, peer: Peer) -> AsyncIterator[Listener]:
        async with listening(transport, peer) as listener:
            yield listener

    @pytest_asyncio.fixture
    async def channel(self, transport: Transport, listener: Listener) -> AsyncIterator[Channel]:
        async with dialled(transport, listener.address) as channel:
            yield channel

    @pytest_asyncio.fixture
    async def broken(self, listener: Listener, chance: random.Random) -> AsyncIterator[FaultProxy]:
        """Stands before the listener."""
        self.needs_sockets()
        async with FaultProxy(listener.address, seed=chance.getrandbits(32)) as proxy:
            yield proxy

    @pytest_asyncio.fixture
    async def far(self, transport: Transport, broken: FaultProxy) -> AsyncIterator[Channel]:
        """A channel to the listener through ``broken``."""
        async with dialled(transport, broken.address) as channel:
            yield channel

    @pytest.fixture
    def hasty_url(self) -> str | None:
        """As ``url``; a peer that says nothing is given up within two seconds."""
        return None

    def needs_sockets(self) -> None:
        """Skip the test where nothing can stand between the two sides."""
        if not issubclass(self.backend, SocketTransport):
            pytest.skip("no sockets")

    def calls(self, backend: Transport) -> Sequence[Callable[[], Awaitable[object]]]:
        async def dial() -> None:
            async with dialled(backend, "127.0.0.1:1"):
                pass

        async def listen() -> None:
            async with listening(backend, Peer()):
                pass

        return [dial, listen]

    async def work(self, backend: Transport) -> None:
        async with (
            listening(backend, Peer()) as listener,
            dialled(backend, listener.address) as channel,
        ):
            await echoes(channel)


async def echoes(channel: Channel) -> None:
    """Check that calls of both kinds get their own answers."""
    body = os.urandom(16)
    assert (await channel.call(new_call(), body)).body == body
    assert await heard(channel, new_call("Count.Call", kind="server"), b"2") == [b"0", b"1"]


def new_call(endpoint: str = "Echo.Call", *, kind: Kind = "unary", **fields: Any) -> Call:
    fields.setdefault("deadline", time.monotonic() + 30)
    return Call(service="suite", endpoint=endpoint, kind=kind, **fields)


def new_stream(endpoint: str, **fields: Any) -> Call:
    return new_call(endpoint, kind="bidi", **fields)


async def said(*messages: bytes) -> AsyncIterator[bytes]:
    """The body of a stream."""
    for message in messages:
        yield message


async def endless(*messages: bytes) -> AsyncIterator[bytes]:
    """A body with no end after these messages."""
    for message in messages:
        yield message
    await asyncio.Event().wait()


def messages(reply: Reply) -> AsyncIterator[bytes]:
    assert not isinstance(reply.body, bytes)
    return reply.body


async def heard(channel: Channel, call: Call, *body: bytes) -> list[bytes]:
    """All that the server says to ``body``."""
    got: list[bytes] = []
    await read(channel, call, said(*body), into=got)
    return got


async def read(
    channel: Channel, call: Call, body: AsyncIterator[bytes], *, into: list[bytes] | None = None
) -> None:
    """Read a stream to its end."""
    async with channel.stream(call, body) as reply:
        async for message in messages(reply):
            if into is not None:
                into.append(message)


@asynccontextmanager
async def listening(
    transport: Transport,
    handler: Handler,
    limits: Limits | None = None,
    at: str = "127.0.0.1:0",
    *,
    tls: SSLContext | None = None,
) -> AsyncIterator[Listener]:
    listener = await transport.listen(at, handler, limits or Limits(), tls=tls)
    try:
        yield listener
    finally:
        await listener.aclose()


@asynccontextmanager
async def dialled(
    transport: Transport,
    address: str,
    limits: Limits | None = None,
    *,
    tls: SSLContext | None = None,
    timeout: float = 5.0,
) -> AsyncIterator[Channel]:
    channel = await transport.dial(address, limits or Limits(), tls=tls, timeout=timeout)
    try:
        yield channel
    finally:
        await channel.aclose()


def _text(transport: Transport) -> str:
    """What it can do, as the table at the end of a run shows it."""
    features = transport.features
    flags = [name for name in ("multi_process", "half_close") if getattr(features, name)]
    return " ".join(flags)
