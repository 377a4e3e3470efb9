"""What reads bytes of others: each target takes any bytes.

It lets no other error escape than those that its decoder promises, and checks what has to hold of
what was read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import msgspec
from core.tests.native import GOAWAY, HELLO, METADATA, PREFACE, frames_in, hello
from core.tests.native_link import what_is_said
from google.protobuf import descriptor_pb2, message_factory

from micro._x509 import read as read_certificate
from micro.backends import _tcp_frames as native
from micro.backends._http_head import Refused
from micro.backends._http_reader import Reader
from micro.backends._http_wire import Answer, Request, read_answer, read_request
from micro.backends._mdns_wire import Zone, node_of, parse
from micro.call import decode_error, encode_error
from micro.codec import codec_for
from micro.errors import BY_NAME, ConfigError, DecodeError, InvalidArgument, MicroError
from micro.record import decode_node
from micro.transport import Limits
from micro.url import URL

Target = Callable[[bytes], None]

_LIMITS = Limits(message=100_000)


# -- the native protocol --------------------------------------------------------------------------


class _Native:
    """Frames, as one side reads them: in one piece or in many, it makes no difference."""

    def __init__(self, side: str) -> None:
        self._side = side
        self._runner: asyncio.Runner | None = None
        start = PREFACE if side == "server" else b""
        self._start = start + hello().encode()

    def __call__(self, data: bytes) -> None:
        if self._runner is None:
            self._runner = asyncio.Runner()
        cut, said = data[:1] or b"\0", data[1:]
        if cut[0] % 2:
            said = self._start + said
        places = range(0, len(said), 1 + cut[0] // 2) if len(said) < 2000 else ()
        whole, closed = what_is_said(self._side, said, (), self._runner)
        in_pieces, closed_too = what_is_said(self._side, said, places, self._runner)
        assert closed == closed_too
        if self._side == "server":
            heard = [frame.kind for frame in frames_in(whole)]
            assert heard == [frame.kind for frame in frames_in(in_pieces)]
            assert heard[:1] == [HELLO] or not cut[0] % 2
            assert closed == (heard[-1:] == [GOAWAY])


def native_heads(data: bytes) -> None:
    """The heads and bodies of frames."""
    flags, head = (data[0], data[1:]) if data else (0, b"")
    with suppress(InvalidArgument):
        call = native.call_of(1, flags, 0, head, "")
        again, codec = native.call_head(call, 0xFFFF)
        once_more = native.call_of(1, codec, 0, again, "")
        assert (once_more.service, once_more.endpoint) == (call.service, call.endpoint)
        assert (once_more.content_type, once_more.metadata) == (call.content_type, call.metadata)
    with suppress(native.Broken):
        native.settings_of(data)
    with suppress(native.Broken):
        native.metadata_of(data, METADATA)
    assert isinstance(native.error_of(data, flags), MicroError)


# -- HTTP -----------------------------------------------------------------------------------------


def _messages(reader: Reader[Any], data: bytes, step: int) -> list[tuple[Any, ...]]:
    """What is read of ``data`` in pieces of ``step`` bytes; at last why it was refused."""
    found: list[tuple[Any, ...]] = []
    try:
        for at in range(0, len(data), step):
            message = reader.read(data[at : at + step])
            while message is not None:
                meaning, numbers, body = message
                found.append((_shown(meaning), numbers, body))
                message = reader.read(b"") if reader.rest else None
    except Refused as exc:
        found.append((exc.status, exc.error.detail))
    return found


def _shown(meaning: Request | Answer) -> list[object]:
    """All that a head means, but for its numbers, which come beside it."""
    names = [name for name in type(meaning).__slots__ if name not in ("length", "numbers")]
    fields = [getattr(meaning, name) for name in names]
    return [str(field) if isinstance(field, Exception) else field for field in fields]


def http_request(data: bytes) -> None:
    """Requests on one connection: a head that is remembered means what it means when it is new."""
    _http(read_request, data, b"")


def http_reply(data: bytes) -> None:
    _http(read_answer, data, b"HTTP/1.")


def _http(read: Callable[[bytes, Limits], Any], data: bytes, begins: bytes) -> None:
    step, said = (1 + data[0], data[1:]) if data else (1, b"")
    whole = _messages(Reader(read, _LIMITS, begins=begins), said, max(len(said), 1))
    in_pieces = _messages(Reader(read, _LIMITS, begins=begins), said, step)
    assert [one for one in whole if len(one) == 3] == [one for one in in_pieces if len(one) == 3]
    reader = Reader(read, _LIMITS, begins=begins)
    for _ in range(8):  # after two, its head is known
        assert _messages(reader, said, max(len(said), 1)) == whole
        if not whole or len(whole[-1]) != 3 or reader.rest or reader.meaning is not None:
            break
    for meaning, *_ in [one for one in whole if len(one) == 3]:
        assert len(meaning) == len(whole[0][0])
    if read is read_request and said.endswith(b"\r\n\r\n"):
        with suppress(Refused, MicroError):
            request = read_request(said, _LIMITS)
            request.call(request.numbers, "peer")


# -- codecs ---------------------------------------------------------------------------------------


class _Order(msgspec.Struct):
    id: int
    lines: list[dict[str, float]] = []
    note: str | None = None


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), "a name twice"
    return dict(pairs)


_json = codec_for("application/json")
_json_decoders = [_json.decoder(shape) for shape in (Any, _Order, dict[str, int], list[str])]


def json_codec(data: bytes) -> None:
    """What is taken, Python's own parser takes too, with the same meaning, and no name is twice."""
    for decode in _json_decoders:
        with suppress(DecodeError):
            decode(data)
    with suppress(DecodeError):
        value = _json_decoders[0](data or b"{}")  # no bytes are a message with its defaults
        assert json.loads(data or b"{}", object_pairs_hook=_distinct) == value
        assert value is None or _json_decoders[0](_json.encode(value)) == value


_msgpack = codec_for("application/msgpack")
_msgpack_decoders = [_msgpack.decoder(shape) for shape in (Any, _Order, dict[str, int], list[str])]


def msgpack_codec(data: bytes) -> None:
    for decode in _msgpack_decoders:
        with suppress(DecodeError):
            decode(data)
    with suppress(DecodeError):
        value = _msgpack_decoders[0](data)
        if value is not None:
            sent = _msgpack.encode(value)  # as bytes, since not every number is equal to itself
            assert _msgpack.encode(_msgpack_decoders[0](sent)) == sent


def _protobuf_message() -> Any:
    kinds = {"text": 9, "number": 3, "data": 12}
    fields = [
        {"name": name, "number": number, "type": kind, "label": 1}
        for number, (name, kind) in enumerate(kinds.items(), 1)
    ]
    nested = {"name": "more", "number": 4, "type": 11, "label": 3, "type_name": ".fuzz.Message"}
    file = descriptor_pb2.FileDescriptorProto(
        name="micro/fuzz.proto",
        package="fuzz",
        syntax="proto3",
        message_type=cast("Any", [{"name": "Message", "field": [*fields, nested]}]),
    )
    return message_factory.GetMessages([file])["fuzz.Message"]


_protobuf = codec_for("application/protobuf")
_decode_protobuf = _protobuf.decoder(_protobuf_message())


def protobuf_codec(data: bytes) -> None:
    with suppress(DecodeError):
        message = _decode_protobuf(data)
        assert _decode_protobuf(_protobuf.encode(message)) == message


# -- the others -----------------------------------------------------------------------------------


def error(data: bytes) -> None:
    """An error of a peer, whatever it wrote, and as it goes on to the next."""
    told = decode_error(data.decode("utf-8", "replace"))
    assert type(told) in BY_NAME.values()
    assert told.remote
    wire = encode_error(told, id="fuzz")
    assert wire.isascii()
    again = decode_error(wire)
    assert type(again) is type(told)
    assert again.detail == told.detail or not told.detail


def mdns(data: bytes) -> None:
    """A packet that anybody may send to everybody."""
    zone = Zone("", "fuzz")
    with suppress(DecodeError):
        packet = parse(data)
        list(zone.listed(packet))
        for instance in zone.instances(packet):
            with suppress(DecodeError):
                node_of(instance)


def record(data: bytes) -> None:
    """What somebody wrote into a registry."""
    with suppress(DecodeError):
        assert decode_node(data).service


def url(data: bytes) -> None:
    """A setting; what is wrong with it is told without its secret."""
    text = data.decode("utf-8", "replace")
    try:
        parsed = URL.parse(text)
    except ConfigError as exc:
        login, at, _ = text.partition("@")
        secret = login.rpartition(":")[2] if at else ""
        assert len(secret) < 8 or secret not in str(exc)
        return
    again = URL.parse(str(parsed))
    assert again.scheme == parsed.scheme
    assert not parsed.password or f":{parsed.password}@" not in repr(parsed)


def certificate(data: bytes) -> None:
    """What a peer shows, in DER."""
    try:
        found = read_certificate(data)
    except ValueError:
        return
    assert isinstance(found.fault() + found.whose(), str)
    assert not found.is_of("a", found) or "a" in (found.identity.split("/")[-1], *found.names)
    assert found.identity in ("", *found.uris, *found.names)


TARGETS: dict[str, Target] = {
    "native-server": _Native("server"),
    "native-client": _Native("client"),
    "native-heads": native_heads,
    "http-request": http_request,
    "http-reply": http_reply,
    "json": json_codec,
    "msgpack": msgpack_codec,
    "protobuf": protobuf_codec,
    "error": error,
    "mdns": mdns,
    "record": record,
    "url": url,
    "certificate": certificate,
}
