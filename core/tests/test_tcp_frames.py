"""The frames of the native protocol: the vectors, both ways, and whatever else bytes may be."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from micro.backends import _tcp_frames as frames
from micro.call import Call, Reply
from micro.errors import InvalidArgument, MicroError, NotFound, ResourceExhausted, Unavailable
from micro.transport import Channel

from .native import (
    GOAWAY,
    HELLO,
    JSON,
    METADATA,
    OPEN,
    PIECE,
    PREFACE,
    VECTORS,
    Acting,
    Frame,
    Peer,
    acting,
    dialled,
    frames_in,
    hello,
    listening,
    named,
    raw,
    request,
)
from .native_link import what_is_said

FRAMES = {one["name"]: one for one in VECTORS["frames"]}
META = {"tenant": "acme"}


def bytes_of(shown: str) -> bytes:
    """What the vectors show: hex, and bytes that come many times."""
    found = b""
    for part in shown.split(" + "):
        count, _, byte = part.rpartition(" x ")
        found += bytes.fromhex(byte) * int(count or 1)
    return found


def call(endpoint: str, content_type: str = "application/json", **fields: Any) -> Call:
    return Call(service="suite", endpoint=endpoint, content_type=content_type, **fields)


def begun(kind: int, stream: int, asked: Call, body: bytes = b"", aux: int = 0) -> bytes:
    head, flags = frames.call_head(asked, 32 * 1024)
    return frames.frame(kind, stream, body, head=head, flags=flags, aux=aux)


def told(stream: int, error: MicroError, service: str = "suite") -> bytes:
    return frames.error(stream, error, service)


def with_metadata(kind: int, stream: int, metadata: dict[str, str], body: bytes = b"") -> bytes:
    head, flags = frames.metadata_head(metadata, 1024)
    return frames.frame(kind, stream, body, head=head, flags=flags)


#: How the transport makes each of the frames.
MADE: dict[str, bytes] = {
    "hello": frames.hello(
        frames.Settings(message=4 << 20, headers=32 << 10, calls=1024, streams=100)
    ),
    "request": begun(frames.REQUEST, 1, call("Echo.Call"), b'{"name":"Alice"}', 5000),
    "request with metadata": begun(
        frames.REQUEST, 2, call("Echo.Call", "application/msgpack", metadata=META), b"\x80"
    ),
    "request with another content type": begun(
        frames.REQUEST, 3, call("Echo.Call", "text/xml", metadata=META), b"<a/>"
    ),
    "reply": frames.frame(frames.REPLY, 1, b'{"name":"Alice"}'),
    "reply with metadata": with_metadata(frames.REPLY, 2, META, b"\x80"),
    "error": told(3, NotFound("there is no such thing")),
    "error of what was not executed": told(
        4, ResourceExhausted("1024 calls run on this connection already", sent=False), ""
    ),
    "open": begun(frames.OPEN, 5, call("Echo.Call")),
    "data": frames.frame(frames.DATA, 5, b'{"name":"Bob"}'),
    "data, empty": frames.frame(frames.DATA, 5),
    "end": frames.frame(frames.END, 5),
    "end with a trailer": with_metadata(frames.END, 5, {"last": "word"}),
    "cancel": frames.frame(frames.CANCEL, 6),
    "credit": frames.frame(frames.CREDIT, 5, aux=131_104),
    "ping": frames.frame(frames.PING, 0, aux=7),
    "pong": frames.frame(frames.PONG, 0, aux=7),
    "goaway": frames.frame(frames.GOAWAY, 0, aux=6),
}


# -- the vectors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FRAMES)
def test_vector_is_what_it_says(name: str) -> None:
    vector = FRAMES[name]
    (frame,) = frames_in(bytes_of(vector["hex"]))
    numbers = [vector[field] for field in ("kind", "flags", "stream", "aux")]
    assert list(frame[:4]) == numbers
    assert (frame.head.hex(), frame.body.hex()) == (vector["head"], vector["body"])
    assert frame.encode() == bytes_of(vector["hex"])


def test_each_kind_has_a_vector() -> None:
    assert {vector["kind"] for vector in FRAMES.values()} == set(range(1, 13))


@pytest.mark.parametrize("name", MADE)
def test_our_frames_are_those_of_the_vectors(name: str) -> None:
    assert MADE[name].hex() == FRAMES[name]["hex"]


def test_all_vectors_are_made_by_us() -> None:
    assert FRAMES.keys() - MADE.keys() == {"goaway of an error"}  # a conversation has it


@pytest.mark.parametrize(
    ("name", "content_type", "metadata", "left"),
    [
        ("request", "application/json", {}, 5.0),
        ("request with metadata", "application/msgpack", META, None),
        ("request with another content type", "text/xml", META, None),
        ("open", "application/json", {}, None),
    ],
)
def test_calls_of_the_vectors_are_read(
    name: str, content_type: str, metadata: dict[str, str], left: float | None
) -> None:
    _, flags, stream, aux, head, _ = frames_in(bytes_of(FRAMES[name]["hex"]))[0]
    got = frames.call_of(stream, flags, aux, head, "1.2.3.4:5")
    assert (got.service, got.endpoint, got.content_type) == ("suite", "Echo.Call", content_type)
    assert (got.metadata, got.peer, got.id) == (metadata, "1.2.3.4:5", str(stream))
    if left is None:
        assert got.deadline is None
    else:
        assert got.deadline == pytest.approx(time.monotonic() + left, abs=2.0)


def test_errors_of_the_vectors_are_read() -> None:
    for name, kind, sent in (
        ("error", NotFound, None),
        ("error of what was not executed", ResourceExhausted, False),
    ):
        (frame,) = frames_in(bytes_of(FRAMES[name]["hex"]))
        error = frames.error_of(frame.body, frame.aux)
        assert type(error) is kind
        assert error.sent is sent
        assert error.remote
        assert frame.aux & 0xFF == kind.code


def test_settings_of_the_vector_are_read() -> None:
    (frame,) = frames_in(bytes_of(FRAMES["hello"]["hex"]))
    settings = frames.settings_of(frame.body)
    assert msgspec.to_builtins(settings) == {
        "message": 4 << 20,
        "headers": 32 << 10,
        "calls": 1024,
        "streams": 100,
        "window": 256 << 10,
    }


# -- the conversations ----------------------------------------------------------------------------


def conversations(side: str) -> pytest.MarkDecorator:
    chosen = [one for one in VECTORS["conversations"] if one.get("of", side) == side]
    names = [one["name"] for one in chosen]
    return pytest.mark.parametrize("said", [one["said"] for one in chosen], ids=names)


@pytest.mark.asyncio
@conversations("server")
async def test_our_server_answers_as_the_vectors_say(said: list[list[str]]) -> None:
    async with listening(Acting()) as listener, raw(listener.address) as peer:
        expected = b""
        for side, shown in said:
            if side == "client":
                peer.write(bytes_of(shown))
            else:
                expected = bytes_of(shown)
                assert (await peer.exactly(len(expected))).hex() == expected.hex()
        if frames_in(expected)[0].kind == GOAWAY:
            assert await peer.rest() == []


async def ask(
    channel: Channel, endpoint: str, content_type: str, body: bytes, **fields: Any
) -> Reply:
    return await channel.call(call(endpoint, content_type, **fields), body)


async def speak(channel: Channel, endpoint: str, *messages: bytes, **fields: Any) -> Reply:
    """A stream, read to its end; its reply with all messages in one body."""
    heard: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        for message in messages:
            yield message
        if endpoint == "Fail.Call":
            await asyncio.Event().wait()

    asked = call(endpoint, "application/octet-stream", kind="bidi", **fields)
    async with channel.stream(asked, body()) as reply:
        assert not isinstance(reply.body, bytes)
        with suppress(NotFound):
            async for message in reply.body:
                heard.append(message)  # noqa: PERF401 - what came before the error counts
    reply.body = b"|".join(heard)
    return reply


RAW = "application/octet-stream"


async def unary(channel: Channel) -> None:
    reply = await ask(channel, "Echo.Call", "application/json", b'{"name":"Alice"}')
    assert reply.body == b'{"name":"Alice"}'


async def metadata(channel: Channel) -> None:
    reply = await ask(channel, "Echo.Call", "text/xml", b"<a/>", metadata=META)
    assert (reply.body, reply.metadata) == (b"<a/>", META)


async def error(channel: Channel) -> None:
    with pytest.raises(NotFound, match="there is no such thing"):
        await ask(channel, "Fail.Call", "application/json", b"{}")
    assert (await ask(channel, "Echo.Call", "application/json", b"{}")).body == b"{}"


async def large(channel: Channel) -> None:
    assert (await ask(channel, "Echo.Call", RAW, b"a" * (PIECE + 1))).body == b"a" * (PIECE + 1)


async def stream(channel: Channel) -> None:
    reply = await speak(channel, "Echo.Call", b"a", b"", metadata=META)
    assert (reply.body, reply.metadata, reply.trailer) == (b"a|", META, {"last": "word"})


async def failing_stream(channel: Channel) -> None:
    assert (await speak(channel, "Fail.Call", b"a")).body == b"a"


async def credit(channel: Channel) -> None:
    assert (await speak(channel, "Take.All", *[b"a" * PIECE] * 2)).body == b"131072"


async def cancel(channel: Channel) -> None:
    waiting = asyncio.create_task(ask(channel, "Wait.Call", RAW, b"a"))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert (await ask(channel, "Echo.Call", RAW, b"b")).body == b"b"


async def goaway(channel: Channel) -> None:
    one, two = await asyncio.gather(
        ask(channel, "Echo.Call", RAW, b"a"),
        ask(channel, "Echo.Call", RAW, b"b"),
        return_exceptions=True,
    )
    assert isinstance(one, Reply)
    assert isinstance(two, Unavailable)
    assert two.sent is False


#: What a caller does in each of the conversations.
DONE: dict[str, Callable[[Channel], Awaitable[None]]] = {
    "unary": unary,
    "metadata": metadata,
    "error": error,
    "large": large,
    "stream": stream,
    "failing stream": failing_stream,
    "credit": credit,
    "cancel": cancel,
    "goaway": goaway,
}


@pytest.mark.asyncio
@conversations("client")
async def test_our_client_speaks_as_the_vectors_say(
    said: list[list[str]], request: pytest.FixtureRequest
) -> None:
    async def script(peer: Peer) -> None:
        for side, shown in said:
            if side == "server":
                await peer.send(bytes_of(shown))
            else:
                expected = bytes_of(shown)
                assert (await peer.exactly(len(expected))).hex() == expected.hex()

    name = next(one["name"] for one in VECTORS["conversations"] if one["said"] is said)
    async with acting(script, greets=False) as address, dialled(address) as channel:
        await DONE[name](channel)


# -- what is read, whatever it is -----------------------------------------------------------------

#: Heads that are nearly right are found by chance too seldom.
names = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda name, rest: bytes([len(name)]) + name + rest,
        st.binary(max_size=40),
        st.binary(max_size=9),
    ),
)
packed = st.one_of(
    st.binary(max_size=40),
    st.builds(msgspec.msgpack.encode, st.dictionaries(st.text(max_size=9), st.text(max_size=9))),
)


@given(st.integers(0, 255), st.integers(0, 2**32 - 1), names, packed)
@example(METADATA | JSON, 0, b"\x03a/b", b"\x91" * 3000)
@example(METADATA, 0, b"\x03a/b\x01", b"")
def test_head_of_a_call_is_one_or_is_refused(
    flags: int, aux: int, head: bytes, rest: bytes
) -> None:
    with suppress(InvalidArgument):
        got = frames.call_of(1, flags, aux, head + rest, "")
        again, codec = frames.call_head(got, 0xFFFF)
        if not got.metadata:
            assert again == head + rest or flags & METADATA
        assert frames.call_of(1, codec, aux, again, "").metadata == got.metadata


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=20),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.sampled_from(["application/json", "application/protobuf", "a/b", ""]),
    st.dictionaries(
        st.from_regex(r"x[a-z0-9-]{0,8}", fullmatch=True),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=9).map(str.strip),
    ),
)
def test_calls_come_back_as_they_were(
    service: str, endpoint: str, content_type: str, metadata: dict[str, str]
) -> None:
    given = Call(service=service, endpoint=endpoint, content_type=content_type, metadata=metadata)
    head, flags = frames.call_head(given, 0xFFFF)
    got = frames.call_of(7, flags, 0, head, "")
    assert (got.service, got.endpoint, got.content_type) == (service, endpoint, content_type)
    assert got.metadata == metadata


@given(packed)
@example(b"\x81\xa1x" + b"\x91" * 5000)
def test_settings_are_settings_or_broken(body: bytes) -> None:
    with suppress(frames.Broken):
        assert frames.settings_of(body).calls > 0


@given(packed, st.booleans())
@example(b"\x91" * 5000, True)
def test_metadata_of_a_reply_is_metadata_or_broken(head: bytes, flagged: bool) -> None:
    with suppress(frames.Broken):
        got = frames.metadata_of(head, METADATA if flagged else 0)
        assert all(isinstance(text, str) for pair in got.items() for text in pair)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
@example(b"[" * 5000, 1)
def test_body_of_an_error_is_an_error(body: bytes, aux: int) -> None:
    error = frames.error_of(body, aux)
    assert isinstance(error, MicroError)
    assert error.sent is (False if aux >= 1 << 31 else None)


kinds = st.one_of(st.integers(0, 14), st.integers(0, 255))
numbers = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
heads = st.one_of(st.just(b""), st.just(named("Echo.Call")), names)
bodies = st.one_of(
    st.binary(max_size=30), st.integers(0, PIECE + 1).map(bytes), st.just(bytes(PIECE))
)
any_frame = st.builds(
    lambda kind, flags, stream, aux, head, body: Frame(
        kind, flags, stream, stream if aux is None else aux, head, body
    ).encode(),
    kinds,
    st.one_of(st.sampled_from([0, 1, 4, 16, 32, 36]), st.integers(0, 255)),
    numbers,
    st.one_of(st.none(), numbers),
    heads,
    bodies,
)
good_frame = st.sampled_from(
    [request(1, body=b"a").encode(), Frame(OPEN, 4, 1, 0, named("a")).encode()]
)
any_bytes = st.lists(st.one_of(any_frame, good_frame, st.binary(max_size=40)), max_size=6).map(
    b"".join
)


@given(
    st.sampled_from(["server", "client"]),
    st.booleans(),
    any_bytes,
    st.lists(st.integers(0, 200_000), max_size=10),
)
def test_any_bytes_are_understood_or_hung_up_on_however_they_are_cut(
    side: str, greeted: bool, said: bytes, cuts: list[int]
) -> None:
    """No other error escapes; and where the bytes are cut makes no difference."""
    start = (PREFACE if side == "server" else b"") + (hello().encode() if greeted else b"")
    whole, closed = what_is_said(side, start + said, [])
    in_pieces, closed_too = what_is_said(side, start + said, cuts)
    assert closed == closed_too
    if side == "server":
        heard = [frame.kind for frame in frames_in(whole)]
        assert heard == [frame.kind for frame in frames_in(in_pieces)]
        assert heard[:1] == [HELLO] or not greeted
        assert GOAWAY not in heard[:-1]
        assert closed == (heard[-1:] == [GOAWAY])


@given(st.binary(max_size=100))
def test_any_bytes_claim_the_port_or_not(said: bytes) -> None:
    from micro.backends.tcp import TCPTransport
    from micro.url import URL

    claimed = TCPTransport(URL.parse("tcp")).claims(said[:24])
    assert claimed is not None or len(said) < 8
    assert (claimed is True) == said.startswith(PREFACE)
