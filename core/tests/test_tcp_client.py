"""The native client, answered byte by byte."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from micro.backends import _tcp_client
from micro.backends._tcp_channel import TCPChannel
from micro.call import Call, Reply, encode_error
from micro.errors import (
    Closed,
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    MicroError,
    NotFound,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from micro.testing import eventually
from micro.transport import Channel

from .native import (
    CANCEL,
    CREDIT,
    DATA,
    END,
    ERROR,
    GOAWAY,
    HELLO,
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
    Frame,
    Peer,
    acting,
    cancel,
    credit,
    data,
    dialled,
    end,
    hello,
    named,
    pieces,
    reply,
)

SLACK = 2.0


def new_call(endpoint: str = "Echo.Call", **fields: Any) -> Call:
    fields.setdefault("content_type", "application/octet-stream")
    return Call(service="suite", endpoint=endpoint, **fields)


def new_stream(**fields: Any) -> Call:
    return new_call(kind="bidi", **fields)


async def nothing(peer: Peer) -> None:
    """Say nothing."""


async def echo(peer: Peer) -> None:
    """Answer each call with its body."""
    while True:
        frame = await peer.read()
        if frame.kind == REQUEST:
            peer.write(reply(frame.stream, frame.body))


def failed(stream: int, error: MicroError, *, executed: bool = True) -> Frame:
    aux = error.code | (0 if executed else 1 << 31)
    return Frame(ERROR, 0, stream, aux, body=encode_error(error, id="far").encode())


async def said(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


async def endless(*messages: bytes) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
    await asyncio.Event().wait()


def messages(reply: Reply) -> AsyncIterator[bytes]:
    assert not isinstance(reply.body, bytes)
    return reply.body


async def heard(channel: Channel, call: Call, body: AsyncIterator[bytes]) -> list[bytes]:
    async with channel.stream(call, body) as reply:
        return [message async for message in messages(reply)]


# -- how a connection begins ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_client_speaks_first_and_waits_for_the_settings() -> None:
    began = asyncio.Event()

    async def script(peer: Peer) -> None:
        assert await peer.exactly(8) == PREFACE
        greeting = await peer.read()
        assert greeting._replace(body=b"") == Frame(HELLO)
        assert msgspec.msgpack.decode(greeting.body) == {
            "message": 1_000_000,
            "headers": 999,
            "calls": 1024,
            "streams": 100,
            "window": 256 * KIB,
        }
        began.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                raise AssertionError(await peer.exactly(1))
        peer.write(hello())
        assert await peer.read() == Frame(REQUEST, RAW, 1, 0, named("Echo.Call"), b"a")
        peer.write(reply(1, b"b"))

    async with (
        acting(script, greets=False) as address,
        dialled(address, message=1_000_000, headers=999) as channel,
    ):
        assert (await channel.call(new_call(), b"a")).body == b"b"
    assert began.is_set()


@pytest.mark.asyncio
async def test_beginning_of_the_server_may_come_byte_by_byte() -> None:
    async def script(peer: Peer) -> None:
        for byte in hello().encode():
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        await peer.exactly(8)
        await peer.read()
        frame = await peer.read()
        for byte in reply(frame.stream, b"b").encode():
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)

    async with acting(script, greets=False) as address, dialled(address) as channel:
        assert (await channel.call(new_call(), b"a")).body == b"b"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"-ERR unknown command\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46" * 5,
        b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x00",
        bytes(100),
        b"\xff" * 100,
        Frame(HELLO, body=b"nonsense").encode(),
        Frame(HELLO, body=b"\x81\xa1x" + b"\x91" * 60_000).encode(),
        hello(calls=0).encode(),
        reply(1, b"too early").encode() + Frame(77).encode(),
        b"",
    ],
    ids=[
        "http",
        "ssh",
        "redis",
        "tls",
        "http2",
        "zeros",
        "ones",
        "map",
        "deep",
        "no calls",
        "77",
        "end",
    ],
)
async def test_other_server_at_the_address_is_told_quickly(answer: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.exactly(8)
        await peer.send(answer)
        peer.writer.write_eof()

    text = "it speaks TLS" if answer[:2] == b"\x15\x03" else "does not speak the native protocol"
    async with acting(script, greets=False) as address, dialled(address) as channel:
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(Unavailable, match=text) as caught:
                await channel.call(new_call(), b"")
            assert caught.value.sent is False
            assert address in caught.value.detail
        assert time.monotonic() - began < SLACK


@pytest.mark.asyncio
async def test_server_that_says_nothing_is_given_up() -> None:
    async with (
        acting(nothing, greets=False) as address,
        dialled(address, timeout=0.2) as channel,
    ):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"no answer in 0\.2 s") as caught:
            await channel.call(new_call(), b"")
        assert 0.2 <= time.monotonic() - began < 0.2 + SLACK
        assert caught.value.sent is False


@pytest.mark.asyncio
async def test_why_a_server_does_not_go_on_is_told() -> None:
    async def script(peer: Peer) -> None:
        told = encode_error(DataLoss("your HELLO is odd"), id="").encode()
        peer.write(Frame(GOAWAY, body=told))
        peer.writer.write_eof()

    async with acting(script, greets=False) as address, dialled(address) as channel:
        with pytest.raises(DataLoss, match="your HELLO is odd") as caught:
            await channel.call(new_call(), b"")
        assert caught.value.sent is False


@pytest.mark.asyncio
async def test_server_that_greets_and_goes_at_once_is_unavailable() -> None:
    async def script(peer: Peer) -> None:
        await peer.exactly(8)
        peer.write(hello().encode() + Frame(GOAWAY).encode())

    async with acting(script, greets=False) as address, dialled(address) as channel:
        for _ in range(3):
            async with asyncio.timeout(SLACK):
                with pytest.raises(Unavailable) as caught:
                    await channel.call(new_call(), b"")
            assert caught.value.sent is False
            with pytest.raises(Unavailable):
                await heard(channel, new_stream(), said())


@pytest.mark.asyncio
async def test_calls_that_come_together_share_one_connection() -> None:
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await echo(peer)

    async with acting(script) as address, dialled(address) as channel:
        bodies = [b"%d" % number for number in range(50)]
        replies = await asyncio.gather(*(channel.call(new_call(), body) for body in bodies))
        assert [reply.body for reply in replies] == bodies
    assert connections == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "host",
    ["a" * 64 + ".example", "..", "nobody\0", "nöbody." * 60],
    ids=["label", "dots", "nul", "long"],
)
async def test_host_that_cannot_be_a_name_is_unavailable(host: str) -> None:
    async with dialled(f"{host}:1") as channel:
        with pytest.raises(Unavailable) as caught:
            await channel.call(new_call(), b"")
        assert caught.value.sent is False


@pytest.mark.asyncio
async def test_unix_path_where_nobody_listens_is_unavailable() -> None:
    for path in ("/nowhere/at/all", "/" + "long" * 50, "/nul\0"):
        async with dialled(f"unix:{path}") as channel:
            with pytest.raises(Unavailable) as caught:
                await channel.call(new_call(), b"")
            assert caught.value.sent is False


# -- calls ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "size", [0, 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 1, 4 * MIB], ids=str
)
async def test_request_is_cut_where_it_has_to_be(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)

    async def script(peer: Peer) -> None:
        got = [await peer.read()]
        while got[-1].flags & MORE:
            got.append(await peer.read())
        first, *rest = got
        assert (first.kind, first.flags & ~MORE, first.stream) == (REQUEST, RAW, 1)
        assert first.head == named("Echo.Call")
        assert all((one.kind, one.stream, one.aux) == (DATA, 1, 1) for one in rest)
        assert all(len(one.body) == PIECE for one in got[:-1])
        assert b"".join(one.body for one in got) == body
        peer.write(*(pieces(reply, 1, body) if size > PIECE else [reply(1, body)]))

    async with acting(script) as address, dialled(address) as channel:
        assert (await channel.call(new_call(), body)).body == body


@pytest.mark.asyncio
async def test_head_names_what_has_no_number() -> None:
    async def script(peer: Peer) -> None:
        frame = await peer.read()
        assert frame[:2] == (REQUEST, METADATA)
        packed = msgspec.msgpack.encode({"a": "ü"})
        assert frame.head == named("Echo.Call") + b"\x08text/xml" + packed
        packed = msgspec.msgpack.encode({"b": "c"})
        peer.write(Frame(REPLY, METADATA, 1, 1, packed, b"!"))

    async with acting(script) as address, dialled(address) as channel:
        call = new_call(content_type="text/xml", metadata={"A": "ü"})
        answer = await channel.call(call, b"")
        assert (answer.body, answer.metadata) == (b"!", {"b": "c"})


@pytest.mark.asyncio
async def test_time_that_is_left_travels_in_milliseconds() -> None:
    got: list[int] = []

    async def script(peer: Peer) -> None:
        while True:
            frame = await peer.read()
            got.append(frame.aux)
            peer.write(reply(frame.stream))

    async with acting(script) as address, dialled(address) as channel:
        for left in (None, 2.0, 1e6, -5.0):
            deadline = None if left is None else time.monotonic() + left
            await channel.call(new_call(deadline=deadline), b"")
    assert (got[0], got[2], got[3]) == (0, 300_000, 1)
    assert 1 < got[1] <= 2001


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("endpoint", "content_type"),
    [("x" * 250, "a/b"), ("Echo.Call", "a" * 256), ("\ud800", "a/b"), ("Echo.Call", "ä/b")],
)
async def test_names_that_cannot_travel_are_refused(endpoint: str, content_type: str) -> None:
    async with acting(echo) as address, dialled(address) as channel:
        with pytest.raises(InvalidArgument):
            await channel.call(new_call(endpoint, content_type=content_type), b"")
        with pytest.raises(InvalidArgument):
            await heard(channel, new_call(endpoint, content_type=content_type), said())
        assert (await channel.call(new_call(), b"a")).body == b"a"


@pytest.mark.asyncio
@pytest.mark.parametrize("executed", [True, False])
async def test_error_is_what_the_server_raised(executed: bool) -> None:
    async def script(peer: Peer) -> None:
        while True:
            frame = await peer.read()
            peer.write(failed(frame.stream, NotFound("no such thing"), executed=executed))

    async with acting(script) as address, dialled(address) as channel:
        for attempt in (channel.call(new_call(), b""), heard(channel, new_stream(), endless())):
            with pytest.raises(NotFound, match="no such thing") as caught:
                await attempt
            assert caught.value.id == "far"
            assert caught.value.remote
            assert caught.value.sent is (None if executed else False)


@pytest.mark.asyncio
@pytest.mark.parametrize("body", [b"", b"plain text", b"\xff\xfe", b'{"code":404}', b"[" * 50_000])
async def test_error_with_another_body_is_an_error_all_the_same(body: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        peer.write(Frame(ERROR, 0, 1, 2, body=body))

    async with acting(script) as address, dialled(address) as channel:
        with pytest.raises(MicroError) as caught:
            await channel.call(new_call(), b"")
        assert caught.value.remote


@pytest.mark.asyncio
async def test_replies_come_in_any_order() -> None:
    async def script(peer: Peer) -> None:
        got = [await peer.read() for _ in range(20)]
        assert [frame.stream for frame in got] == list(range(1, 21))
        for frame in reversed(got):
            peer.write(reply(frame.stream, frame.body))

    async with acting(script) as address, dialled(address) as channel:
        bodies = [b"%d" % number for number in range(20)]
        replies = await asyncio.gather(*(channel.call(new_call(), body) for body in bodies))
        assert [reply.body for reply in replies] == bodies


@pytest.mark.asyncio
async def test_small_request_and_reply_overtake_large_ones() -> None:
    """The server reads the small one before it has all of the large one."""
    seen: list[int] = []

    async def script(peer: Peer) -> None:
        large = 0
        while True:
            frame = await peer.read()
            if frame.stream == 1:
                large += len(frame.body)
                await asyncio.sleep(0)
                if not frame.flags & MORE:
                    first, *rest = pieces(reply, 1, bytes(PIECE + 1))
                    peer.write(first, reply(9), *rest)
            else:
                seen.append(large)
                peer.write(reply(frame.stream, frame.body))

    async with (
        acting(script, message=64 * MIB) as address,
        dialled(address, message=64 * MIB) as channel,
    ):
        large = asyncio.create_task(channel.call(new_call(), bytes(64 * MIB)))
        await asyncio.sleep(0)
        assert (await channel.call(new_call(), b"a")).body == b"a"
        stream = asyncio.create_task(heard(channel, new_stream(), endless(b"beside")))
        assert (await large).body == bytes(PIECE + 1)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    assert seen[0] < 32 * MIB


@pytest.mark.asyncio
async def test_no_more_than_16_messages_are_in_pieces_at_once() -> None:
    """So a server that takes no more refuses nobody."""
    begun: set[int] = set()
    most = 0

    async def script(peer: Peer) -> None:
        nonlocal most
        while True:
            frame = await peer.read()
            if frame.flags & MORE:
                begun.add(frame.stream)
            else:
                begun.discard(frame.stream)
                peer.write(reply(frame.stream))
            most = max(most, len(begun))

    async with acting(script) as address, dialled(address) as channel:
        calls = [channel.call(new_call(), bytes(3 * MIB)) for _ in range(40)]
        await asyncio.gather(*calls)
    assert 1 < most <= 16


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_request_over_the_limit_of_the_server_is_not_sent() -> None:
    async with acting(echo, message=100_000) as address, dialled(address) as channel:
        with pytest.raises(TooLarge, match="100000") as caught:
            await channel.call(new_call(), bytes(100_001))
        assert caught.value.sent is False
    async with acting(echo, message=1000, headers=600) as address, dialled(address) as channel:
        with pytest.raises(TooLarge):
            await channel.call(new_call(), bytes(1001))
        with pytest.raises(TooLarge, match="600"):
            await channel.call(new_call(metadata={"a": "b" * 600}), b"")
        with pytest.raises(TooLarge):
            await heard(channel, new_stream(), said(bytes(1001)))
        assert (await channel.call(new_call(), bytes(1000))).body == bytes(1000)


@pytest.mark.asyncio
async def test_reply_over_our_limit_is_refused_as_it_comes() -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        for frame in pieces(reply, 1, bytes(MIB)):
            await peer.send(frame)
        assert await peer.read() == cancel(1)
        await peer.read()
        peer.write(reply(2, bytes(101)))
        await peer.until(REQUEST)
        peer.write(reply(3, bytes(100)))

    async with acting(script) as address:
        async with dialled(address, message=100) as channel:
            for _ in range(2):
                with pytest.raises(TooLarge) as caught:
                    await channel.call(new_call(), b"")
                assert caught.value.sent is None
            body = (await channel.call(new_call(), b"")).body
            assert isinstance(body, bytes)
            assert len(body) == 100


@pytest.mark.asyncio
async def test_reply_metadata_over_our_limits_is_refused() -> None:
    async def script(peer: Peer) -> None:
        for metadata in ({"a": "b" * 600}, {f"n{n}": "" for n in range(4)}, {"a": "b"}):
            frame = await peer.until(REQUEST)
            packed = msgspec.msgpack.encode(metadata)
            peer.write(Frame(REPLY, METADATA, frame.stream, frame.stream, packed))

    async with acting(script) as address, dialled(address, headers=600, fields=3) as channel:
        for _ in range(2):
            with pytest.raises(TooLarge):
                await channel.call(new_call(), b"")
        assert (await channel.call(new_call(), b"")).metadata == {"a": "b"}


@pytest.mark.asyncio
async def test_calls_wait_for_their_turn_in_order() -> None:
    got: list[bytes] = []
    go_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        running = 0
        while True:
            frame = await peer.read()
            running += 1
            assert running <= 2
            got.append(frame.body)
            if len(got) >= 2:
                await go_on.wait()
            peer.write(reply(frame.stream))
            running -= 1

    async with acting(script, calls=2) as address, dialled(address) as channel:
        bodies = [b"%d" % number for number in range(10)]
        tasks = [asyncio.create_task(channel.call(new_call(), body)) for body in bodies]
        await eventually(lambda: len(got) == 2)
        tasks[4].cancel()
        go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert got == [body for body in bodies if body != b"4"]


@pytest.mark.asyncio
async def test_who_waits_for_a_turn_is_not_overtaken_for_ever() -> None:
    """Of twice as many callers as the server takes, each gets its share."""
    shares = [0] * 8

    async def caller(channel: Channel, number: int) -> None:
        while True:
            await channel.call(new_call(), b"")
            shares[number] += 1

    async with acting(echo, calls=4) as address, dialled(address) as channel:
        tasks = [asyncio.create_task(caller(channel, number)) for number in range(8)]
        await eventually(lambda: max(shares) >= 100)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert min(shares) >= 50


@pytest.mark.asyncio
async def test_turn_of_a_cancelled_call_goes_to_the_next() -> None:
    """Also when it is cancelled in the moment in which its turn comes."""
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        frame = await peer.read()
        await release.wait()
        peer.write(reply(frame.stream))
        await echo(peer)

    async with acting(script, calls=1) as address, dialled(address) as channel:
        first = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        second, third = [asyncio.create_task(channel.call(new_call(), b"")) for _ in range(2)]
        await asyncio.sleep(0.05)
        first.add_done_callback(lambda _: second.cancel())
        release.set()
        async with asyncio.timeout(SLACK):
            await third
            await channel.call(new_call(), b"")
        assert second.cancelled() or second.done()


@pytest.mark.asyncio
async def test_turn_of_a_call_that_cannot_be_sent_goes_to_the_next() -> None:
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        frame = await peer.read()
        await release.wait()
        peer.write(reply(frame.stream))
        await echo(peer)

    async with acting(script, calls=1, headers=600) as address, dialled(address) as channel:
        first = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        too_large = asyncio.create_task(channel.call(new_call(metadata={"a": "b" * 600}), b""))
        third = asyncio.create_task(channel.call(new_call(), b"third"))
        await asyncio.sleep(0.05)
        release.set()
        await first
        with pytest.raises(TooLarge):
            await too_large
        async with asyncio.timeout(SLACK):
            assert (await third).body == b"third"


@pytest.mark.asyncio
async def test_streams_over_the_limit_of_the_server_are_not_opened() -> None:
    async with acting(nothing, streams=1) as address, dialled(address) as channel:
        async with channel.stream(new_stream(), endless()):
            with pytest.raises(ResourceExhausted) as caught:
                await heard(channel, new_stream(), said())
            assert caught.value.sent is False


# -- what no server may say -----------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        Frame(0),
        Frame(13),
        Frame(REQUEST, RAW, 1, 0, named("Echo.Call")),
        Frame(OPEN, RAW, 1, 0, named("Echo.Call")),
        hello(),
        reply(1)._replace(flags=8),
        reply(1)._replace(flags=64),
        reply(1)._replace(aux=2),
        data(1)._replace(aux=2),
        end(1)._replace(aux=2),
        reply(1, b"short", more=True),
        Frame(PING, MORE, body=bytes(PIECE)),
        Frame(ERROR, MORE, 1, 2, body=bytes(PIECE)),
        reply(1, bytes(PIECE + 1)),
        b"\xff\xff\xff\xff" + reply(1).encode()[4:],
        Frame(REPLY, METADATA, 1, 1, b"nonsense"),
        Frame(REPLY, METADATA, 1, 1),
        Frame(REPLY, METADATA, 1, 1, msgspec.msgpack.encode({"a b": "c"})),
        Frame(REPLY, METADATA, 1, 1, msgspec.msgpack.encode({"micro-id": "c"})),
        Frame(END, METADATA, 2, 2, b"nonsense"),
        [reply(1, bytes(PIECE), more=True), reply(1, bytes(PIECE), more=True)],
        [reply(1, bytes(PIECE), more=True), data(1)],
        [data(2, bytes(PIECE), more=True), data(2)],
        [credit(2, 2**31 - 1)],
    ],
    ids=lambda answer: f"{answer}"[:60],
)
async def test_what_is_not_of_the_protocol_is_data_loss(answer: Any) -> None:
    done = asyncio.Event()

    async def script(peer: Peer) -> None:
        if done.is_set():
            await echo(peer)
        while (await peer.read()).kind != OPEN:
            pass
        peer.write(*(answer if isinstance(answer, list) else [answer]))
        assert all(frame.kind in (CANCEL, CREDIT) for frame in await peer.rest())
        done.set()

    async with acting(script) as address, dialled(address) as channel:
        calling = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0)
        async with asyncio.timeout(SLACK):
            async with channel.stream(new_stream(), endless()) as opened:
                with pytest.raises(DataLoss) as caught:
                    async for _ in messages(opened):
                        pass
            assert address in caught.value.detail
            with pytest.raises(DataLoss):
                await calling
        await eventually(done.is_set)
        assert (await channel.call(new_call(), b"again")).body == b"again"


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1000, PIECE], ids=str)
async def test_server_that_overruns_its_credit_is_cut_off(size: int) -> None:
    done = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.read()
        peer.write(*[data(1, bytes(size))] * (256 * KIB // (size + 16) + 1))
        assert await peer.rest() == []
        done.set()

    async with acting(script) as address, dialled(address) as channel:
        async with channel.stream(new_stream(), endless()) as answer:
            await eventually(done.is_set)
            with pytest.raises(DataLoss, match="credit"):
                async for _ in messages(answer):
                    pass


@pytest.mark.asyncio
async def test_what_is_said_of_no_call_is_ignored() -> None:
    async def script(peer: Peer) -> None:
        frame = await peer.read()
        strange = [reply(9), reply(9, bytes(PIECE), more=True), data(9, b"x"), end(9), credit(9, 1)]
        peer.write(*strange, failed(9, NotFound("nobody")), Frame(PONG), reply(frame.stream, b"a"))

    async with acting(script) as address, dialled(address) as channel:
        assert (await channel.call(new_call(), b"")).body == b"a"


@pytest.mark.asyncio
async def test_pieces_for_nobody_are_not_kept() -> None:
    """As of a call that was cancelled while its reply was on its way."""

    async def script(peer: Peer) -> None:
        frame = await peer.read()
        for number in range(100, 140):
            for piece in pieces(reply, number, bytes(MIB))[:-1]:
                await peer.send(piece)
        peer.write(*pieces(reply, frame.stream, bytes(MIB)))

    async with acting(script) as address, dialled(address) as channel:
        gc.collect()
        tracemalloc.start()
        try:
            assert (await channel.call(new_call(), b"")).body == bytes(MIB)
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()


@pytest.mark.asyncio
async def test_flood_of_pings_of_a_server_that_does_not_read_costs_no_memory() -> None:
    async def script(peer: Peer) -> None:
        frame = await peer.read()
        pings = Frame(PING).encode() * 4000
        for _ in range(30):
            await peer.send(pings)
        peer.write(reply(frame.stream))

    async with acting(script, receives=128 * KIB) as address, dialled(address) as channel:
        gc.collect()
        tracemalloc.start()
        try:
            await channel.call(new_call(), b"")
            assert tracemalloc.get_traced_memory()[1] < 3 * MIB
        finally:
            tracemalloc.stop()


# -- keeping alive --------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tcp_client, "_LOOK", 0.1)


@pytest.mark.asyncio
async def test_ping_is_answered() -> None:
    async def script(peer: Peer) -> None:
        peer.write(Frame(PING, aux=7))
        frames = {(await peer.read()).kind: 0 for _ in range(2)}
        assert frames.keys() == {PONG, REQUEST}
        peer.write(reply(1))

    async with acting(script) as address, dialled(address) as channel:
        await channel.call(new_call(), b"")


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["call", "stream"])
async def test_silent_server_is_asked_and_given_up(hasty: None, kind: str) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.until(PING)
        asked.set()

    async with acting(script) as address, dialled(address) as channel:

        async def attempt() -> None:
            if kind == "call":
                await channel.call(new_call(), b"")
            else:
                await heard(channel, new_stream(), endless())

        began = time.monotonic()
        with pytest.raises(Unavailable, match="silent") as caught:
            await attempt()
        assert caught.value.sent is None
        assert time.monotonic() - began < SLACK
    assert asked.is_set()


@pytest.mark.asyncio
async def test_server_that_answers_pings_is_not_given_up(hasty: None) -> None:
    async def script(peer: Peer) -> None:
        frame = await peer.read()
        for _ in range(5):
            await peer.until(PING)
            peer.write(Frame(PONG))
        peer.write(reply(frame.stream, b"late"))

    async with acting(script) as address, dialled(address) as channel:
        assert (await channel.call(new_call(), b"")).body == b"late"


@pytest.mark.asyncio
async def test_connection_that_nobody_uses_is_closed(
    hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tcp_client, "_IDLE", 3)
    ended = 0

    async def script(peer: Peer) -> None:
        nonlocal ended
        frame = await peer.read()
        peer.write(reply(frame.stream))
        assert await peer.rest() == []
        ended += 1

    async with acting(script) as address, dialled(address) as channel:
        for number in (1, 2):
            await channel.call(new_call(), b"")
            await eventually(lambda: ended == number)  # noqa: B023 - awaited here


# -- the end of a connection ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_lost_connection_ends_all_calls_and_nobody_knows_more() -> None:
    async def script(peer: Peer) -> None:
        for _ in range(5):
            await peer.read()
        peer.writer.transport.abort()

    async with acting(script) as address, dialled(address) as channel:
        calls = [channel.call(new_call(), b"") for _ in range(3)]
        large = channel.call(new_call(), bytes(4 * MIB))
        stream = heard(channel, new_stream(), endless(b"a"))
        outcomes = await asyncio.gather(*calls, large, stream, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 5
        assert all(isinstance(one, Unavailable) and one.sent is None for one in outcomes)
        assert len({id(outcome) for outcome in outcomes}) == 5


@pytest.mark.asyncio
async def test_calls_that_wait_for_a_turn_as_the_connection_is_lost_were_not_sent() -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        await asyncio.sleep(0.05)
        peer.writer.transport.abort()

    async with acting(script, calls=1) as address, dialled(address) as channel:
        calls = [channel.call(new_call(), b"") for _ in range(3)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        sent = [outcome.sent for outcome in outcomes if isinstance(outcome, Unavailable)]
        assert sent == [None, False, False]


@pytest.mark.asyncio
async def test_goaway_ends_what_the_server_has_not_seen_and_nothing_else() -> None:
    async def script(peer: Peer) -> None:
        got = [await peer.until(REQUEST) for _ in range(3)]
        peer.write(Frame(GOAWAY, aux=2), reply(got[0].stream), reply(got[1].stream))
        assert [frame for frame in await peer.rest() if frame.kind == REQUEST] == []

    async with acting(script) as address, dialled(address) as channel:
        calls = [channel.call(new_call(), b"") for _ in range(3)]
        one, two, three = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(one, Reply)
        assert isinstance(two, Reply)
        assert isinstance(three, Unavailable)
        assert three.sent is False


@pytest.mark.asyncio
async def test_after_goaway_another_connection_takes_over() -> None:
    connections = 0
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        frame = await peer.read()
        if connections == 1:
            peer.write(Frame(GOAWAY, aux=frame.stream))
            await release.wait()
        peer.write(reply(frame.stream, b"%d" % connections))
        assert await peer.rest() == []

    async with acting(script) as address, dialled(address) as channel:
        first = asyncio.create_task(channel.call(new_call(), b""))
        await eventually(lambda: connections == 1)
        await asyncio.sleep(0.05)
        assert (await channel.call(new_call(), b"")).body == b"2"
        release.set()
        assert (await first).body == b"2"
    assert connections == 2


@pytest.mark.asyncio
async def test_goaway_with_an_error_ends_all_calls_with_it() -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        told = encode_error(DataLoss("a frame is odd"), id="").encode()
        peer.write(Frame(GOAWAY, aux=1, body=told))
        assert await peer.rest() == []

    async with acting(script) as address, dialled(address) as channel:
        with pytest.raises(DataLoss, match="a frame is odd") as caught:
            await channel.call(new_call(), b"")
        assert caught.value.remote


@pytest.mark.asyncio
async def test_numbers_are_used_once_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tcp_client, "_LAST_STREAM", 3)
    numbers: list[list[int]] = []

    async def script(peer: Peer) -> None:
        mine: list[int] = []
        numbers.append(mine)
        with suppress(asyncio.IncompleteReadError):
            while True:
                frame = await peer.read()
                mine.append(frame.stream)
                peer.write(reply(frame.stream))

    async with acting(script) as address, dialled(address) as channel:
        for _ in range(7):
            await channel.call(new_call(), b"")
    assert numbers == [[1, 2, 3], [1, 2, 3], [1]]


# -- cancellation ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_cancelled_before_it_is_sent_says_nothing() -> None:
    got: list[Frame] = []

    async def script(peer: Peer) -> None:
        while True:
            got.append(await peer.read())
            peer.write(reply(got[-1].stream))

    async with acting(script) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b"a"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await channel.call(new_call(), b"b")
    assert [frame.body for frame in got] == [b"b"]


@pytest.mark.asyncio
async def test_cancelled_while_connecting_leaves_the_others_their_connection() -> None:
    release = asyncio.Event()
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        connections += 1
        await release.wait()
        await peer.exactly(8)
        await peer.read()
        peer.write(hello())
        await echo(peer)

    async with acting(script, greets=False) as address, dialled(address) as channel:
        tasks = [asyncio.create_task(channel.call(new_call(), b"%d" % n)) for n in range(3)]
        await eventually(lambda: connections == 1)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        release.set()
        assert [(await task).body for task in tasks[1:]] == [b"1", b"2"]
    assert connections == 1


@pytest.mark.asyncio
async def test_failure_of_a_connection_nobody_waits_for_is_no_news(
    caplog: pytest.LogCaptureFixture,
) -> None:
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        await release.wait()
        peer.writer.transport.abort()

    async with acting(script, greets=False) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        release.set()
        await asyncio.sleep(0.05)
        del task
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.asyncio
async def test_cancelled_call_is_told_to_the_server_and_its_reply_ignored() -> None:
    got = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.read()
        got.set()
        assert await peer.read() == cancel(1)
        peer.write(reply(1, b"late"), *pieces(reply, 1, bytes(2 * PIECE)))
        await echo(peer)

    async with acting(script) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b""))
        await got.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await channel.call(new_call(), b"b")).body == b"b"


@pytest.mark.asyncio
async def test_cancelled_in_the_middle_of_its_message_stops_it() -> None:
    stopped = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.read()
        await asyncio.sleep(0.1)
        left = 0
        while (frame := await peer.read()).kind == DATA:
            left += len(frame.body)
        assert frame == cancel(1)
        assert left < 32 * MIB
        stopped.set()
        await echo(peer)

    async with acting(script, message=64 * MIB) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), bytes(64 * MIB)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await channel.call(new_call(), b"b")).body == b"b"
    assert stopped.is_set()


# -- closing --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_channel_that_closes_while_connecting_ends_the_calls() -> None:
    """And cancels none of their tasks."""
    async with acting(nothing, greets=False) as address, dialled(address) as channel:
        calls = [asyncio.create_task(channel.call(new_call(), b"")) for _ in range(2)]
        stream = asyncio.create_task(heard(channel, new_stream(), endless()))
        await asyncio.sleep(0.05)
        await channel.aclose()
        for task in (*calls, stream):
            with pytest.raises(Unavailable) as caught:
                await task
            assert caught.value.sent is False
            assert not task.cancelling()
        with pytest.raises(Closed):
            await channel.call(new_call(), b"")


@pytest.mark.asyncio
async def test_caller_that_is_cancelled_as_the_channel_closes_is_cancelled() -> None:
    async with acting(nothing, greets=False) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        task.cancel()
        await channel.aclose()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.asyncio
async def test_caller_that_is_cancelled_just_after_the_channel_closed_is_cancelled() -> None:
    async with acting(nothing, greets=False) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        assert isinstance(channel, TCPChannel)
        assert channel._connecting is not None
        channel._connecting.add_done_callback(lambda _: task.cancel())
        await channel.aclose()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()


@pytest.mark.asyncio
async def test_channel_whose_closing_is_cancelled_is_closed() -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.rest()
        closed.set()

    async with acting(script) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(channel.aclose(grace=SOON))
        await asyncio.sleep(0.05)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        with pytest.raises(Unavailable):
            await task
        await eventually(closed.is_set)


@pytest.mark.asyncio
async def test_channel_that_closes_waits_for_its_grace() -> None:
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.read()
        await release.wait()
        peer.write(reply(1, b"a"))

    async with acting(script) as address, dialled(address) as channel:
        task = asyncio.create_task(channel.call(new_call(), b""))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(channel.aclose(grace=SOON))
        await asyncio.sleep(0.05)
        with pytest.raises((Closed, Unavailable)):
            await channel.call(new_call(), b"")
        release.set()
        assert (await task).body == b"a"
        await closing


@pytest.mark.asyncio
async def test_channel_that_closes_does_not_wait_for_who_does_not_read() -> None:
    async with acting(nothing, message=64 * MIB) as address:
        async with dialled(address) as channel:
            task = asyncio.create_task(channel.call(new_call(), bytes(64 * MIB)))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: not _sockets_to(address))


def _sockets_to(address: str) -> list[object]:
    """The open sockets of this process that are connected to it."""
    port = int(address.rpartition(":")[2])
    found: list[object] = []
    for one in gc.get_objects():
        if isinstance(one, socket.socket) and one.fileno() >= 0:
            with suppress(OSError):
                if one.family == socket.AF_INET and one.getpeername()[1] == port:
                    found.append(one)
    return found


# -- streams --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_stream_from_open_to_end() -> None:
    async def script(peer: Peer) -> None:
        assert await peer.read() == Frame(OPEN, RAW, 1, 0, named("Echo.Call"))
        assert [await peer.read(), await peer.read()] == [data(1, b"a"), data(1)]
        assert await peer.read() == end(1)
        packed = msgspec.msgpack.encode({"first": "1"})
        peer.write(Frame(REPLY, METADATA, 1, 1, packed), data(1, b"b"), data(1))
        peer.write(Frame(END, METADATA, 1, 1, msgspec.msgpack.encode({"last": "2"})))
        assert await peer.rest() == []

    async with acting(script) as address, dialled(address) as channel:
        async with channel.stream(new_stream(), said(b"a", b"")) as answer:
            assert [message async for message in messages(answer)] == [b"b", b""]
            assert (answer.metadata, answer.trailer) == ({"first": "1"}, {"last": "2"})


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1000, PIECE, PIECE + 1, MIB], ids=str)
async def test_client_sends_no_more_than_it_has_credit_for(size: int) -> None:
    """And goes on as soon as it has more."""

    async def script(peer: Peer) -> None:
        cost, given = 0, 256 * KIB
        assert (await peer.read()).kind == OPEN
        for _ in range(3):
            while cost + PIECE + 16 <= given or (size <= PIECE and cost + size + 16 <= given):
                cost += 16 + len((await peer.read()).body)
            peer.write(Frame(PING))
            while (frame := await peer.read()).kind != PONG:
                cost += 16 + len(frame.body)
            assert cost <= given
            peer.write(credit(1, 100 * KIB))
            given += 100 * KIB
        peer.write(end(1))

    async def body() -> AsyncIterator[bytes]:
        while True:
            yield bytes(size)

    async with acting(script) as address, dialled(address) as channel:
        assert await heard(channel, new_stream(), body()) == []


@pytest.mark.asyncio
async def test_small_window_of_a_server_is_enough() -> None:
    async def script(peer: Peer) -> None:
        await peer.read()
        got = 0
        while got < MIB:
            frame = await peer.read()
            got += len(frame.body)
            peer.write(credit(1, len(frame.body) + 16))
        peer.write(end(1))

    async with acting(script, window=PIECE + 16) as address, dialled(address) as channel:
        assert await heard(channel, new_stream(), endless(bytes(MIB))) == []


@pytest.mark.asyncio
async def test_leaving_a_stream_cancels_it() -> None:
    async def script(peer: Peer) -> None:
        assert (await peer.read()).kind == OPEN
        peer.write(reply(1), data(1, b"a"))
        assert await peer.read() == cancel(1)
        peer.write(data(1, b"late"), data(1, bytes(PIECE), more=True), end(1))
        await echo(peer)

    async with acting(script) as address, dialled(address) as channel:
        async with channel.stream(new_stream(), endless()) as answer:
            assert await anext(messages(answer)) == b"a"
        assert (await channel.call(new_call(), b"b")).body == b"b"


@pytest.mark.asyncio
async def test_deadline_of_a_stream_is_kept_while_connecting() -> None:
    async with acting(nothing, greets=False) as address, dialled(address) as channel:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await heard(channel, new_stream(deadline=began + 0.2), endless())
        assert 0.2 <= time.monotonic() - began < 0.2 + SLACK


@pytest.mark.asyncio
async def test_message_over_our_limit_cancels_the_stream() -> None:
    async def script(peer: Peer) -> None:
        while True:
            frame = await peer.until(OPEN)
            peer.write(data(frame.stream, b"fits"))
            if frame.stream == 1:
                peer.write(data(1, bytes(PIECE), more=True))
            else:
                peer.write(data(frame.stream, bytes(101)))
            assert await peer.until(CANCEL) == cancel(frame.stream)

    async with acting(script) as address, dialled(address, message=100) as channel:
        for _ in range(2):
            async with channel.stream(new_stream(), endless()) as answer:
                assert await anext(messages(answer)) == b"fits"
                with pytest.raises(TooLarge):
                    await anext(messages(answer))
