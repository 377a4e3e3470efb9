"""Streams over HTTP as Go Micro has them, byte by byte, on both sides."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeAlias, cast

import pytest
import pytest_asyncio

import micro
from micro.backends.http import HTTPTransport
from micro.call import Body, Call, Reply
from micro.testing import eventually
from micro.transport import Channel, Limits, Listener

from .http_peer import (
    SOON,
    Message,
    Opened,
    closed,
    connected,
    connected_transport,
    dialled,
    go_request,
    links,
    listening,
    parsed,
    read_message,
    sessions,
    vector,
)

#: What a Go client reads of a message; the rest of what Go's server sends is an echo.
NEEDED = (
    *("content-type", "micro-endpoint", "micro-id", "micro-method", "micro-service"),
    *("micro-stream", "micro-error"),
)
EOS = go_request("Helloworld.Chat", b"", Micro_Stream="1", Micro_Error="EOS")


@pytest_asyncio.fixture
async def transport() -> AsyncIterator[HTTPTransport]:
    async with connected_transport() as transport:
        yield transport


@pytest_asyncio.fixture
async def listener(transport: HTTPTransport) -> AsyncIterator[Listener]:
    async with listening(transport) as listener:
        yield listener


@pytest_asyncio.fixture
async def opened(listener: Listener) -> AsyncIterator[Opened]:
    async with connected(listener.address) as opened:
        yield opened


def says(name: str, endpoint: str = "Helloworld.Chat", *, stream: str = "1") -> bytes:
    """A message to a stream."""
    body = json.dumps({"name": name}).encode()
    return go_request(endpoint, body, Micro_Stream=stream, Micro_Id=stream)


async def told(reader: asyncio.StreamReader) -> str:
    """The greeting, or the error, that comes next."""
    message = await read_message(reader)
    if "micro-error" in message.headers:
        return message.headers["micro-error"]
    return str(json.loads(message.body)["message"])


async def answers_calls(opened: Opened) -> None:
    """Nothing else waits to be read."""
    reader, writer = opened
    writer.write(go_request(Micro_Id="99"))
    message = await read_message(reader)
    assert message.headers["micro-id"] == "99"
    assert json.loads(message.body) == {"message": "Hello Alice"}


# -- a Go client streams with us ---------------------------------------------------------------


@pytest.mark.asyncio
async def test_captured_chat_gets_what_go_answers(opened: Opened) -> None:
    reader, writer = opened
    writer.write(vector("stream-bidi-1-open.req.http"))
    for name in ("stream-bidi-2-send", "stream-bidi-3-send"):
        writer.write(vector(f"{name}.req.http"))
        same(await read_message(reader), name)
    writer.write(vector("stream-bidi-4-close.req.http"))
    assert await told(reader) == "EOS"  # which Go's client, having closed, does not see
    await answers_calls(opened)


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["end", "error"])
async def test_captured_end_of_a_chat_is_what_go_answers(opened: Opened, how: str) -> None:
    reader, writer = opened
    writer.write(vector("stream-bidi-1-open.req.http"))
    writer.write(vector(f"stream-server-{how}-3-send.req.http"))
    same(await read_message(reader), f"stream-server-{how}-3-send")
    writer.write(vector(f"stream-server-{how}-4-close.req.http"))  # Go's client closes as well
    await answers_calls(opened)


def same(got: Message, name: str) -> None:
    go = parsed(vector(f"{name}.rsp.http"))
    assert got.status == 200
    assert (json.loads(got.body) if got.body else {}) == (json.loads(go.body) if go.body else {})
    ours = got.headers.get("micro-error", "")
    if ours.startswith("{"):
        error, of_go = json.loads(ours), json.loads(go.headers.pop("micro-error"))
        assert {key: error[key] for key in of_go} == of_go
        del got.headers["micro-error"]
    for header in NEEDED:
        assert got.headers.get(header) == go.headers.get(header), header


@pytest.mark.asyncio
async def test_first_request_of_a_stream_only_opens_it(opened: Opened) -> None:
    reader, writer = opened
    writer.write(says("nobody", "Helloworld.Count") + says("Ann", "Helloworld.Count"))
    assert [await told(reader) for _ in range(4)] == ["Ann 1", "Ann 2", "Ann 3", "EOS"]


@pytest.mark.asyncio
async def test_server_goes_on_after_the_client_has_ended(opened: Opened) -> None:
    """Which no client of Go Micro waits for."""
    reader, writer = opened
    writer.write(says("", "Helloworld.Join"))
    writer.write(says("Ann", "Helloworld.Join") + says("Bob", "Helloworld.Join") + EOS)
    assert [await told(reader) for _ in range(2)] == ["Ann Bob", "EOS"]


@pytest.mark.asyncio
async def test_end_of_an_unknown_stream_is_not_answered(opened: Opened) -> None:
    opened[1].write(vector("stream-bidi-4-close.req.http"))
    await answers_calls(opened)


@pytest.mark.asyncio
async def test_message_that_comes_after_the_end_is_not_answered(opened: Opened) -> None:
    reader, writer = opened
    writer.write(says("") + says("end"))
    assert await told(reader) == "EOS"
    writer.write(says("late") + says("later"))
    await answers_calls(opened)


@pytest.mark.asyncio
async def test_streams_may_follow_each_other_on_one_connection(opened: Opened) -> None:
    reader, writer = opened
    for stream in ("1", "2", "3"):
        writer.write(says("", stream=stream) + says("Ann", stream=stream))
        assert await told(reader) == "Hello Ann"
        writer.write(says("end", stream=stream))
        assert await told(reader) == "EOS"


@pytest.mark.asyncio
async def test_second_stream_and_calls_on_a_connection_are_told_to_take_another_one(
    opened: Opened,
) -> None:
    reader, writer = opened
    writer.write(says(""))
    for other in (says("Ann", stream="2"), go_request()):
        writer.write(other)
        error = json.loads(await told(reader))
        assert error["kind"] == "FailedPrecondition"
        assert "another one" in error["detail"]
    writer.write(says("Ann"))
    assert await told(reader) == "Hello Ann"


@pytest.mark.asyncio
async def test_stream_of_an_unknown_endpoint_is_told_so(opened: Opened) -> None:
    reader, writer = opened
    writer.write(says("", "Helloworld.Nope"))
    assert json.loads(await told(reader))["kind"] == "EndpointNotFound"
    await answers_calls(opened)


@pytest.mark.asyncio
@pytest.mark.parametrize("endpoint", ["Helloworld.Chat", "Helloworld.Count", "Helloworld.Join"])
async def test_stream_has_to_be_called_as_one(opened: Opened, endpoint: str) -> None:
    reader, writer = opened
    writer.write(go_request(endpoint))
    assert json.loads(await told(reader))["kind"] == "InvalidArgument"


@pytest.mark.asyncio
async def test_timeout_of_the_first_request_ends_the_stream(opened: Opened) -> None:
    reader, writer = opened
    began = time.monotonic()
    opening = {"Micro_Stream": "1", "Timeout": "200000000"}
    writer.write(go_request("Helloworld.Chat", b"", **opening))
    assert json.loads(await told(reader))["kind"] == "DeadlineExceeded"
    assert 0.2 <= time.monotonic() - began < 0.2 + 2.0


@pytest.mark.asyncio
async def test_wrong_timeout_of_a_stream_is_refused(opened: Opened) -> None:
    reader, writer = opened
    writer.write(go_request("Helloworld.Chat", b"", Micro_Stream="1", Timeout="5s"))
    assert json.loads(await told(reader))["code"] == 400


@pytest.mark.asyncio
async def test_stream_lasts_longer_than_an_idle_connection(transport: HTTPTransport) -> None:
    limits = Limits(head_timeout=0.1, body_timeout=0.1, idle=0.1)
    async with listening(transport, limits) as listener:
        async with connected(listener.address) as (reader, writer):
            writer.write(says(""))
            await asyncio.sleep(1.2)  # two looks of the port's
            writer.write(says("Ann"))
            assert await told(reader) == "Hello Ann"


@pytest.mark.asyncio
async def test_message_that_does_not_come_in_time_ends_the_stream(transport: HTTPTransport) -> None:
    async with listening(transport, Limits(body_timeout=0.1)) as listener:
        async with connected(listener.address) as (reader, writer):
            writer.write(says("") + says("Ann")[:-1])
            assert json.loads(await told(reader))["detail"] == "the request did not arrive in time"
            await closed(reader)


@pytest.mark.asyncio
async def test_message_over_the_limit_ends_the_stream_and_its_handler(
    transport: HTTPTransport,
) -> None:
    begun: list[bool] = []
    ended: list[bool] = []

    async def listen(call: Call, body: Body) -> Reply:
        begun.append(True)
        try:
            async for __ in cast("AsyncIterator[bytes]", body):
                pass
        finally:
            ended.append(True)
        return Reply(body=b"")

    async with listening(transport, Limits(message=100), handler=listen) as listener:
        async with connected(listener.address) as (reader, writer):
            writer.write(says(""))
            await eventually(lambda: begun)
            writer.write(says("x" * 100))
            assert json.loads(await told(reader))["code"] == 413
            await closed(reader)
    assert ended == [True]


@pytest.mark.asyncio
async def test_handler_that_reads_nothing_holds_little(transport: HTTPTransport) -> None:
    """64 messages or 256 kB wait in the server; the rest does not leave the client."""
    release = asyncio.Event()
    heard = 0

    async def wait(call: Call, body: Body) -> Reply:
        nonlocal heard
        await release.wait()
        async for __ in cast("AsyncIterator[bytes]", body):
            heard += 1
        return Reply(body=b"{}")

    for size, most in ((10, 2 * 256_000), (100_000, 256 * 1024 + 256_000)):
        heard = 0
        release.clear()
        async with listening(transport, handler=wait) as listener:
            async with connected(listener.address) as (reader, writer):
                count = 10_000_000 // (size + 200)
                writer.write(says("") + says("x" * size) * count + EOS)
                (session,) = await eventually(lambda: streaming(listener))
                inbox = session._stream._inbox
                await eventually(partial(getattr, inbox, "paused"))
                assert inbox._size < most
                release.set()
                assert (await read_message(reader)).body == b"{}"
                assert heard == count


@pytest.mark.asyncio
async def test_client_that_is_not_read_may_hang_up(transport: HTTPTransport) -> None:
    """Its handler is cancelled, although what it has sent stands before its end."""
    begun = 0
    cancelled = 0

    async def wait(_: Call, __: Body) -> Reply:
        nonlocal begun, cancelled
        begun += 1
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        raise AssertionError

    async with listening(transport, handler=wait) as listener:
        for sent in (says("") + says("Ann") * 1000, go_request() * 100):
            async with connected(listener.address) as (_, writer):
                writer.write(sent)
                await eventually(lambda: begun == cancelled + 1)
                await writer.drain()
            await eventually(lambda: begun == cancelled, within=0.5 + 0.5 + 2.0)
        await eventually(lambda: not sessions(listener))


@pytest.mark.asyncio
async def test_message_that_is_not_read_is_not_late(transport: HTTPTransport) -> None:
    release = asyncio.Event()

    async def wait(_: Call, body: Body) -> Reply:
        await release.wait()
        heard = [1 async for __ in cast("AsyncIterator[bytes]", body)]
        return Reply(body=b"%d" % len(heard))

    async with listening(transport, Limits(body_timeout=0.1), handler=wait) as listener:
        async with connected(listener.address) as (reader, writer):
            messages = says("") + says("x" * 10_000) * 1000
            writer.write(messages[:-1])
            await asyncio.sleep(1.2)  # two looks of the port's
            release.set()
            writer.write(messages[-1:] + EOS)
            assert (await read_message(reader)).body == b"1000"


@pytest.mark.asyncio
async def test_connection_of_a_stream_that_nobody_read_is_used_again(
    transport: HTTPTransport,
) -> None:
    async def ignore(call: Call, body: Body) -> Reply:
        if isinstance(body, bytes):
            return Reply(body=b"a call")
        await asyncio.sleep(0.1)
        return Reply(body=b"a stream")

    async with listening(transport, handler=ignore) as listener:
        async with connected(listener.address) as (reader, writer):
            writer.write(says("") + says("x" * 10_000) * 100 + EOS + go_request())
            for body in (b"a stream", b"", b"a call"):
                assert (await read_message(reader)).body == body


def streaming(listener: Listener) -> set[Any]:
    """The connections that have a stream."""
    return {one for one in sessions(listener) if getattr(one, "_stream", None) is not None}


# -- we stream with a Go server ----------------------------------------------------------------


class GoServer:
    """A server of one stream a connection: it says given bytes after so many messages."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.messages: list[Message] = []
        self.connections = 0
        self.lost = 0
        self._answers = answers

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        heard = 0
        try:
            while True:
                message = parsed(await reader.readuntil(b"\r\n\r\n"))
                length = int(message.headers["content-length"])
                message.body = await reader.readexactly(length)
                self.messages.append(message)
                heard += 1
                writer.write(b"".join(said for after, said in self._answers if after == heard))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lost += 1
        writer.close()


Dial: TypeAlias = Callable[[GoServer], Awaitable[Channel]]


@pytest_asyncio.fixture
async def dial(transport: HTTPTransport) -> AsyncIterator[Dial]:
    async with AsyncExitStack() as stack:

        async def dial(peer: GoServer) -> Channel:
            server = await asyncio.start_server(peer, "127.0.0.1", 0)
            stack.callback(server.close)
            port = server.sockets[0].getsockname()[1]
            return await stack.enter_async_context(dialled(transport, f"127.0.0.1:{port}"))

        yield dial


def chat(kind: Any = "bidi", **fields: Any) -> Call:
    return Call(service="helloworld", endpoint="Helloworld.Chat", kind=kind, **fields)


async def said(*messages: bytes, ends: bool = True) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
    if not ends:
        await asyncio.Event().wait()


async def heard(channel: Channel, call: Call, body: AsyncIterator[bytes]) -> list[bytes]:
    async with asyncio.timeout(SOON), channel.stream(call, body) as reply:
        return [message async for message in cast("AsyncIterator[bytes]", reply.body)]


@pytest.mark.asyncio
async def test_our_messages_are_those_of_a_go_client(dial: Dial) -> None:
    server = GoServer((4, vector("stream-burst-4.rsp.http")))
    body = said(b'{"name":"Alice"}\n', b'{"name":"Bob"}\n')
    assert await heard(await dial(server), chat(), body) == []
    captured = ["1-open", "2-send", "3-send", "4-close"]
    for ours, name in zip(server.messages, captured, strict=True):
        go = parsed(vector(f"stream-bidi-{name}.req.http"))
        for header in ("host", "user-agent", "content-length", "transfer-encoding"):
            go.headers.pop(header, None)
        assert {key: ours.headers[key] for key in go.headers} == go.headers
    assert [message.body for message in server.messages] == [
        *(b"", b'{"name":"Alice"}\n', b'{"name":"Bob"}\n', b""),
    ]


@pytest.mark.asyncio
async def test_captured_messages_are_heard(dial: Dial) -> None:
    """Three messages that were sent quickly: a fault of Go Micro makes them one and the same."""
    burst = [vector(f"stream-burst-{number}.rsp.http") for number in (1, 2, 3, 4)]
    channel = await dial(GoServer((2, b"".join(burst))))
    got = await heard(channel, chat("server"), said(b'{"name":"Alice"}'))
    assert [json.loads(message) for message in got] == [{"message": "Alice 3"}] * 3


@pytest.mark.asyncio
async def test_captured_error_of_a_stream_is_raised(dial: Dial) -> None:
    failed = vector("stream-server-error-3-send.rsp.http")
    channel = await dial(GoServer((2, failed)))
    with pytest.raises(micro.AlreadyExists, match="stream failed") as caught:
        await heard(channel, chat(), said(b"{}", ends=False))
    assert caught.value.remote


@pytest.mark.asyncio
async def test_server_stream_is_not_ended_by_its_one_message(dial: Dial) -> None:
    """Go Micro would take that for the end of the whole, and not tell its own."""
    greeting = vector("stream-bidi-2-send.rsp.http")
    server = GoServer((2, greeting + vector("stream-burst-4.rsp.http")))
    assert len(await heard(await dial(server), chat("server"), said(b"{}"))) == 1
    assert [message.headers.get("micro-error") for message in server.messages] == [None, None]


@pytest.mark.asyncio
async def test_client_stream_ends_with_the_one_reply(dial: Dial) -> None:
    """Go Micro says no more when its handler has heard the end."""
    server = GoServer((4, vector("stream-bidi-2-send.rsp.http")))
    assert len(await heard(await dial(server), chat("client"), said(b"{}", b"{}"))) == 1
    assert server.messages[-1].headers["micro-error"] == "EOS"


@pytest.mark.asyncio
async def test_stream_whose_end_is_not_told_ends_at_its_deadline(dial: Dial) -> None:
    """As that of a Go server whose handler returns when it has heard the end."""
    began = time.monotonic()
    with pytest.raises(micro.DeadlineExceeded):
        await heard(await dial(GoServer()), chat(deadline=began + 0.2), said(b"{}"))
    assert 0.2 <= time.monotonic() - began < 0.2 + 2.0


@pytest.mark.asyncio
async def test_each_stream_has_a_connection_of_its_own(dial: Dial) -> None:
    server = GoServer((2, vector("stream-burst-4.rsp.http")))
    channel = await dial(server)
    await asyncio.gather(*(heard(channel, chat(), said(b"{}", ends=False)) for _ in range(3)))
    assert server.connections == 3
    await eventually(lambda: server.lost == 3)
    assert not links(channel)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\n\r\n", micro.MicroError),
        (b"\x00\x01\x02", micro.Internal),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4294967296\r\n\r\n", micro.TooLarge),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 0\r\n\r\n", micro.Internal),
    ],
    ids=["status", "garbage", "length", "encoding"],
)
async def test_answer_that_is_no_message_ends_the_stream(
    dial: Dial, answer: bytes, kind: type[micro.MicroError]
) -> None:
    server = GoServer((2, vector("stream-bidi-2-send.rsp.http") + answer))
    channel = await dial(server)
    async with channel.stream(chat(), said(b"{}", ends=False)) as reply, asyncio.timeout(SOON):
        messages = cast("AsyncIterator[bytes]", reply.body)
        await anext(messages)
        with pytest.raises(kind):
            await anext(messages)
    await eventually(lambda: server.lost == 1)
