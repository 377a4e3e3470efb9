"""What an HTTP server refuses, and with which answer; whatever it was, it goes on serving."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress

import pytest
import pytest_asyncio

from micro.backends.http import HTTPTransport
from micro.testing import eventually
from micro.transport import Limits, Listener

from .http_peer import (
    SOON,
    closed,
    connected,
    connected_transport,
    exchange,
    go_request,
    listening,
    read_message,
    request,
    sessions,
)

MIB = 1024 * 1024


@pytest_asyncio.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    async with connected_transport() as transport:
        yield transport


@pytest_asyncio.fixture
async def listener(transport: HTTPTransport) -> AsyncIterator[Listener]:
    async with listening(transport) as listener:
        yield listener


@pytest.fixture(autouse=True)
def nothing_breaks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [one for one in caplog.get_records("call") if one.levelno >= logging.ERROR]


def chunked(body: bytes) -> bytes:
    return request("/Helloworld/Call", body, Transfer_Encoding="chunked")


def line(header: bytes) -> bytes:
    """A request with one more line."""
    return request().replace(b"Host: x\r\n", b"Host: x\r\n" + header + b"\r\n")


def without_host(first: bytes) -> bytes:
    return first + b" HTTP/1.1\r\nContent-Length: 0\r\n\r\n"


#: Number and name in faults-and-security, what is sent, the status, and a word of the text.
NOT_HTTP: list[tuple[str, bytes, int, str]] = [
    ("3 length says 4 GiB", request(Content_Length="4294967296")[:200], 400, "Content-Length"),
    ("5 negative length", line(b"Content-Length: -1"), 400, "Content-Length"),
    ("5 length over 64 bits", line(b"Content-Length: 18446744073709551616"), 400, ""),
    ("5 length in hex", line(b"Content-Length: 0x10"), 400, "Content-Length"),
    ("5 length with a sign", line(b"Content-Length: +16"), 400, "Content-Length"),
    ("31 CR in a value", line(b"X: a\rb"), 400, "header value"),
    ("31 LF in a value", line(b"X: a\nb"), 400, "header value"),
    ("31 folded value", line(b"X: a\r\n b"), 400, "header value"),
    ("32 NUL in a value", line(b"X: a\0b"), 400, "header value"),
    ("32 NUL in a name", line(b"X\0: a"), 400, "header token"),
    ("32 NUL in an endpoint", line(b"Micro-Endpoint: A.B\0"), 400, "header value"),
    ("32 bell in a value", line(b"X: a\x07b"), 400, "header value"),
    ("33 name with a space", line(b"X Y: a"), 400, "header token"),
    ("33 space before the colon", line(b"X : a"), 400, "header token"),
    ("33 name with umlauts", line("Näme: a".encode()), 400, "header token"),
    ("33 no name", line(b": a"), 400, "header token"),
    ("33 no colon", line(b"Name"), 400, "header token"),
    ("33 value that is not UTF-8", line(b"X: \xff"), 400, "UTF-8"),
    ("34 101 headers", line(b"\r\n".join(b"X%d: y" % n for n in range(101))), 431, "100 fields"),
    ("34 33 KiB in one header", line(b"X: " + b"y" * 33 * 1024), 431, "32768 bytes"),
    ("34 33 KiB in the path", request("/" + "y" * 33 * 1024), 431, "32768 bytes"),
    ("34 33 KiB without an end", b"POST / HTTP/1.1\r\nX: " + b"y" * 33 * 1024, 431, "32768 bytes"),
    ("35 two lengths", line(b"Content-Length: 16"), 400, "Content-Length"),
    ("35 list of lengths", line(b"Content-Length: 16, 16"), 400, "Content-Length"),
    ("35 two endpoints", line(b"Micro-Endpoint: A.B\r\nMicro-Endpoint: A.C"), 400, "twice"),
    ("35 two content types", line(b"Content-Type: a/b\r\nContent-Type: a/c"), 400, "twice"),
    ("36 length and coding", line(b"Transfer-Encoding: chunked"), 400, "Transfer-Encoding"),
    ("37 coding xchunked", request(Transfer_Encoding="xchunked"), 400, "Transfer-Encoding"),
    ("37 coding gzip, chunked", request(Transfer_Encoding="gzip, chunked"), 400, "alone"),
    ("37 coding chunked, gzip", request(Transfer_Encoding="chunked, gzip"), 400, ""),
    ("37 coding identity", request(Transfer_Encoding="identity"), 400, "Transfer-Encoding"),
    ("37 coding in HTTP/1.0", chunked(b"").replace(b"HTTP/1.1", b"HTTP/1.0"), 400, "alone"),
    ("37 chunk 0x10", chunked(b"0x10\r\n"), 400, "0x10"),
    ("37 chunk +5", chunked(b"+5\r\n"), 400, "+5"),
    ("37 chunk -5", chunked(b"-5\r\n"), 400, "-5"),
    ("37 chunk 1_0", chunked(b"1_0\r\n"), 400, "1_0"),
    ("37 chunk of Arabic digits", chunked("\u0665\r\n".encode()), 400, "chunk"),
    ("37 chunk with a space", chunked(b" 5\r\n"), 400, "chunk"),
    ("37 chunk without a size", chunked(b"\r\n"), 400, "chunk"),
    ("37 chunk over 32 bits", chunked(b"100000000\r\n"), 400, "chunk"),
    ("37 chunk longer than its size", chunked(b"1\r\nab\r\n0\r\n\r\n"), 400, "longer"),
    ("37 trailer that is none", chunked(b"0\r\nno colon\r\n\r\n"), 400, "header fields"),
    ("38 chunk extension of 1 MiB", chunked(b"1;" + b"x" * MIB), 400, "too long"),
    ("38 20,000 chunks", chunked(b"1\r\n0\r\n" * 20_000 + b"0\r\n\r\n"), 400, "16384 chunks"),
    ("39 LF after a header", line(b"X: a\nY: b"), 400, "header value"),
    ("39 LF after the first line", request().replace(b"\r\n", b"\n", 1), 400, "CRLF"),
    ("39 LF at the end", request().replace(b"\r\n\r\n", b"\n\n\r\n\r\n"), 400, ""),
    ("39 LF after a chunk's size", chunked(b"1\na\r\n0\r\n\r\n"), 400, "chunk"),
    ("40 URL of another host", request("http://evil/Helloworld/Call"), 400, "host"),
    ("40 URL with a user", request("http://x@y/Helloworld/Call"), 400, "host"),
    ("40 two hosts", line(b"Host: y"), 400, "twice"),
    ("40 no host", without_host(b"POST /"), 400, "Host"),
    ("40 host that is none", request().replace(b"Host: x", b"Host: x/y"), 400, "Host"),
    ("40 CONNECT", request().replace(b"POST /Helloworld/Call", b"CONNECT x:80"), 400, "path"),
    ("41 dots", request("/../admin"), 400, "path"),
    ("41 dots at the end", request("/Helloworld/.."), 400, ".."),
    ("41 one dot", request("/./Helloworld/Call"), 400, ".."),
    ("41 two slashes", request("//Helloworld/Call"), 400, "path"),
    ("41 two slashes within", request("/Helloworld//Call"), 400, "path"),
    ("41 encoded dots", request("/%2e%2e%2fadmin"), 400, "path"),
    ("41 encoded NUL", request("/Helloworld/Call%00"), 400, "path"),
    ("41 overlong UTF-8", request("/%c0%ae%c0%ae/Call"), 400, "path"),
    ("41 umlaut", request().replace(b"/Call", "/Cäll".encode()), 400, ""),
    ("41 backslash", request("/Helloworld\\Call"), 400, "path"),
    ("41 star", request("*"), 400, "path"),
    ("41 fragment", request("/Helloworld/Call?x#y"), 400, "path"),
    ("other version 0.9", b"GET /livez\r\n\r\n", 400, "version"),
    ("other version 2.0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "HTTP"),
    ("other version 1.2", request().replace(b"1.1", b"1.2"), 400, "HTTP"),
    ("two spaces", request().replace(b"POST ", b"POST  "), 400, "HTTP"),
    ("method that is none", request().replace(b"POST", b"Post"), 400, "HTTP"),
    ("no request at all", b"NONSENSE\r\n\r\n", 400, "HTTP"),
]
#: As above; these are requests, and the connection is kept.
NO_CALL: list[tuple[str, bytes, int, str]] = [
    ("1 empty body, required field", request("/Helloworld/Call", b""), 400, "name"),
    ("25 gzip", request(Content_Encoding="gzip"), 415, "gzip"),
    ("27 gzip in gzip", request(Content_Encoding="gzip, gzip"), 415, "gzip, gzip"),
    ("27 unknown encoding", request(Content_Encoding="zstd"), 415, "zstd"),
    ("28 pickle", request(Content_Type="application/x-python-pickle"), 415, "pickle"),
    ("30 wrong content type", request(Content_Type="text/plain"), 415, "text/plain"),
    ("unknown path", request("/admin"), 404, "POST /Handler/Method"),
    ("root", request("/"), 404, "POST /Handler/Method"),
    ("unknown endpoint", request("/Helloworld/Cal"), 404, "Helloworld.Call"),
    ("other method", b"GET /Helloworld/Call HTTP/1.1\r\nHost: x\r\n\r\n", 405, "POST"),
    ("body that is no JSON", request("/Helloworld/Call", b'{"name":'), 400, "truncated"),
    ("field of another type", request("/Helloworld/Call", b'{"name":5}'), 400, "$.name"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("sent", "status", "text"), [case[1:] for case in NOT_HTTP], ids=[case[0] for case in NOT_HTTP]
)
async def test_what_is_no_request_is_refused_and_closed(
    listener: Listener, sent: bytes, status: int, text: str
) -> None:
    async with connected(listener.address) as (reader, writer):
        writer.write(sent)
        got = await read_message(reader)
        assert got.status == status
        error = json.loads(got.body)
        assert text in error["detail"]
        assert got.headers["connection"] == "close"
        await closed(reader)
    assert (await exchange(listener.address, request())).status == 200


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("sent", "status", "text"), [case[1:] for case in NO_CALL], ids=[case[0] for case in NO_CALL]
)
async def test_request_that_is_no_call_is_refused(
    listener: Listener, sent: bytes, status: int, text: str
) -> None:
    async with connected(listener.address) as (reader, writer):
        writer.write(sent)
        got = await read_message(reader)
        assert got.status == status
        assert text in json.loads(got.body)["detail"]
        writer.write(request())
        assert (await read_message(reader)).status == 200


@pytest.mark.asyncio
async def test_empty_body_is_a_message_with_all_defaults(listener: Listener) -> None:
    got = await exchange(listener.address, request("/Helloworld/Greet", b""))
    assert json.loads(got.body) == {"message": "Hello nobody"}


@pytest.mark.asyncio
@pytest.mark.parametrize("length", [4 * MIB + 1, 4 * 1024 * MIB], ids=["4 MiB + 1", "4 GiB"])
@pytest.mark.parametrize("make", [request, go_request], ids=["plain", "go"])
async def test_body_over_the_limit_is_refused_at_its_head(
    listener: Listener, make: type, length: int
) -> None:
    head, _, _ = make().partition(b"\r\n\r\n")
    head = head.replace(b"Content-Length: 16", b"Content-Length: %d" % length)
    async with connected(listener.address) as (reader, writer):
        writer.write(head + b"\r\n\r\n0123456789")
        got = await read_message(reader)
        if make is request:
            assert got.status == 413
        error = json.loads(got.body or got.headers["micro-error"])
        assert (error["code"], error["kind"]) == (413, "TooLarge")
        assert "4194304 bytes" in error["detail"]
        await closed(reader)


@pytest.mark.asyncio
async def test_known_head_is_no_way_around_the_limit(transport: HTTPTransport) -> None:
    """A connection remembers heads that differ in numbers alone."""
    async with listening(transport, Limits(message=30)) as listener:
        async with connected(listener.address) as (reader, writer):
            for number in range(6):
                writer.write(go_request(Micro_Id=f"{number}", Timeout="5000000000"))
                assert (await read_message(reader)).body
            body = b'{"name":"x"}'.ljust(31)
            writer.write(go_request("Helloworld.Call", body, Micro_Id="6", Timeout="5000000000"))
            assert json.loads((await read_message(reader)).headers["micro-error"])["code"] == 413


@pytest.mark.asyncio
async def test_chunked_body_over_the_limit_is_refused_when_it_gets_there(
    transport: HTTPTransport,
) -> None:
    async with listening(transport, Limits(message=100)) as listener:
        for body in (b"65\r\n", b"64\r\n" + b"x" * 100 + b"\r\n1\r\n"):
            assert (await exchange(listener.address, chunked(body))).status == 413


@pytest.mark.asyncio
async def test_peer_that_sends_more_than_it_said_is_cut_off(listener: Listener) -> None:
    """Its request is answered; the gigabyte that follows is none, and not read to its end."""
    sent = 0
    async with connected(listener.address) as (reader, writer):
        writer.write(request())
        assert (await read_message(reader)).status == 200
        with suppress(ConnectionError):
            while sent < 1024:
                writer.write(bytes(MIB))
                await asyncio.wait_for(writer.drain(), SOON)
                sent += 1
    assert sent < 64
    assert (await exchange(listener.address, request())).status == 200


@pytest.mark.asyncio
@pytest.mark.parametrize("part", [10, 60, -3], ids=["first line", "head", "body"])
async def test_truncated_request_ends_with_its_connection(listener: Listener, part: int) -> None:
    async with connected(listener.address) as (reader, writer):
        writer.write(request()[:part])
        writer.write_eof()
        await closed(reader)
    assert (await exchange(listener.address, request())).status == 200


@pytest.mark.asyncio
@pytest.mark.parametrize("start", [1, 70], ids=["head", "body"])
async def test_request_that_trickles_in_is_refused_in_time(
    transport: HTTPTransport, start: int
) -> None:
    """However steadily it does."""
    sent = request(Pad="y" * 30)
    limits = Limits(head_timeout=0.3, body_timeout=0.3)
    began = time.monotonic()
    async with listening(transport, limits) as listener:
        async with connected(listener.address) as (reader, writer):
            writer.write(sent[:start])
            answer = asyncio.create_task(read_message(reader))
            for byte in sent[start:-1]:
                await asyncio.wait([answer], timeout=0.1)
                if answer.done():
                    break
                writer.write(bytes([byte]))
            assert (await answer).status == 408
            assert 0.3 <= time.monotonic() - began < 0.3 + 0.5 + 2.0
            await closed(reader)


@pytest.mark.asyncio
async def test_silent_connection_is_closed(transport: HTTPTransport) -> None:
    async with listening(transport, Limits(head_timeout=0.2)) as listener:
        async with connected(listener.address) as (reader, _):
            await closed(reader)


@pytest.mark.asyncio
async def test_idle_connections_are_capped_and_others_served(transport: HTTPTransport) -> None:
    limits = Limits(connections=20, head_timeout=0.5)
    async with AsyncExitStack() as stack:
        listener = await stack.enter_async_context(listening(transport, limits))
        reader, writer = await stack.enter_async_context(connected(listener.address))
        for _ in range(100):
            with suppress(ConnectionError):
                await stack.enter_async_context(connected(listener.address))
        assert len(sessions(listener)) <= 20
        writer.write(request())
        assert (await read_message(reader)).status == 200

        async def served() -> bool:
            try:
                return (await exchange(listener.address, request())).status == 200
            except (ConnectionError, asyncio.IncompleteReadError):
                return False

        await eventually(served)
