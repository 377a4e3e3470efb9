"""The native server, asked byte by byte."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import tracemalloc
from collections.abc import AsyncIterator

import msgspec
import pytest
import pytest_asyncio

from micro.backends import _tcp_server
from micro.call import Body, Call, Reply
from micro.errors import Unavailable
from micro.testing import eventually
from micro.transport import Listener

from .native import (
    CREDIT,
    DATA,
    END,
    ERROR,
    GOAWAY,
    HELLO,
    JSON,
    KIB,
    METADATA,
    MIB,
    MORE,
    OPEN,
    PIECE,
    PING,
    PONG,
    PREFACE,
    RAW,
    REPLY,
    REQUEST,
    SOON,
    Acting,
    Frame,
    Peer,
    cancel,
    credit,
    data,
    end,
    greeted,
    hello,
    listening,
    named,
    opened,
    pieces,
    raw,
    reply,
    request,
)

SLACK = 2.0


@pytest.fixture
def handler() -> Acting:
    return Acting()


@pytest_asyncio.fixture
async def listener(handler: Acting) -> AsyncIterator[Listener]:
    async with listening(handler) as listener:
        yield listener


@pytest_asyncio.fixture
async def peer(listener: Listener) -> AsyncIterator[Peer]:
    async with greeted(listener.address) as peer:
        yield peer


async def is_closed_after_goaway(peer: Peer, text: str) -> None:
    """The server says what is wrong, and closes."""
    last = await peer.gone()
    assert last.error == "DataLoss"
    assert text in last.text


async def is_full(handler: Acting) -> None:
    """Wait until what a handler pours out is held back."""
    before = -1
    while handler.sent > before or not before:
        before = handler.sent
        await asyncio.sleep(0.2)


# -- how a connection begins ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_hello_is_answered_with_the_settings_of_the_server(handler: Acting) -> None:
    async with (
        listening(handler, message=1_000_000, headers=999, calls=7, streams=3) as listener,
        raw(listener.address) as peer,
    ):
        peer.write(PREFACE, hello())
        said = await peer.read()
        assert said._replace(body=b"") == Frame(HELLO)
        assert msgspec.msgpack.decode(said.body) == {
            "message": 1_000_000,
            "headers": 999,
            "calls": 7,
            "streams": 3,
            "window": 256 * KIB,
        }


@pytest.mark.asyncio
async def test_beginning_may_be_split_anywhere(listener: Listener) -> None:
    said = PREFACE + hello().encode() + request(1, body=b"a").encode()
    for cut in range(1, len(said)):
        async with raw(listener.address) as peer:
            await peer.send(said[:cut])
            await asyncio.sleep(0)
            await peer.send(said[cut:])
            assert (await peer.read()).kind == HELLO
            assert await peer.read() == reply(1, b"a")


@pytest.mark.asyncio
async def test_beginning_may_come_byte_by_byte(listener: Listener) -> None:
    async with raw(listener.address) as peer:
        for byte in PREFACE + hello().encode() + request(1, body=b"a").encode():
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await peer.read()).kind == HELLO
        assert await peer.read() == reply(1, b"a")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "said", [b"MICRO2\r\n", b"MICRO1\n\n", b"MICRO1\r\nMICRO1\r\n", b"\x16\x03\x01\x00", bytes(24)]
)
async def test_other_preface_is_hung_up_on(listener: Listener, said: bytes) -> None:
    async with raw(listener.address) as peer:
        peer.write(said + bytes(24))
        assert all(frame.kind == GOAWAY for frame in await peer.rest())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "frame",
    [
        request(1),
        opened(1),
        request(1, body=bytes(PIECE), more=True),
        Frame(HELLO, body=b"no map"),
        Frame(HELLO, body=msgspec.msgpack.encode({"message": 1})),
        Frame(HELLO, body=b"\x91" * PIECE),
        Frame(HELLO, body=b"\x81\xa1x" + b"\x91" * (PIECE - 3)),
        hello(message=0),
        hello(headers=-1),
        hello(calls=0),
        hello(window=PIECE + 15),
    ],
    ids=lambda frame: f"{frame.kind} {frame.body[:12]!r}",
)
async def test_what_is_no_hello_ends_the_connection(
    listener: Listener, handler: Acting, frame: Frame
) -> None:
    async with raw(listener.address) as peer:
        peer.write(PREFACE, frame)
        await is_closed_after_goaway(peer, "")
    assert not handler.calls


@pytest.mark.asyncio
async def test_hello_may_say_what_is_not_known(listener: Listener) -> None:
    async with greeted(listener.address, colour=7) as peer:
        peer.write(request(1, body=b"a"))
        assert await peer.read() == reply(1, b"a")


@pytest.mark.asyncio
async def test_second_hello_ends_the_connection(peer: Peer) -> None:
    peer.write(hello())
    await is_closed_after_goaway(peer, "kind 1")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "said", [b"", b"M", PREFACE, PREFACE + hello().encode()[:20], PREFACE + bytes(9)]
)
async def test_who_does_not_greet_in_time_is_hung_up_on(handler: Acting, said: bytes) -> None:
    async with (
        listening(handler, head_timeout=0.2) as listener,
        raw(listener.address) as silent,
        greeted(listener.address) as other,
    ):
        began = time.monotonic()
        silent.write(said)
        assert await silent.rest() == []
        assert time.monotonic() - began < 2 * 0.2 + 0.5 + SLACK
        other.write(request(1, body=b"a"))
        assert await other.read() == reply(1, b"a")


# -- calls ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_call_arrives_as_it_was_sent(peer: Peer, handler: Acting) -> None:
    head = named("Echo.Call", {"tenant": "acme", "x-1": "ünï"})
    peer.write(Frame(REQUEST, JSON | METADATA, 1, 30_000, head, b"{}"))
    answer = await peer.read()
    assert answer[:4] == (REPLY, METADATA, 1, 1)
    assert msgspec.msgpack.decode(answer.head) == {"tenant": "acme", "x-1": "ünï"}
    assert answer.body == b"{}"
    (call,) = handler.calls
    assert (call.service, call.endpoint, call.kind) == ("suite", "Echo.Call", "unary")
    assert call.content_type == "application/json"
    assert call.metadata == {"tenant": "acme", "x-1": "ünï"}
    assert call.deadline == pytest.approx(time.monotonic() + 30, abs=SLACK)
    assert call.peer == "{}:{}".format(*peer.writer.get_extra_info("sockname"))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("codec", "content_type"),
    [
        (1, "application/json"),
        (2, "application/msgpack"),
        (3, "application/protobuf"),
        (4, "application/octet-stream"),
    ],
)
async def test_codecs_are_content_types(
    peer: Peer, handler: Acting, codec: int, content_type: str
) -> None:
    peer.write(Frame(REQUEST, codec, 1, 0, named("Echo.Call")))
    await peer.read()
    assert handler.calls[0].content_type == content_type
    assert handler.calls[0].deadline is None


@pytest.mark.asyncio
async def test_other_content_type_stands_in_the_head(peer: Peer, handler: Acting) -> None:
    head = named("Echo.Call") + b"\x08text/xml"
    peer.write(Frame(REQUEST, 0, 1, 0, head, b"a"))
    peer.write(Frame(REQUEST, METADATA, 2, 0, head + msgspec.msgpack.encode({"a": "b"}), b"b"))
    assert [(await peer.read()).body, (await peer.read()).body] == [b"a", b"b"]
    assert [call.content_type for call in handler.calls] == ["text/xml"] * 2
    assert handler.calls[1].metadata == {"a": "b"}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("flags", "head"),
    [
        (JSON, b""),
        (JSON, b"\x00"),
        (JSON, b"\x09no slash."),
        (JSON, b"\x06suite/"),
        (JSON, b"\xffsuite/Echo.Call"),
        (JSON, named("Echo.Call") + b"more"),
        (JSON, b"\x08suite/\xff\xff"),
        (0, named("Echo.Call")),
        (0, named("Echo.Call") + b"\x09text/xml"),
        (0, named("Echo.Call") + b"\x07text/xml"),
        (0, named("Echo.Call") + b"\x02\xc3\xa4"),
        (5, named("Echo.Call")),
        (7, named("Echo.Call")),
        (JSON | METADATA, named("Echo.Call")),
        (JSON | METADATA, named("Echo.Call") + b"\x93abc"),
        (JSON | METADATA, named("Echo.Call") + b"\x81\xa1a\xa1b more"),
        (JSON | METADATA, named("Echo.Call") + b"\x81\xa1a\x01"),
        (JSON | METADATA, named("Echo.Call") + b"\x81\xa1a\xa1\xff"),
        (JSON | METADATA, named("Echo.Call") + b"\xdf\xff\xff\xff\xff"),
        (JSON | METADATA, named("Echo.Call") + b"\x81\xa1a" + b"\x91" * 20_000),
        (JSON | METADATA, named("Echo.Call", {"micro-id": "1"})),
        (JSON | METADATA, named("Echo.Call", {"host": "a"})),
        (JSON | METADATA, named("Echo.Call", {"a b": "c"})),
        (JSON | METADATA, named("Echo.Call", {"a": "b\r\nc: d"})),
        (JSON | METADATA, named("Echo.Call", {"a": "b\0"})),
    ],
)
async def test_bad_head_is_answered_and_the_connection_goes_on(
    peer: Peer, handler: Acting, flags: int, head: bytes
) -> None:
    for number, kind in ((1, REQUEST), (2, OPEN)):
        peer.write(Frame(kind, flags, number, 0, head))
        answer = await peer.read()
        assert answer[:4] == (ERROR, 0, number, 3)
        assert answer.error == "InvalidArgument"
    peer.write(request(3, body=b"a"))
    assert await peer.read() == reply(3, b"a")
    assert len(handler.calls) == 1


@pytest.mark.asyncio
async def test_error_of_a_handler_has_code_and_json(peer: Peer) -> None:
    peer.write(request(1, "Fail.Call"))
    answer = await peer.read()
    assert answer[:5] == (ERROR, 0, 1, 5, b"")
    assert json.loads(answer.body) == {
        "id": "suite",
        "code": 404,
        "detail": "there is no such thing",
        "status": "Not Found",
        "kind": "NotFound",
    }


@pytest.mark.asyncio
async def test_handler_that_gives_itself_up_is_answered(peer: Peer) -> None:
    """CancelledError that nobody asked for, as of a task that the handler waits for."""
    peer.write(request(1, "Give.Call"), request(2, body=b"a"))
    answers = {(await peer.read()).stream: 1, (await peer.read()).stream: 2}
    assert answers.keys() == {1, 2}


@pytest.mark.asyncio
async def test_deadline_of_a_message_in_pieces_begins_with_the_first(
    peer: Peer, handler: Acting
) -> None:
    first, *rest = pieces(request, 1, bytes(PIECE + 1))
    peer.write(first._replace(aux=10_000))
    await asyncio.sleep(0.3)
    peer.write(*rest)
    await peer.message()
    (call,) = handler.calls
    assert call.deadline is not None
    assert call.deadline - time.monotonic() < 9.75


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 4 * MIB], ids=str)
async def test_every_size_comes_back(peer: Peer, handler: Acting, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    said = [request(1, body=body)] if size <= PIECE else pieces(request, 1, body)
    peer.write(*said)
    first, got = await peer.message()
    assert got == body
    assert bool(first.flags & MORE) == (size > PIECE)
    assert len(first.body) == min(size, PIECE)


@pytest.mark.asyncio
async def test_16_mib_come_back_where_they_may(handler: Acting) -> None:
    body = bytes(16 * MIB)
    async with (
        listening(handler, message=16 * MIB) as listener,
        greeted(listener.address, message=16 * MIB) as peer,
    ):
        sending = asyncio.create_task(peer.send(*pieces(request, 1, body)))
        assert (await peer.message())[1] == body
        await sending


@pytest.mark.asyncio
async def test_small_call_overtakes_a_large_one(peer: Peer) -> None:
    first, *rest = pieces(request, 1, bytes(3 * PIECE))
    peer.write(first, request(2, body=b"a"))
    assert await peer.read() == reply(2, b"a")
    peer.write(*rest[:-1], request(3, body=b"b"))
    assert await peer.read() == reply(3, b"b")
    peer.write(rest[-1])
    assert (await peer.message())[1] == bytes(3 * PIECE)


@pytest.mark.asyncio
async def test_small_reply_overtakes_a_large_one(handler: Acting) -> None:
    async with (
        listening(handler, message=64 * MIB) as listener,
        greeted(listener.address, message=64 * MIB) as peer,
    ):
        peer.write(request(1, f"Large.{64 * MIB}"))
        assert (await peer.read())[:3] == (REPLY, MORE, 1)
        peer.write(request(2, body=b"a"))
        before = 0
        while (frame := await peer.read()).stream == 1:
            before += 1
        assert frame == reply(2, b"a")
        assert before * PIECE < 32 * MIB


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_message_over_the_limit_is_refused_and_the_connection_goes_on(
    handler: Acting,
) -> None:
    async with (
        listening(handler, message=2 * PIECE) as listener,
        greeted(listener.address) as peer,
    ):
        peer.write(*pieces(request, 1, bytes(2 * PIECE + 1)))
        answer = await peer.read()
        assert answer[:4] == (ERROR, 0, 1, 8 | 1 << 31)
        assert answer.error == "TooLarge"
        assert str(2 * PIECE) in answer.text
        peer.write(*pieces(request, 2, bytes(2 * PIECE)))
        assert len((await peer.message())[1]) == 2 * PIECE
    assert len(handler.calls) == 1


@pytest.mark.asyncio
async def test_message_over_the_limit_is_refused_before_its_end(handler: Acting) -> None:
    """What is over the limit is given no memory; and the rest of it is not waited for."""
    async with (
        listening(handler, message=2 * PIECE) as listener,
        greeted(listener.address) as peer,
    ):
        first, *rest = pieces(request, 1, bytes(64 * PIECE))
        peer.write(first, *rest[:2])
        assert (await peer.read()).error == "TooLarge"
        peer.write(opened(2, "Take.All"), data(2, bytes(PIECE), more=True))
        peer.write(data(2, bytes(PIECE), more=True), data(2, bytes(PIECE), more=True))
        assert (await peer.until(ERROR)).stream == 2
        peer.write(*rest[2:], request(3, body=b"a"))
        assert await peer.until(REPLY) == reply(3, b"a")


@pytest.mark.asyncio
async def test_small_message_over_a_small_limit_is_refused(handler: Acting) -> None:
    async with listening(handler, message=10) as listener, greeted(listener.address) as peer:
        peer.write(request(1, body=bytes(11)), request(2, body=bytes(10)))
        assert (await peer.read()).error == "TooLarge"
        assert await peer.read() == reply(2, bytes(10))
        peer.write(opened(3, "Take.All"), data(3, bytes(11)))
        assert (await peer.until(ERROR)).error == "TooLarge"
        peer.write(request(4, body=bytes(PIECE), more=True))
        assert (await peer.until(ERROR)).stream == 4


@pytest.mark.asyncio
async def test_reply_over_the_limit_of_the_client_is_an_error(listener: Listener) -> None:
    async with greeted(listener.address, message=1000) as peer:
        for number, size in ((1, 1001), (2, 2 * PIECE)):
            peer.write(request(number, f"Large.{size}"))
            assert (await peer.read()).error == "TooLarge"
        peer.write(request(3, "Large.1000"))
        assert (await peer.read()).body == b"x" * 1000


@pytest.mark.asyncio
async def test_head_over_the_limit_is_refused(handler: Acting) -> None:
    async with listening(handler, headers=600) as listener, greeted(listener.address) as peer:
        for number, kind in ((1, REQUEST), (2, OPEN)):
            head = named("Echo.Call", {"a": "b" * 600})
            peer.write(Frame(kind, JSON | METADATA, number, 0, head))
            answer = await peer.read()
            assert answer[:4] == (ERROR, 0, number, 8 | 1 << 31)
            assert answer.error == "TooLarge"
        head = named("Echo.Call", {"a": "b" * 500})
        peer.write(Frame(REQUEST, JSON | METADATA, 3, 0, head))
        assert (await peer.read()).kind == REPLY
    assert len(handler.calls) == 1


@pytest.mark.asyncio
async def test_fields_over_the_limit_are_refused(handler: Acting) -> None:
    async with listening(handler, fields=3) as listener, greeted(listener.address) as peer:
        for number, count in ((1, 4), (2, 3)):
            head = named("Echo.Call", {f"n{one}": "" for one in range(count)})
            peer.write(Frame(REQUEST, JSON | METADATA, number, 0, head))
        assert (await peer.read()).kind == ERROR
        assert (await peer.read()).kind == REPLY


@pytest.mark.asyncio
async def test_metadata_of_a_reply_over_the_limit_of_the_client_is_an_error(
    listener: Listener,
) -> None:
    async with greeted(listener.address, headers=600) as peer:
        head = named("Echo.Call", {"a": "b" * 800})
        peer.write(Frame(REQUEST, JSON | METADATA, 1, 0, head))
        assert (await peer.read()).kind == ERROR


@pytest.mark.asyncio
async def test_calls_over_the_limit_are_refused(handler: Acting) -> None:
    async with listening(handler, calls=2) as listener, greeted(listener.address) as peer:
        peer.write(*(request(number, "Wait.Call") for number in (1, 2, 3)))
        answer = await peer.read()
        assert answer[:4] == (ERROR, 0, 3, 8 | 1 << 31)
        assert answer.error == "ResourceExhausted"
        handler.release.set()
        assert {(await peer.read()).stream, (await peer.read()).stream} == {1, 2}
        peer.write(request(4))
        assert await peer.read() == reply(4)
    assert len(handler.calls) == 3


@pytest.mark.asyncio
async def test_cancelled_call_makes_room_for_another(handler: Acting) -> None:
    async with listening(handler, calls=1) as listener, greeted(listener.address) as peer:
        peer.write(request(1, "Wait.Call"))
        await eventually(lambda: handler.running)
        peer.write(cancel(1), request(2, body=b"a"))
        assert await peer.read() == reply(2, b"a")


@pytest.mark.asyncio
async def test_cancelled_calls_that_go_on_are_counted() -> None:
    """A flood of calls, each cancelled at once, makes no flood of handlers."""
    running = 0

    async def stubborn(call: Call, body: Body) -> Reply:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(SOON)
        finally:
            await asyncio.sleep(0.2)
            running -= 1
        return Reply(body=b"")

    async with listening(stubborn, calls=5) as listener, greeted(listener.address) as peer:
        for number in range(1, 101):
            await peer.send(request(number), cancel(number))
            await asyncio.sleep(0.001)
        peer.write(Frame(PING))
        await peer.until(PONG)
        assert running <= 2 * 5
        await eventually(lambda: not running)


@pytest.mark.asyncio
async def test_streams_over_the_limit_are_refused(handler: Acting) -> None:
    async with listening(handler, streams=2) as listener, greeted(listener.address) as peer:
        peer.write(*(opened(number) for number in (1, 2, 3)))
        answer = await peer.until(ERROR)
        assert answer[:4] == (ERROR, 0, 3, 8 | 1 << 31)
        peer.write(end(1))
        assert (await peer.until(END)).stream == 1
        peer.write(opened(4), data(4, b"a"))
        assert (await peer.until(DATA)) == data(4, b"a")


@pytest.mark.asyncio
async def test_streams_take_no_room_of_calls(handler: Acting) -> None:
    async with (
        listening(handler, calls=1, streams=1) as listener,
        greeted(listener.address) as peer,
    ):
        peer.write(opened(1))
        await peer.until(REPLY)
        peer.write(request(2, body=b"a"))
        assert await peer.read() == reply(2, b"a")


@pytest.mark.asyncio
async def test_unfinished_messages_are_bounded_in_memory(handler: Acting) -> None:
    """Of 200 MiB that are begun and not ended, no more is kept than 16 of the largest messages."""
    async with listening(handler, message=MIB) as listener, greeted(listener.address) as peer:
        gc.collect()
        tracemalloc.start()
        try:
            for number in range(1, 201):
                said = pieces(request, number, bytes(MIB))[:-1]
                await peer.send(*said)
            peer.write(Frame(PING))
            refused = []
            while (frame := await peer.read()).kind != PONG:
                refused.append(frame)
            assert tracemalloc.get_traced_memory()[0] < 18 * MIB
        finally:
            tracemalloc.stop()
        assert {(frame.kind, frame.error) for frame in refused} == {(ERROR, "ResourceExhausted")}
        assert len(refused) == 200 - 16
        assert all(frame.aux & 1 << 31 for frame in refused)
        peer.write(*(cancel(number) for number in range(1, 201)))
        peer.write(*pieces(request, 201, bytes(MIB)))
        assert (await peer.message())[1] == bytes(MIB)


# -- what is not of this protocol -----------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "text"),
    [
        (Frame(0), "kind 0"),
        (Frame(13), "kind 13"),
        (Frame(255), "kind 255"),
        (reply(1), "kind 3"),
        (Frame(ERROR, stream=1), "kind 4"),
        (request(1)._replace(flags=RAW | 8), "flag"),
        (request(1)._replace(flags=RAW | 64), "flag"),
        (request(1)._replace(flags=RAW | 128), "flag"),
        (request(1, body=bytes(PIECE + 1)), "length"),
        (b"\xff\xff\xff\xff" + request(1).encode()[4:], "length"),
        (b"\x00\x00\x00\x02" + request(1).encode()[4:], "length"),
        (request(1, body=b"short", more=True), "piece"),
        (Frame(PING, MORE), "pieces"),
        (Frame(PING, MORE, body=bytes(PIECE)), "pieces"),
        (opened(1)._replace(flags=RAW | MORE, body=bytes(PIECE)), "pieces"),
        (data(1)._replace(aux=2), "two"),
        (end(1)._replace(aux=2), "two"),
        (cancel(1)._replace(aux=2), "two"),
    ],
)
async def test_what_nobody_may_say_ends_the_connection(
    peer: Peer, handler: Acting, said: Frame | bytes, text: str
) -> None:
    peer.write(request(1, body=b"before"), request(2, "Wait.Call"))
    assert await peer.read() == reply(1, b"before")
    peer.write(said)
    await is_closed_after_goaway(peer, text)
    await eventually(lambda: not handler.running)
    assert handler.cancelled == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [0, 1, 2, 4, 2**32 - 1])
@pytest.mark.parametrize("kind", [REQUEST, OPEN, REQUEST | MORE << 8])
async def test_numbers_rise_one_by_one(peer: Peer, number: int, kind: int) -> None:
    peer.write(request(1), request(2, "Wait.Call"))
    assert await peer.read() == reply(1)
    body = bytes(PIECE) if kind > 255 else b""
    peer.write(Frame(kind & 255, RAW | kind >> 8, number, 0, named("Echo.Call"), body))
    await is_closed_after_goaway(peer, "number")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "said",
    [data(9), data(9, bytes(PIECE), more=True), end(9), cancel(9), credit(9, 5)],
    ids=lambda frame: f"kind {frame.kind} {frame.flags}",
)
async def test_what_is_said_of_no_stream_is_ignored(peer: Peer, said: Frame) -> None:
    """It may have ended while that was on its way."""
    peer.write(said, request(1))
    assert await peer.read() == reply(1)


@pytest.mark.asyncio
async def test_ping_is_answered_with_its_number(peer: Peer) -> None:
    peer.write(Frame(PING, aux=77), Frame(PONG, aux=5), Frame(GOAWAY), request(1))
    assert await peer.read() == Frame(PONG, aux=77)
    assert await peer.read() == reply(1)


@pytest.mark.asyncio
async def test_truncated_frame_and_end_of_file_end_the_connection(
    peer: Peer, handler: Acting
) -> None:
    peer.write(request(1, "Wait.Call"), request(2).encode()[:20])
    await eventually(lambda: handler.running)
    peer.writer.write_eof()
    assert await peer.rest() == []
    await eventually(lambda: handler.cancelled)


# -- cancellation ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_cancel_reaches_the_handler_and_is_not_answered(peer: Peer, handler: Acting) -> None:
    peer.write(request(1, "Wait.Call"), opened(2))
    await eventually(lambda: handler.running == 2)
    assert (await peer.read())[:3] == (REPLY, 0, 2)
    peer.write(cancel(1), cancel(2), cancel(1), cancel(2))
    await eventually(lambda: handler.cancelled == 2)
    peer.write(request(3))
    assert await peer.read() == reply(3)


@pytest.mark.asyncio
async def test_cancel_in_the_middle_of_a_message(peer: Peer, handler: Acting) -> None:
    first, *rest = pieces(request, 1, bytes(3 * PIECE))
    peer.write(first, cancel(1), *rest, request(2, body=b"a"))
    assert await peer.read() == reply(2, b"a")
    assert handler.bodies == [b"a"]


@pytest.mark.asyncio
async def test_cancel_in_the_middle_of_a_reply(handler: Acting) -> None:
    async with (
        listening(handler, message=64 * MIB) as listener,
        greeted(listener.address, message=64 * MIB) as peer,
    ):
        peer.write(request(1, f"Large.{64 * MIB}"))
        assert (await peer.read()).stream == 1
        peer.write(cancel(1), request(2))
        got = 0
        while (frame := await peer.read()).stream == 1:
            got += len(frame.body)
        assert frame == reply(2)
        assert got < 32 * MIB
        peer.write(request(3))
        assert await peer.read() == reply(3)


@pytest.mark.asyncio
@pytest.mark.parametrize("lose", [False, True], ids=["cancelled twice", "cancelled and lost"])
async def test_clean_up_of_a_cancelled_handler_is_not_cancelled(lose: bool) -> None:
    steps: list[str] = []

    async def careful(call: Call, body: Body) -> Reply:
        steps.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("cancelled")
            await asyncio.sleep(0.1)
            steps.append("cleaned up")
        raise AssertionError

    async with listening(careful) as listener:
        async with greeted(listener.address) as peer:
            peer.write(request(1))
            await eventually(lambda: steps == ["begun"])
            peer.write(cancel(1))
            await eventually(lambda: "cancelled" in steps)
            if not lose:
                peer.write(cancel(1))
                await eventually(lambda: "cleaned up" in steps)
        await eventually(lambda: steps == ["begun", "cancelled", "cleaned up"])


@pytest.mark.asyncio
async def test_clean_up_of_a_handler_is_not_cancelled_as_its_port_closes() -> None:
    steps: list[str] = []

    async def careful(call: Call, body: Body) -> Reply:
        try:
            steps.append("begun")
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)
            steps.append("cleaned up")
        raise AssertionError

    async with listening(careful) as listener, greeted(listener.address) as peer:
        peer.write(request(1))
        await eventually(lambda: steps)
        await listener.aclose()
        assert steps == ["begun", "cleaned up"]


# -- streams --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_stream_from_open_to_end(peer: Peer, handler: Acting) -> None:
    head = named("Echo.Call", {"a": "b"})
    peer.write(Frame(OPEN, JSON | METADATA, 1, 0, head), data(1, b"x"), data(1), end(1))
    first = await peer.read()
    assert first[:4] == (REPLY, METADATA, 1, 1)
    assert msgspec.msgpack.decode(first.head) == {"a": "b"}
    assert first.body == b""
    assert [await peer.read(), await peer.read()] == [data(1, b"x"), data(1)]
    last = await peer.read()
    assert last[:4] == (END, METADATA, 1, 1)
    assert msgspec.msgpack.decode(last.head) == {"last": "word"}
    assert handler.calls[0].kind == "bidi"


@pytest.mark.asyncio
async def test_stream_that_fails_says_so_after_its_messages(peer: Peer) -> None:
    peer.write(opened(1, "Fail.Call"), data(1, b"x"))
    assert [(await peer.read()).kind for _ in range(3)] == [REPLY, DATA, ERROR]


@pytest.mark.asyncio
async def test_deadline_of_a_stream_is_kept(peer: Peer, handler: Acting) -> None:
    began = time.monotonic()
    peer.write(opened(1, "Hold.All", ms=200))
    answer = await peer.until(ERROR)
    assert 0.2 <= time.monotonic() - began < 0.2 + SLACK
    assert answer.error == "DeadlineExceeded"
    await eventually(lambda: handler.cancelled)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1000, PIECE, PIECE + 1, MIB], ids=str)
async def test_server_sends_no_more_than_it_has_credit_for(peer: Peer, size: int) -> None:
    """And goes on as soon as it has more."""
    peer.write(opened(1, f"Pour.{size}"))
    cost, given = 0, 256 * KIB
    assert (await peer.read()).kind == REPLY
    for _ in range(3):
        while cost + PIECE + 16 <= given or (size <= PIECE and cost + size + 16 <= given):
            cost += 16 + len((await peer.read()).body)
        peer.write(Frame(PING))
        while (frame := await peer.read()).kind != PONG:
            cost += 16 + len(frame.body)
        assert cost <= given
        peer.write(credit(1, 100 * KIB))
        given += 100 * KIB


@pytest.mark.asyncio
async def test_credit_comes_back_as_it_is_read(peer: Peer, handler: Acting) -> None:
    peer.write(opened(1, "Take.All"))
    for _ in range(3):
        peer.write(data(1, bytes(PIECE)), data(1, bytes(PIECE)))
        assert await peer.until(CREDIT) == Frame(CREDIT, 0, 1, 2 * (PIECE + 16))
    assert handler.read == []


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1000, PIECE, MIB], ids=str)
async def test_who_overruns_its_credit_is_cut_off(peer: Peer, handler: Acting, size: int) -> None:
    """With pieces of one message, credit comes back; not beyond the message."""
    peer.write(opened(1, "Hold.All"))
    assert (await peer.read()).kind == REPLY
    for _ in range(20_000 if size < 16 else 400):
        if size > PIECE:
            cuts = range(0, size, PIECE)
            for at in cuts:
                peer.write(data(1, bytes(PIECE), more=at != cuts[-1]))
        else:
            peer.write(data(1, bytes(size)))
    rest = await peer.rest()
    given = sum(frame.aux for frame in rest if frame.kind == CREDIT)
    assert given <= max(0, size)
    assert rest[-1].kind == GOAWAY
    assert "credit" in rest[-1].text


@pytest.mark.asyncio
async def test_no_way_to_cut_a_message_gives_more_credit_than_it_cost(peer: Peer) -> None:
    peer.write(opened(1, "Take.All"))
    assert (await peer.read()).kind == REPLY
    cost = 0
    for _ in range(20):
        peer.write(data(1, bytes(PIECE), more=True), data(1))
        cost += PIECE + 32
    peer.write(Frame(PING))
    given = 0
    kinds: list[int] = []
    while not kinds or kinds[-1] not in (PONG, GOAWAY):
        frame = await peer.read()
        kinds.append(frame.kind)
        given += frame.aux if frame.kind == CREDIT else 0
    assert given <= cost


@pytest.mark.asyncio
async def test_more_credit_than_can_be_ends_the_connection(peer: Peer) -> None:
    peer.write(opened(1), Frame(CREDIT, 0, 1, 2**31 - 1))
    await is_closed_after_goaway(peer, "credit")


@pytest.mark.asyncio
async def test_message_over_the_limit_resets_its_stream_alone(handler: Acting) -> None:
    async with listening(handler, message=PIECE) as listener, greeted(listener.address) as peer:
        peer.write(opened(1, "Take.All"), opened(2))
        await eventually(lambda: handler.running == 2)
        peer.write(data(1, bytes(PIECE), more=True), data(1, b"x"), data(1), end(1))
        answer = await peer.until(ERROR)
        assert (answer.stream, answer.error) == (1, "TooLarge")
        peer.write(data(2, b"a"))
        assert await peer.until(DATA) == data(2, b"a")
        await eventually(lambda: handler.cancelled)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1000, MIB], ids=str)
async def test_what_is_not_read_is_bounded_in_memory(
    peer: Peer, handler: Acting, size: int
) -> None:
    """A peer that keeps to its credit can make a server keep a window and one message."""
    peer.write(opened(1, "Hold.All"))
    assert (await peer.read()).kind == REPLY
    gc.collect()
    tracemalloc.start()
    try:
        left, sent = 256 * KIB, 0
        while sent < 8 * MIB:
            most = min(size, PIECE)
            while left < most + 16:
                try:
                    async with asyncio.timeout(0.3):
                        left += (await peer.until(CREDIT)).aux
                except TimeoutError:
                    break
            if left < most + 16:
                break
            sent += most
            left -= most + 16
            await peer.send(data(1, bytes(most), more=bool(sent % size) and size > PIECE))
        assert sent >= 200_000
        assert tracemalloc.get_traced_memory()[0] < size + 256 * KIB + 400 * KIB
    finally:
        tracemalloc.stop()
    handler.release.set()
    peer.write(end(1))
    await peer.until(END)


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_idle_connection_is_closed_with_goaway(handler: Acting) -> None:
    async with listening(handler, idle=0.3) as listener, greeted(listener.address) as peer:
        peer.write(request(1))
        assert await peer.read() == reply(1)
        began = time.monotonic()
        assert await peer.rest() == [Frame(GOAWAY, aux=1)]
        assert 0.3 <= time.monotonic() - began < 2 * 0.3 + 3 * 0.5 + SLACK


@pytest.mark.asyncio
async def test_connection_with_a_call_is_not_idle(
    handler: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tcp_server, "_SILENCE", 0.1)
    async with listening(handler, idle=0.2) as listener, greeted(listener.address) as peer:
        peer.write(request(1, "Wait.Call"))
        assert (await peer.read()).kind == PING
        peer.write(Frame(PONG))
        assert (await peer.read()).kind == PING
        handler.release.set()
        assert await peer.until(REPLY) == reply(1)


@pytest.mark.asyncio
async def test_silent_client_with_a_call_is_asked_and_given_up(
    handler: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_LOOK", 0.1), ("_SILENCE", 0.2), ("_GIVE_UP", 0.4)):
        monkeypatch.setattr(_tcp_server, name, seconds)
    async with listening(handler) as listener, greeted(listener.address) as peer:
        peer.write(request(1, "Wait.Call"))
        rest = await peer.rest()
        assert rest
        assert set(rest) == {Frame(PING)}
        await eventually(lambda: handler.cancelled)


@pytest.mark.asyncio
@pytest.mark.parametrize("slow", ["piece", "frame", "header"])
async def test_message_that_takes_too_long_ends_the_connection(handler: Acting, slow: str) -> None:
    said = b"".join(frame.encode() for frame in pieces(request, 1, bytes(2 * PIECE)))
    begin = {"piece": PIECE + 50, "frame": 50, "header": 5}[slow]
    async with listening(handler, body_timeout=0.4) as listener:
        async with greeted(listener.address) as peer, greeted(listener.address) as other:
            began = time.monotonic()
            peer.write(said[:begin])
            ending = asyncio.create_task(peer.rest())
            for byte in said[begin:]:
                if ending.done():
                    break
                peer.write(bytes([byte]))
                await asyncio.sleep(0.02)
            rest = await ending
            assert 0.4 <= time.monotonic() - began < 0.4 + 3 * 0.5 + SLACK
            assert [frame.error for frame in rest] == ["DeadlineExceeded"]
            other.write(request(1))
            assert await other.read() == reply(1)
    assert len(handler.calls) == 1


@pytest.mark.asyncio
async def test_who_is_hung_up_on_and_does_not_read_is_let_go(
    handler: Acting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left to send to it keeps no connection and no handler."""
    monkeypatch.setattr(_tcp_server, "_LOOK", 0.3)
    async with listening(handler) as listener, greeted(listener.address) as peer:
        peer.write(opened(1, "Pour.60000"), credit(1, 2**30))
        await is_full(handler)
        peer.write(Frame(99))
        await eventually(lambda: not handler.running)
        began = time.monotonic()
        await listener.drain(SOON)
        assert time.monotonic() - began < SLACK


@pytest.mark.asyncio
async def test_stream_on_a_connection_that_closes_does_not_spin(
    handler: Acting,
) -> None:
    """A handler that goes on while its peer reads nothing leaves others their turn."""
    async with (
        listening(handler, body_timeout=0.2) as listener,
        greeted(listener.address) as peer,
        greeted(listener.address) as other,
    ):
        peer.write(opened(1, "Drip.1000"), credit(1, 2**30), opened(2, "Pour.60000"))
        peer.write(credit(2, 2**30), request(3, body=bytes(PIECE), more=True))
        await is_full(handler)
        for number in range(1, 100):
            other.write(request(number))
            assert await other.read() == reply(number)
            await asyncio.sleep(0.02)
        assert not handler.running


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_drain_tells_the_last_call_and_lets_it_end(
    peer: Peer, listener: Listener, handler: Acting
) -> None:
    peer.write(request(1), request(2, "Wait.Call"))
    assert await peer.read() == reply(1)
    await eventually(lambda: handler.running)
    draining = asyncio.create_task(listener.drain(SOON))
    assert await peer.read() == Frame(GOAWAY, aux=2)
    peer.write(request(3), opened(4))
    for number in (3, 4):
        answer = await peer.read()
        assert answer[:4] == (ERROR, 0, number, Unavailable.code | 1 << 31)
    handler.release.set()
    assert await peer.rest() == [reply(2)]
    await draining
    assert len(handler.calls) == 2


@pytest.mark.asyncio
async def test_drain_lets_a_message_in_pieces_come_to_its_end(
    peer: Peer, listener: Listener
) -> None:
    first, *rest = pieces(request, 1, bytes(3 * PIECE))
    peer.write(first, Frame(PING))
    assert (await peer.read()).kind == PONG
    draining = asyncio.create_task(listener.drain(SOON))
    assert await peer.read() == Frame(GOAWAY, aux=1)
    peer.write(*rest)
    assert (await peer.message())[1] == bytes(3 * PIECE)
    assert await peer.rest() == []
    await draining


@pytest.mark.asyncio
async def test_drain_closes_who_has_no_call(peer: Peer, listener: Listener) -> None:
    began = time.monotonic()
    await listener.drain(SOON)
    assert time.monotonic() - began < SLACK
    assert await peer.rest() == [Frame(GOAWAY)]


@pytest.mark.asyncio
async def test_idle_connection_costs_little_memory(listener: Listener, handler: Acting) -> None:
    """What the session itself holds; asyncio and the kernel have their own."""
    async with asyncio.TaskGroup() as tasks:
        done = asyncio.Event()
        ready = 0

        async def idle() -> None:
            nonlocal ready
            async with greeted(listener.address) as peer:
                peer.write(request(1))
                await peer.read()
                ready += 1
                await done.wait()

        tasks.create_task(idle())
        await eventually(lambda: ready == 1)
        tracemalloc.start()
        for _ in range(50):
            tasks.create_task(idle())
        await eventually(lambda: ready == 51)
        gc.collect()
        files = ("_tcp_server.py", "_tcp_link.py", "micro/port.py")
        filters = [tracemalloc.Filter(True, f"*{name}") for name in files]
        taken = tracemalloc.take_snapshot().filter_traces(filters)
        tracemalloc.stop()
        done.set()
    assert sum(one.size for one in taken.statistics("filename")) / 50 < 2 * KIB
