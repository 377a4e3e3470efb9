"""Calls over HTTP, as Go Micro makes them and as everybody does, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import micro
from micro.backends.http import HTTPTransport
from micro.call import Body, Call, Reply
from micro.plugins import Plugins
from micro.testing import eventually
from micro.transport import Limits, Listener
from micro.url import URL

from .http_peer import (
    SOON,
    VECTORS,
    closed,
    connected,
    connected_transport,
    dialled,
    exchange,
    go_request,
    listening,
    parsed,
    read_message,
    request,
    sessions,
    vector,
)


@pytest_asyncio.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    async with connected_transport() as transport:
        yield transport


@pytest_asyncio.fixture
async def listener(transport: HTTPTransport) -> AsyncIterator[Listener]:
    async with listening(transport) as listener:
        yield listener


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
        async with connected(listener.address) as (reader, writer):
            writer.write(path.read_bytes())
            if not path.name.startswith("stream-"):  # the opening of one gets no answer
                await read_message(reader)
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
async def test_message_of_a_topic_is_refused_clearly(listener: Listener) -> None:
    got = await exchange(listener.address, vector("raw-event-on-transport.req.http"))
    assert (got.status, got.headers["micro-id"]) == (200, "7")
    error = json.loads(got.headers["micro-error"])
    assert error["code"] == 501
    assert "topic" in error["detail"]


@pytest.mark.asyncio
async def test_call_that_carries_the_id_of_a_stream_is_a_call(listener: Listener) -> None:
    """Go Micro's calls from a handler of a stream have all of that stream's headers."""
    asked = go_request("Helloworld.Call", b'{"name":"Ann"}', Micro_Stream="5", Micro_Id="1")
    async with connected(listener.address) as (reader, writer):
        for _ in range(2):
            writer.write(asked)
            got = await read_message(reader)
            assert json.loads(got.body) == {"message": "Hello Ann"}
            assert "micro-error" not in got.headers
        writer.write(go_request())
        assert json.loads((await read_message(reader)).body) == {"message": "Hello Alice"}


@pytest.mark.asyncio
async def test_header_that_keeps_our_calls_apart_in_go_is_not_looked_at(
    listener: Listener,
) -> None:
    got = await exchange(listener.address, go_request(X_Micro_Stream="7"))
    assert json.loads(got.body) == {"message": "Hello Alice"}


@pytest.mark.asyncio
async def test_refused_call_of_go_is_told_in_go_form(transport: HTTPTransport) -> None:
    """A Go client takes every other status for a broken connection."""
    async with listening(transport, Limits(message=10)) as listener:
        got = await exchange(listener.address, go_request())
    assert (got.status, got.headers["connection"]) == (200, "close")
    assert json.loads(got.headers["micro-error"])["code"] == 413


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
async def test_http_1_0_is_answered_and_closed(listener: Listener) -> None:
    asked = request().replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"Host: x\r\n", b"")
    async with connected(listener.address) as (reader, writer):
        writer.write(asked)
        got = await read_message(reader)
        assert (got.status, got.body) == (200, b'{"message":"Hello Alice"}\n')
        await closed(reader)


@pytest.mark.asyncio
async def test_http_1_0_is_kept_open_when_it_asks_for_it(listener: Listener) -> None:
    asked = request(Connection="keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    async with connected(listener.address) as (reader, writer):
        for _ in range(3):
            writer.write(asked)
            got = await read_message(reader)
            assert (got.status, got.headers["connection"]) == (200, "keep-alive")


@pytest.mark.asyncio
async def test_offer_of_another_protocol_is_not_taken(listener: Listener) -> None:
    """As of `curl --http2`."""
    asked = request(Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings="AAMAAABk")
    async with connected(listener.address) as (reader, writer):
        for _ in range(2):
            writer.write(asked)
            assert (await read_message(reader)).status == 200


@pytest.mark.asyncio
async def test_head_gets_no_body(listener: Listener) -> None:
    async with connected(listener.address) as (reader, writer):
        writer.write(b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON)
        assert parsed(head).headers["content-length"] == "16"
        writer.write(request())
        assert (await read_message(reader)).status == 200


@pytest.mark.asyncio
async def test_whole_url_of_the_same_host_is_taken(listener: Listener) -> None:
    got = await exchange(listener.address, request("http://X/Helloworld/Call?a=b"))
    assert got.status == 200


@pytest.mark.asyncio
async def test_chunked_body_may_have_extensions_and_trailers(listener: Listener) -> None:
    """They mean nothing, a trailer with the name of a header least of all."""
    body = (
        b'8;x=y\r\n{"name":\r\n8\r\n"Alice"}\r\n0;last\r\nMicro-Endpoint: Helloworld.Fail\r\n\r\n'
    )
    async with connected(listener.address) as (reader, writer):
        for _ in range(2):
            writer.write(request("/Helloworld/Call", body, Transfer_Encoding="chunked"))
            assert json.loads((await read_message(reader)).body) == {"message": "Hello Alice"}


# -- connections -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_handler_of_a_caller_that_hangs_up_is_cancelled(transport: HTTPTransport) -> None:
    begun: list[bool] = []
    cancelled: list[float] = []

    async def wait(_: Call, __: Body) -> Reply:
        begun.append(True)
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            cancelled.append(time.monotonic())
            raise
        raise AssertionError

    async with listening(transport, handler=wait) as listener:
        async with connected(listener.address) as (_, writer):
            writer.write(request())
            await eventually(lambda: begun)
            hung_up = time.monotonic()
        await eventually(lambda: cancelled)
        assert cancelled[0] - hung_up < 0.1 + 2.0


@pytest.mark.asyncio
async def test_draining_server_answers_what_runs_and_says_that_it_closes(
    transport: HTTPTransport,
) -> None:
    release = asyncio.Event()
    begun: list[bool] = []

    async def wait(_: Call, __: Body) -> Reply:
        begun.append(True)
        await release.wait()
        return Reply(body=b"{}")

    async with listening(transport, handler=wait) as listener:
        async with connected(listener.address) as busy, connected(listener.address) as late:
            late[1].write(request()[:5])
            busy[1].write(request())
            await eventually(lambda: begun and len(sessions(listener)) == 2)
            draining = asyncio.create_task(listener.drain(SOON))
            await eventually(lambda: all(one._draining for one in sessions(listener)))
            late[1].write(request()[5:])
            release.set()
            for reader, _ in (busy, late):
                got = await read_message(reader)
                assert (got.body, got.headers["connection"]) == (b"{}\n", "close")
                await closed(reader)
            await asyncio.wait_for(draining, SOON)


@pytest.mark.asyncio
async def test_idle_connection_outlives_that_of_a_go_client(listener: Listener) -> None:
    """It keeps one for 60 s, and does not notice that a server has closed it."""
    assert Limits().idle > 60
    async with connected(listener.address) as (reader, writer):
        writer.write(request())
        await read_message(reader)
        (session,) = sessions(listener)
        assert session.expires - time.monotonic() > 60


@pytest.mark.asyncio
async def test_idle_connection_is_closed(transport: HTTPTransport) -> None:
    async with listening(transport, Limits(idle=0.2)) as listener:
        async with connected(listener.address) as (reader, writer):
            writer.write(request())
            await read_message(reader)
            await closed(reader)


@pytest.mark.asyncio
async def test_caller_that_reads_nothing_is_cut_off(transport: HTTPTransport) -> None:
    """And holds no more than the answers that its socket takes, and one."""
    large = b"x" * 1_000_000
    calls = 0

    async def tell(_: Call, __: Body) -> Reply:
        nonlocal calls
        calls += 1
        return Reply(body=large)

    async with listening(transport, Limits(body_timeout=0.5), handler=tell) as listener:
        host, _, port = listener.address.rpartition(":")
        with socket.create_connection((host, int(port))) as peer:
            peer.sendall(request() * 100)
            await eventually(lambda: not sessions(listener))
        assert calls < 20


@pytest.mark.asyncio
async def test_unix_socket_carries_calls(transport: HTTPTransport, tmp_path: Path) -> None:
    async with (
        listening(transport, at=f"unix:{tmp_path}/socket") as listener,
        dialled(transport, listener.address) as channel,
    ):
        assert listener.address == f"unix:{tmp_path}/socket"
        call = Call(service="helloworld", endpoint="Helloworld.Call")
        assert (await channel.call(call, b'{"name":"Ann"}')).body == b'{"message":"Hello Ann"}'
    assert not (tmp_path / "socket").exists()


@pytest.mark.asyncio
async def test_what_cannot_be_http_is_closed_at_once(listener: Listener) -> None:
    """As TLS at a port without it."""
    for hello in (b"\x16\x03\x01\x02\x00", b"\x00" * 30, b"\r\n\r\n"):
        async with connected(listener.address) as (reader, writer):
            writer.write(hello)
            await closed(reader)


@pytest.mark.asyncio
async def test_address_errors_say_what_to_do(transport: HTTPTransport, listener: Listener) -> None:
    handler = listener.handler  # type: ignore[attr-defined]
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
