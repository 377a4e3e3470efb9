"""Our HTTP client against servers of raw bytes: Go Micro's answers, and worse."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeAlias

import pytest
import pytest_asyncio

import micro
from micro.backends.http import HTTPTransport
from micro.call import Call
from micro.testing import eventually
from micro.transport import Channel, Limits

from .http_peer import connected_transport, dialled, links, parsed, vector

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@pytest_asyncio.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    async with connected_transport() as transport:
        yield transport


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
        with suppress(asyncio.IncompleteReadError, ConnectionError):  # the client may close
            while self._answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(parsed(head).headers["content-length"])
                self.requests.append(head + await reader.readexactly(length))
                await self._answer(writer, self._answers.pop(0))
                if self._close:
                    break
            else:
                await reader.read()
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        for start in range(0, len(answer), self._slices or len(answer) or 1):
            writer.write(answer[start : start + (self._slices or len(answer))])
            await writer.drain()


Dial: TypeAlias = Callable[..., Awaitable[Channel]]


@pytest_asyncio.fixture
async def dial(transport: HTTPTransport) -> AsyncIterator[Dial]:
    """Dials a GoServer."""
    async with AsyncExitStack() as stack:

        async def dial(peer: GoServer, limits: Limits | None = None) -> Channel:
            server = await asyncio.start_server(peer, "127.0.0.1", 0)
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            dialling = dialled(transport, f"127.0.0.1:{port}", limits)
            return await stack.enter_async_context(dialling)

        yield dial


def call(endpoint: str = "Helloworld.Call", **fields: Any) -> Call:
    fields.setdefault("deadline", time.monotonic() + 5.0)
    return Call(service="helloworld", endpoint=endpoint, **fields)


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


@pytest.mark.asyncio
@pytest.mark.parametrize("name", UNARY_JSON)
async def test_captured_reply_is_understood(dial: Dial, name: str) -> None:
    channel = await dial(GoServer(vector(f"{name}.rsp.http")))
    reply = await channel.call(call(), b"{}")
    assert isinstance(reply.body, bytes)
    assert isinstance(reply.body, bytes)
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
    dial: Dial, name: str, kind: type[micro.MicroError], text: str
) -> None:
    channel = await dial(GoServer(vector(f"{name}.rsp.http")))
    with pytest.raises(kind, match=text.replace("(", "\\(")) as caught:
        await channel.call(call(), b"{}")
    assert type(caught.value) is kind
    assert caught.value.remote


@pytest.mark.asyncio
@pytest.mark.parametrize("slices", [1, 7])
async def test_reply_in_fragments_is_understood(dial: Dial, slices: int) -> None:
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
async def test_every_framing_of_a_reply_is_understood(dial: Dial, head: bytes) -> None:
    channel = await dial(GoServer(head, close=True))
    assert (await channel.call(call(), b"{}")).body == b"{}"


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["unary-json", "v2-unary-json", "v5-unary-json", "unary-metadata"])
async def test_our_request_has_what_a_go_server_reads(dial: Dial, name: str) -> None:
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
async def test_reply_of_another_call_is_never_taken(dial: Dial) -> None:
    """A server that answers twice, or late, must not answer the next call with it."""
    twice = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nA"
    server = GoServer(twice + twice, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nB")
    channel = await dial(server)
    assert (await channel.call(call(), b"{}")).body == b"A"
    assert (await channel.call(call(), b"{}")).body == b"B"
    assert server.connections == 2


@pytest.mark.asyncio
async def test_connection_of_a_cancelled_call_is_not_used_again(dial: Dial) -> None:
    server = GoServer(b"", OK)
    channel = await dial(server)
    slow = asyncio.create_task(channel.call(call(), b""))
    await eventually(lambda: server.requests)
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    assert (await channel.call(call(), b"")).body == b"{}"
    assert server.connections == 2


@pytest.mark.asyncio
async def test_idle_connection_is_used_again(dial: Dial) -> None:
    server = GoServer(*[vector("unary-json.rsp.http")] * 3)
    channel = await dial(server)
    for _ in range(3):
        await channel.call(call(), b"{}")
    assert server.connections == 1


@pytest.mark.asyncio
async def test_connection_that_was_idle_for_long_is_not_used_again(
    dial: Dial, transport: HTTPTransport
) -> None:
    server = GoServer(*[OK] * 4)
    channel = await dial(server)
    await asyncio.gather(channel.call(call(), b""), channel.call(call(), b""))
    assert server.connections == 2
    channel._pool_ttl = 0.05  # type: ignore[attr-defined]
    await asyncio.sleep(0.1)
    await channel.call(call(), b"")
    assert server.connections == 3
    await eventually(lambda: len(links(channel)) == 1)


@pytest.mark.asyncio
async def test_connection_that_the_server_closed_is_not_used_again(dial: Dial) -> None:
    server = GoServer(*[vector("unary-json.rsp.http")] * 3, close=True)
    channel = await dial(server)
    for number in range(3):
        await channel.call(call(), b"{}")
        assert server.connections == number + 1
        await eventually(lambda: not links(channel))


@pytest.mark.asyncio
async def test_server_that_speaks_unasked_is_not_listened_to(dial: Dial) -> None:
    server = GoServer(OK, OK)
    channel = await dial(server)
    await channel.call(call(), b"")
    (link,) = links(channel)
    link.data_received(OK)
    await eventually(lambda: not links(channel))
    assert (await channel.call(call(), b"")).body == b"{}"
    assert server.connections == 2


@pytest.mark.asyncio
async def test_calls_on_one_connection_are_kept_apart_in_a_go_server(dial: Dial) -> None:
    """It would lose one that comes before it is done with the last; see Connection.apart."""
    server = GoServer(*[vector("unary-json.rsp.http")] * 3)
    channel = await dial(server)
    for _ in range(3):
        await channel.call(call(), b"{}")
    apart = [parsed(sent).headers.get("x-micro-stream") for sent in server.requests]
    assert apart == [None, "1", "2"]


@pytest.mark.asyncio
async def test_other_servers_are_not_told_what_keeps_calls_apart(dial: Dial) -> None:
    server = GoServer(OK, OK)
    channel = await dial(server)
    for _ in range(2):
        await channel.call(call(), b"{}")
    assert not [sent for sent in server.requests if b"X-Micro-Stream" in sent]


@pytest.mark.asyncio
@pytest.mark.parametrize("field", ["service", "endpoint", "content_type"])
async def test_name_with_a_line_break_is_never_sent(dial: Dial, field: str) -> None:
    server = GoServer(OK)
    channel = await dial(server)
    asked = call()
    setattr(asked, field, "x\r\nEvil: yes")
    with pytest.raises(micro.InvalidArgument, match="control character"):
        await channel.call(asked, b"")
    assert server.connections == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("head", "limits"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4294967296\r\n\r\n", Limits()),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n", Limits(message=100)),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n65\r\n",
            Limits(message=100),
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 101, Limits(message=100)),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000, Limits(headers=1000)),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 11 + b"\r\n", Limits(fields=10)),
    ],
    ids=["4 GiB", "length", "chunk", "until close", "head", "fields"],
)
async def test_reply_over_a_limit_is_refused_before_it_is_there(
    dial: Dial, head: bytes, limits: Limits
) -> None:
    channel = await dial(GoServer(head), limits)
    with pytest.raises(micro.TooLarge):
        await channel.call(call(), b"")
    await eventually(lambda: not links(channel))


@pytest.mark.asyncio
async def test_compressed_reply_is_refused(dial: Dial) -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"
    channel = await dial(GoServer(reply))
    with pytest.raises(micro.Internal, match="gzip"):
        await channel.call(call(), b"")


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
async def test_garbage_reply_is_a_typed_error(dial: Dial, garbage: bytes) -> None:
    channel = await dial(GoServer(garbage, close=True))
    with pytest.raises((micro.Internal, micro.Unavailable, micro.TooLarge)):
        await channel.call(call(), b"{}")
