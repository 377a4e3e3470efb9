"""The other side of an HTTP connection by hand: it writes bytes, and reads messages.

``vectors/*.http`` are messages captured from unmodified Go Micro processes (v4.11.0; v2.9.1, v3.7.1
and v5.0.0 where the name says so). ``raw-*`` requests were written by hand, their answers are Go's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf import descriptor_pb2, message_factory

import micro
from micro.backends.http import HTTPTransport
from micro.call import Handler
from micro.plugins import Plugins
from micro.server import Server
from micro.transport import Channel, Limits, Listener
from micro.url import URL

VECTORS = Path(__file__).parent / "vectors"
#: Seconds that a test waits for what has to come.
SOON = 10.0

Opened: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


@dataclass
class Void:
    pass


if TYPE_CHECKING:
    from google.protobuf.message import Message as Protobuf

    class ProtoRequest(Protobuf):
        name: str

    class ProtoResponse(Protobuf):
        def __init__(self, *, msg: str = "") -> None: ...

else:
    _protos = message_factory.GetMessages(
        [
            descriptor_pb2.FileDescriptorProto(
                name="micro/tests/http.proto",
                syntax="proto3",
                message_type=[
                    {"name": name, "field": [{"name": field, "number": 1, "type": 9, "label": 1}]}
                    for name, field in (("ProtoRequest", "name"), ("ProtoResponse", "msg"))
                ],
            )
        ]
    )
    ProtoRequest, ProtoResponse = _protos["ProtoRequest"], _protos["ProtoResponse"]


class Helloworld:
    """The handler that the captured Go server had."""

    async def call(self, request: Request) -> Response:
        return Response(message=f"Hello {request.name}")

    async def greet(self, name: str = "nobody") -> Response:
        return Response(message=f"Hello {name}")

    async def void(self, request: Request) -> Void:
        return Void()

    async def fail(self, request: Request) -> Response:
        raise micro.InvalidArgument(f"name {request.name} is not allowed")

    async def plain(self, request: Request) -> Response:
        raise micro.Unknown(f"plain failure of {request.name}")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def raw(self, data: bytes) -> bytes:
        return data[::-1]

    async def proto(self, request: ProtoRequest) -> ProtoResponse:
        return ProtoResponse(msg=f"Hello {request.name}")

    async def nothing(self, request: ProtoRequest) -> ProtoResponse:
        return ProtoResponse()

    async def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        async for request in said:
            if request.name == "end":
                return
            if request.name == "fail":
                raise micro.Aborted("stream failed")
            yield Response(message=f"Hello {request.name}")

    async def count(self, request: Request) -> AsyncIterator[Response]:
        for number in (1, 2, 3):
            yield Response(message=f"{request.name} {number}")

    async def join(self, said: AsyncIterator[Request]) -> Response:
        return Response(message=" ".join([request.name async for request in said]))


@dataclass
class Message:
    """One HTTP message, parsed far enough to compare."""

    status: int
    headers: dict[str, str]
    body: bytes


@asynccontextmanager
async def connected_transport() -> AsyncIterator[HTTPTransport]:
    transport = HTTPTransport(URL.parse("http"))
    await transport.connect(Plugins().connections())
    try:
        yield transport
    finally:
        await transport.aclose()


@asynccontextmanager
async def listening(
    transport: HTTPTransport,
    limits: Limits | None = None,
    *,
    handler: Handler | None = None,
    at: str = "127.0.0.1:0",
) -> AsyncIterator[Listener]:
    """A port with ``handler``, or with Helloworld."""
    server = Server("helloworld")
    server.handle(Helloworld())
    server.ready = True
    answer = handler or server.handler(())
    listener = await transport.listen(at, answer, limits or Limits())
    try:
        yield listener
    finally:
        await listener.aclose()
        server.close()


@asynccontextmanager
async def dialled(
    transport: HTTPTransport, address: str, limits: Limits | None = None
) -> AsyncIterator[Channel]:
    channel = await transport.dial(address, limits or Limits(), timeout=5)
    try:
        yield channel
    finally:
        await channel.aclose()


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Opened]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_message(reader: asyncio.StreamReader) -> Message:
    async with asyncio.timeout(SOON):
        message = parsed(await reader.readuntil(b"\r\n\r\n"))
        length = int(message.headers.get("content-length", "0"))
        message.body = await reader.readexactly(length)
    return message


async def exchange(address: str, request: bytes) -> Message:
    """What the server answers to ``request``."""
    async with connected(address) as (reader, writer):
        writer.write(request)
        return await read_message(reader)


async def closed(reader: asyncio.StreamReader) -> None:
    """Wait for the end of a connection, on which nothing more may come."""
    async with asyncio.timeout(SOON):
        with suppress(ConnectionError):
            assert await reader.read() == b""


def links(channel: Channel) -> set[Any]:
    """The connections of a channel."""
    found: set[Any] = getattr(channel, "_links")  # noqa: B009 - it belongs to HTTPChannel
    return found


def sessions(listener: Listener) -> set[Any]:
    """The connections of a port."""
    found: set[Any] = getattr(listener, "_sessions")  # noqa: B009 - it belongs to the one port
    return found


def vector(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


def parsed(message: bytes) -> Message:
    head, _, body = message.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    status = int(first.split()[1]) if first.startswith("HTTP") else 0
    return Message(status, headers, body)


def request(
    path: str = "/Helloworld/Call", body: bytes = b'{"name":"Alice"}', /, **headers: str
) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    length = "" if "Transfer_Encoding" in headers else f"Content-Length: {len(body)}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{length}{lines}\r\n".encode() + body


def go_request(
    endpoint: str = "Helloworld.Call", body: bytes = b'{"name":"Alice"}', /, **headers: str
) -> bytes:
    """As ``request``; one of Go Micro's."""
    given = {"Content_Type": "application/json", "Micro_Endpoint": endpoint, **headers}
    return request("/", body, **given)
