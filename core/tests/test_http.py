"""Go Micro's HTTP wire and plain HTTP, byte by byte.

``vectors/*.http`` are messages captured from unmodified Go Micro processes (v4.11.0; v2.9.1, v3.7.1
and v5.0.0 where the name says so). ``raw-*`` requests were written by hand, their answers are Go's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from google.protobuf import descriptor_pb2, message_factory

import micro
from micro.backends.http import HTTPTransport
from micro.call import Call
from micro.plugins import Plugins
from micro.server import Server
from micro.testing import eventually
from micro.transport import Channel, Limits, Listener
from micro.url import URL

VECTORS = Path(__file__).parent / "vectors"


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


@dataclass
class Message:
    """One HTTP message, parsed far enough to compare."""

    status: int
    headers: dict[str, str]
    body: bytes


@pytest_asyncio.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    transport = HTTPTransport(URL.parse("http"))
    await transport.connect(Plugins().connections())
    yield transport
    await transport.aclose()


@pytest_asyncio.fixture
async def listener(transport: HTTPTransport) -> AsyncIterator[Listener]:
    async with listening(transport, Limits()) as listener:
        yield listener


@asynccontextmanager
async def listening(transport: HTTPTransport, limits: Limits) -> AsyncIterator[Listener]:
    server = Server("helloworld")
    server.handle(Helloworld())
    server.ready = True
    listener = await transport.listen("127.0.0.1:0", server.handler(()), limits)
    yield listener
    await listener.aclose()


Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Opened]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_message(reader: asyncio.StreamReader) -> Message:
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Message(int(first.split()[1]), headers, body)


async def exchange(address: str, request: bytes) -> Message:
    async with connected(address) as (reader, writer):
        writer.write(request)
        return await read_message(reader)


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


# -- a Go client calls us ----------------------------------------------------------------------

UNARY_JSON = [
    "unary-json",
    "unary-json-empty-struct",
    "unary-metadata",
    "unary-conn-close",
    "v2-unary-json",
    "v3-unary-json",
    "v5-unary-json",
    "raw-minimal-json",
]
UNARY_PROTOBUF = [
    "unary-proto",
    "unary-proto-empty",
    "unary-proto-empty-request",
    "unary-second",
    "v2-unary-second",
    "v3-unary-second",
    "v5-unary-second",
    "raw-minimal-proto",
]
#: Go's server repeats the headers of the first request on a connection, here those of another one.
SECOND = ("unary-second", "v2-unary-second", "v3-unary-second", "v5-unary-second")
#: What a Go client reads of a reply; the rest of what Go's server sends is an echo of the request.
NEEDED = (
    "content-type",
    "micro-endpoint",
    "micro-id",
    "micro-method",
    "micro-service",
    "connection",
)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", UNARY_JSON)
async def test_captured_json_call_gets_what_go_answers(listener: Listener, name: str) -> None:
    got = await exchange(listener.address, vector(f"{name}.req.http"))
    go = parsed(vector(f"{name}.rsp.http"))
    assert got.status == go.status == 200
    assert json.loads(got.body) == json.loads(go.body)
    for header in NEEDED:
        assert got.headers.get(header) == go.headers.get(header), header
    assert "micro-error" not in got.headers


@pytest.mark.asyncio
@pytest.mark.parametrize("name", UNARY_PROTOBUF)
async def test_captured_protobuf_call_gets_what_go_answers(listener: Listener, name: str) -> None:
    got = await exchange(listener.address, vector(f"{name}.req.http"))
    go = parsed(vector(f"{name}.rsp.http"))
    assert (got.status, got.body) == (go.status, go.body)
    expected = parsed(vector(f"{name}.req.http")) if name in SECOND else go
    for header in NEEDED:
        assert got.headers.get(header) == expected.headers.get(header), header
    assert "micro-error" not in got.headers


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("unary-error", 400),
        ("unary-no-method", 404),
        ("unary-no-service", 404),
        ("raw-bad-json", 400),
    ],
)
async def test_captured_error_call_gets_go_form_of_error(
    listener: Listener, name: str, code: int
) -> None:
    got = await exchange(listener.address, vector(f"{name}.req.http"))
    go = parsed(vector(f"{name}.rsp.http"))
    assert (got.status, got.body) == (go.status, go.body) == (200, b"")
    assert got.headers["x-micro-error"] == got.headers["micro-error"]
    error = json.loads(got.headers["micro-error"])
    assert error["code"] == code
    if go.headers["micro-error"].startswith("{"):
        told = json.loads(go.headers["micro-error"])
        assert {key: error[key] for key in told} == told


@pytest.mark.asyncio
async def test_plain_error_of_a_handler_keeps_its_text(listener: Listener) -> None:
    got = await exchange(listener.address, vector("unary-error-plain.req.http"))
    go = parsed(vector("unary-error-plain.rsp.http"))
    assert json.loads(got.headers["micro-error"])["detail"] == go.headers["micro-error"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("raw-bad-content-type", "application/xml"),
        ("raw-grpc-json-frame", "application/grpc+json"),
    ],
)
async def test_other_content_types_are_refused_in_go_form(
    listener: Listener, name: str, text: str
) -> None:
    got = await exchange(listener.address, vector(f"{name}.req.http"))
    assert got.status == 200
    error = json.loads(got.headers["micro-error"])
    assert error["code"] == 415
    assert text in error["detail"]


@pytest.mark.asyncio
async def test_protobuf_is_refused_by_an_endpoint_without_protobuf(listener: Listener) -> None:
    asked = vector("unary-proto.req.http").replace(b"Helloworld.Proto", b"Helloworld.Call")
    got = await exchange(listener.address, asked)
    assert (got.status, got.body) == (200, b"")
    error = json.loads(got.headers["micro-error"])
    assert error["code"] == 415
    assert "send JSON" in error["detail"]
    plain = await exchange(listener.address, request(Content_Type="application/x-protobuf"))
    assert plain.status == 415


@pytest.mark.asyncio
@pytest.mark.parametrize("content_type", ["application/json", "application/protobuf"])
async def test_endpoint_of_protobuf_answers_in_the_content_type_of_the_request(
    listener: Listener, content_type: str
) -> None:
    body = b'{"name":"Bob"}' if content_type == "application/json" else b"\x0a\x03Bob"
    asked = request("/Helloworld/Proto", body, Content_Type=content_type)
    got = await exchange(listener.address, asked)
    assert (got.status, got.headers["content-type"]) == (200, content_type)
    answers = {
        "application/json": b'{"msg":"Hello Bob"}\n',
        "application/protobuf": b"\x0a\x09Hello Bob",
    }
    assert got.body == answers[content_type]


@pytest.mark.asyncio
async def test_message_pack_is_answered_in_message_pack(listener: Listener) -> None:
    body = b"\x81\xa4name\xa3Bob"
    asked = request("/Helloworld/Call", body, Content_Type="application/x-msgpack; v=5")
    got = await exchange(listener.address, asked)
    assert got.body == b"\x81\xa7message\xa9Hello Bob"
    assert got.headers["content-type"] == "application/x-msgpack; v=5"


@pytest.mark.asyncio
@pytest.mark.parametrize("content_type", ["application/msgpack", "application/protobuf"])
async def test_body_that_is_no_message_of_its_content_type_is_400(
    listener: Listener, content_type: str
) -> None:
    asked = request("/Helloworld/Proto", b"\xff\xff", Content_Type=content_type)
    got = await exchange(listener.address, asked)
    assert got.status == 400
    assert json.loads(got.body)["kind"] == "DecodeError"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "name",
    [
        "raw-legacy-jsonrpc",
        "raw-legacy-jsonrpc-error",
        "raw-legacy-protorpc",
        "raw-legacy-protorpc-error",
    ],
)
async def test_legacy_forms_are_told_what_to_send(listener: Listener, name: str) -> None:
    got = await exchange(listener.address, vector(f"{name}.req.http"))
    assert got.status == 404
    assert "Micro-Endpoint" in json.loads(got.body)["detail"]


@pytest.mark.asyncio
async def test_every_captured_request_leaves_the_server_serving(listener: Listener) -> None:
    for path in sorted(VECTORS.glob("*.req.http")):
        await exchange(listener.address, path.read_bytes())
    got = await exchange(listener.address, vector("unary-json.req.http"))
    assert json.loads(got.body) == {"message": "Hello Alice"}


@pytest.mark.asyncio
async def test_calls_follow_each_other_on_one_connection(listener: Listener) -> None:
    async with connected(listener.address) as (reader, writer):
        for name in ("unary-json", "unary-error", "unary-json-empty-struct", "v5-unary-json"):
            writer.write(vector(f"{name}.req.http"))
            got = await read_message(reader)
            asked = parsed(vector(f"{name}.req.http"))
            assert got.headers["micro-endpoint"] == asked.headers["micro-endpoint"]


@pytest.mark.asyncio
async def test_pipelined_calls_are_all_answered_in_order(listener: Listener) -> None:
    async with connected(listener.address) as (reader, writer):
        for number in range(20):
            writer.write(request("/Helloworld/Call", b'{"name":"%d"}' % number))
        for number in range(20):
            assert json.loads((await read_message(reader)).body) == {"message": f"Hello {number}"}


@pytest.mark.asyncio
async def test_request_in_single_bytes_is_answered(listener: Listener) -> None:
    async with connected(listener.address) as (reader, writer):
        for byte in vector("unary-json.req.http"):
            writer.write(bytes([byte]))
            await writer.drain()
        assert json.loads((await read_message(reader)).body) == {"message": "Hello Alice"}


@pytest.mark.asyncio
async def test_chunked_request_is_answered(listener: Listener) -> None:
    body = b'8\r\n{"name":\r\n8\r\n"Alice"}\r\n0\r\n\r\n'
    got = await exchange(
        listener.address, request("/Helloworld/Call", body, Transfer_Encoding="chunked")
    )
    assert json.loads(got.body) == {"message": "Hello Alice"}


@pytest.mark.asyncio
async def test_timeout_header_is_nanoseconds(listener: Listener) -> None:
    asked = request(
        "/", b'{"seconds":30}', Content_Type="application/json", Micro_Endpoint="Helloworld.Sleep",
        Timeout="100000000",
    )  # fmt: skip
    got = await exchange(listener.address, asked)
    assert json.loads(got.headers["micro-error"])["code"] == 408


@pytest.mark.asyncio
async def test_wrong_timeout_header_is_refused(listener: Listener) -> None:
    for timeout in ("5s", "-1", "1e9", "٣", "9" * 30):
        asked = request(
            "/", Content_Type="application/json", Micro_Endpoint="Helloworld.Call", Timeout=timeout
        )
        got = await exchange(listener.address, asked)
        assert json.loads(got.headers["micro-error"])["code"] == 400


@pytest.mark.asyncio
async def test_streams_and_topics_of_go_are_refused_clearly(listener: Listener) -> None:
    for header, word in (("Micro_Stream", "streams"), ("Micro_Topic", "topic")):
        asked = request(
            "/", Content_Type="application/json", Micro_Endpoint="Helloworld.Call", **{header: "1"}
        )
        error = json.loads((await exchange(listener.address, asked)).headers["micro-error"])
        assert error["code"] == 501
        assert word in error["detail"]


# -- we call a Go server -----------------------------------------------------------------------


class GoServer:
    """A raw socket that answers each request with given bytes and keeps what it was sent."""

    def __init__(self, *answers: bytes, close: bool = False, slices: int = 0) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._answers = list(answers)
        self._close = close
        self._slices = slices

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self._answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(parsed(head).headers["content-length"])
                self.requests.append(head + await reader.readexactly(length))
                await self._answer(writer, self._answers.pop(0))
                if self._close:
                    break
            else:
                await reader.read()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client closed, which is its right
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        for start in range(0, len(answer), self._slices or len(answer) or 1):
            writer.write(answer[start : start + (self._slices or len(answer))])
            await writer.drain()


@pytest_asyncio.fixture
async def dial(transport: HTTPTransport) -> AsyncIterator[Callable[[GoServer], Awaitable[Channel]]]:
    servers: list[asyncio.Server] = []
    channels: list[Channel] = []

    async def dial(peer: GoServer) -> Channel:
        servers.append(await asyncio.start_server(peer, "127.0.0.1", 0))
        port = servers[-1].sockets[0].getsockname()[1]
        channels.append(await transport.dial(f"127.0.0.1:{port}", timeout=5))
        return channels[-1]

    yield dial
    for channel in channels:
        await channel.aclose()
    for server in servers:
        server.close()


def call(endpoint: str = "Helloworld.Call", **fields: Any) -> Call:
    import time

    return Call(
        service="helloworld", endpoint=endpoint, id="0", deadline=time.monotonic() + 5.0, **fields
    )


@pytest.mark.asyncio
@pytest.mark.parametrize("name", UNARY_JSON)
async def test_captured_reply_is_understood(dial: Any, name: str) -> None:
    channel = await dial(GoServer(vector(f"{name}.rsp.http")))
    reply = await channel.call(call(), b"{}")
    assert json.loads(reply.body) == json.loads(parsed(vector(f"{name}.rsp.http")).body)
    assert not any(name.startswith(("micro-", "x-micro-")) for name in reply.metadata)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("unary-error", micro.InvalidArgument, "name Bob is not allowed"),
        ("unary-error-plain", micro.Unknown, "plain failure of Bob"),
        ("unary-no-method", micro.EndpointNotFound, "rpc: can't find method Nope"),
        ("unary-no-service", micro.EndpointNotFound, "rpc: can't find service Other"),
        ("raw-bad-json", micro.Unknown, "unexpected EOF"),
        ("raw-bad-content-type", micro.UnsupportedContentType, "application/xml"),
    ],
)
async def test_captured_error_is_raised_as_ours(
    dial: Any, name: str, kind: type[micro.MicroError], text: str
) -> None:
    channel = await dial(GoServer(vector(f"{name}.rsp.http")))
    with pytest.raises(kind, match=text.replace("(", "\\(")) as caught:
        await channel.call(call(), b"{}")
    assert type(caught.value) is kind
    assert caught.value.remote


@pytest.mark.asyncio
@pytest.mark.parametrize("slices", [1, 7])
async def test_reply_in_fragments_is_understood(dial: Any, slices: int) -> None:
    channel = await dial(GoServer(vector("unary-json.rsp.http"), slices=slices))
    assert (await channel.call(call(), b"{}")).body == b'{"message":"Hello Alice"}\n'


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
    ids=["length", "chunked", "until close", "1.0", "after 100"],
)
async def test_every_framing_of_a_reply_is_understood(dial: Any, head: bytes) -> None:
    channel = await dial(GoServer(head, close=True))
    assert (await channel.call(call(), b"{}")).body == b"{}"


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["unary-json", "v2-unary-json", "v5-unary-json", "unary-metadata"])
async def test_our_request_has_what_a_go_server_reads(dial: Any, name: str) -> None:
    go = parsed(vector(f"{name}.req.http"))
    server = GoServer(vector(f"{name}.rsp.http"))
    channel = await dial(server)
    metadata = {key: go.headers[key] for key in ("authorization", "tenant-id") if key in go.headers}
    await channel.call(call(metadata=metadata), b'{"name":"Alice"}\n')
    (sent,) = server.requests
    assert sent.startswith(b"POST / HTTP/1.1\r\n")
    ours = parsed(sent)
    assert json.loads(ours.body) == json.loads(go.body)
    assert 4_000_000_000 < int(ours.headers.pop("timeout")) <= int(go.headers.pop("timeout"))
    for header in ("host", "user-agent"):
        go.headers.pop(header)
    assert {key: ours.headers[key] for key in go.headers} == go.headers


@pytest.mark.asyncio
async def test_reply_of_another_call_is_never_taken(dial: Any) -> None:
    """A server that answers twice, or late, must not answer the next call with it."""
    twice = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nA"
    server = GoServer(twice + twice, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nB")
    channel = await dial(server)
    assert (await channel.call(call(), b"{}")).body == b"A"
    assert (await channel.call(call(), b"{}")).body == b"B"
    assert server.connections == 2


@pytest.mark.asyncio
async def test_connection_of_a_cancelled_call_is_not_used_again(
    transport: HTTPTransport, listener: Listener
) -> None:
    channel = await transport.dial(listener.address, timeout=5)
    slow = asyncio.create_task(channel.call(call("Helloworld.Sleep"), b'{"seconds":0.2}'))
    await eventually(lambda: channel._busy)  # type: ignore[attr-defined]
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    reply = await channel.call(call(), b'{"name":"Bob"}')
    assert json.loads(reply.body) == {"message": "Hello Bob"}
    await channel.aclose()


@pytest.mark.asyncio
async def test_idle_connection_is_used_again(dial: Any) -> None:
    server = GoServer(*[vector("unary-json.rsp.http")] * 3)
    channel = await dial(server)
    for _ in range(3):
        await channel.call(call(), b"{}")
    assert server.connections == 1


@pytest.mark.asyncio
async def test_connection_that_the_server_closed_is_not_used_again(dial: Any) -> None:
    server = GoServer(*[vector("unary-json.rsp.http")] * 3, close=True)
    channel = await dial(server)
    for number in range(3):
        await eventually(lambda: not any(one.reusable for one in channel._idle))
        await channel.call(call(), b"{}")
        assert server.connections == number + 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02",
        b"HTTP/1.1 200 OK\r\nContent-Length: nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x10\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nab",
    ],
    ids=["bytes", "length", "two lengths", "chunk", "large head", "cut"],
)
async def test_garbage_reply_is_a_typed_error(dial: Any, garbage: bytes) -> None:
    channel = await dial(GoServer(garbage, close=True))
    with pytest.raises((micro.Internal, micro.Unavailable, micro.TooLarge)):
        await channel.call(call(), b"{}")


# -- plain HTTP --------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "content_type", [None, "application/x-www-form-urlencoded", "application/json; charset=utf-8"]
)
async def test_curl_gets_json(listener: Listener, content_type: str | None) -> None:
    headers = {"Content_Type": content_type} if content_type else {}
    got = await exchange(listener.address, request(**headers))
    assert (got.status, got.body) == (200, b'{"message":"Hello Alice"}\n')
    assert got.headers["content-type"].startswith("application/json")


@pytest.mark.asyncio
@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded"])
async def test_web_page_cannot_call_without_asking(
    listener: Listener, content_type: str | None
) -> None:
    """Browsers send these without a CORS preflight; Origin says that a page is behind it."""
    headers = {"Content_Type": content_type} if content_type else {}
    got = await exchange(listener.address, request(Origin="https://evil.example", **headers))
    assert got.status == 415


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("asked", "status", "text"),
    [
        (request(Content_Type="text/plain"), 415, "text/plain"),
        (request(Content_Type="application/x-python-pickle"), 415, "application/json"),
        (request("/Helloworld/Cal"), 404, "Helloworld.Call"),
        (request("/"), 404, "POST /Handler/Method"),
        (request("/../admin"), 404, "POST /Handler/Method"),
        (request("/Helloworld/Call", b'{"name":'), 400, "truncated"),
        (
            request("/Helloworld/Call", b'{"name":5}'),
            400,
            "Expected `str`, got `int` - at `$.name`",
        ),
        (request("/Helloworld/Call", b""), 400, "name"),
        (b"GET /Helloworld/Call HTTP/1.1\r\nHost: x\r\n\r\n", 405, "POST"),
        (b"NONSENSE\r\n\r\n", 400, "not an HTTP request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, ""),
        (request(Transfer_Encoding="chunked", Content_Length="3"), 400, ""),
        (request(Content_Length="16"), 400, ""),
        (request(**{f"X{number}": "y" for number in range(120)}), 431, "fields"),
        (request(X="y" * 33_000), 431, "32768 bytes"),
        (request("/Helloworld/Call", b"x" * (4 * 1024 * 1024 + 1)), 413, "4194304 bytes"),
    ],
    ids=lambda value: value[:24].decode("ascii", "replace") if isinstance(value, bytes) else None,
)
async def test_bad_request_gets_its_status_and_a_text(
    listener: Listener, asked: bytes, status: int, text: str
) -> None:
    got = await exchange(listener.address, asked)
    assert got.status == status
    error = json.loads(got.body)
    assert text in error["detail"]
    good = await exchange(listener.address, request())
    assert good.status == 200


@pytest.mark.asyncio
async def test_raw_bytes_travel_as_they_are(listener: Listener) -> None:
    asked = request("/Helloworld/Raw", b"\x00\xff\x01", Content_Type="application/octet-stream")
    assert (await exchange(listener.address, asked)).body == b"\x01\xff\x00"


@pytest.mark.asyncio
async def test_expect_100_is_answered_before_the_body(listener: Listener) -> None:
    async with connected(listener.address) as (reader, writer):
        head, _, body = request(Expect="100-continue").partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await read_message(reader)).status == 200


@pytest.mark.asyncio
async def test_livez_and_readyz_answer(listener: Listener) -> None:
    for path in ("/livez", "/readyz"):
        got = await exchange(listener.address, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (got.status, json.loads(got.body)) == (200, {"status": "ok"})


@pytest.mark.asyncio
async def test_reply_never_repeats_credentials(listener: Listener) -> None:
    async with connected(listener.address) as (reader, writer):
        writer.write(request(Authorization="Bearer canary", Cookie="canary"))
        await read_message(reader)
        writer.write(request())
        got = await read_message(reader)
    assert "canary" not in str(got)


@pytest.mark.asyncio
async def test_slow_head_and_slow_body_are_cut(transport: HTTPTransport) -> None:
    limits = Limits(head_timeout=0.2, body_timeout=0.2)
    for part in (b"POST /Helloworld/Call HTTP/1.1\r\nHo", request()[:-3]):
        async with listening(transport, limits) as listener, connected(listener.address) as (r, w):
            w.write(part)
            assert (await read_message(r)).status == 408


@pytest.mark.asyncio
async def test_silent_connection_is_closed(transport: HTTPTransport) -> None:
    async with listening(transport, Limits(head_timeout=0.2)) as listener:
        async with connected(listener.address) as (reader, _), asyncio.timeout(5):
            assert await reader.read() == b""


@pytest.mark.asyncio
async def test_connections_over_the_limit_are_refused_and_others_served(
    transport: HTTPTransport,
) -> None:
    async with listening(transport, Limits(connections=2)) as listener:
        async with connected(listener.address) as first, connected(listener.address) as second:
            for reader, writer in (first, second):
                writer.write(request())
                assert (await read_message(reader)).status == 200
            async with connected(listener.address) as (reader, _), asyncio.timeout(5):
                with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                    await reader.readexactly(1)
            first[1].write(request())
            assert (await read_message(first[0])).status == 200


@pytest.mark.asyncio
async def test_address_errors_say_what_to_do(transport: HTTPTransport, listener: Listener) -> None:
    handler = Server("x").handler(())
    for address, text in (
        (listener.address, "in use"),
        ("192.0.2.77:1", "no such address"),
        ("nonsense", "write host:port"),
        ("127.0.0.1:70000", "write host:port"),
    ):
        with pytest.raises((micro.ConfigError, micro.InvalidArgument), match=text):
            await transport.listen(address, handler, Limits())


@pytest.mark.asyncio
async def test_url_with_a_host_says_where_to_put_it() -> None:
    transport = HTTPTransport(URL.parse("http://127.0.0.1:8080", source="--transport"))
    with pytest.raises(micro.ConfigError, match=r"--transport.*--server_address"):
        await transport.connect(Plugins().connections())
