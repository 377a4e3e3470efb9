"""The frames of the native protocol, to bytes and back. Nothing here does I/O.

docs/native.md says what each byte means, and core/tests/vectors/native.json has examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from struct import Struct
from time import monotonic

import msgspec

from micro.call import Call, checked_metadata, decode_error, encode_error
from micro.errors import InvalidArgument, MicroError, TooLarge
from micro.transport import Limits

#: What a client says first: the name of the protocol and its version.
PREFACE = b"MICRO1\r\n"

#: length of head and body, type, flags, length of the head, stream, aux
HEADER = Struct(">IBBHII")
SIZE = HEADER.size
unpack = HEADER.unpack_from
pack = HEADER.pack

HELLO, REQUEST, REPLY, ERROR = 1, 2, 3, 4
OPEN, DATA, END, CANCEL, CREDIT = 5, 6, 7, 8, 9
PING, PONG, GOAWAY = 10, 11, 12

_CODEC = 0b0111  # which form the body has; 0: the head names it
METADATA = 0b1_0000  # the head ends with it
MORE = 0b10_0000  # DATA frames of this stream carry the rest of the message
#: All that are known; others are for later versions.
FLAGS = _CODEC | METADATA | MORE

#: Most bytes of a message that one frame carries: what a small call may have to wait behind.
FRAGMENT = 64 * 1024
#: Most bytes of a whole frame; the head's length has 16 bits.
FRAME = SIZE + 0xFFFF + FRAGMENT
#: Bytes of a stream, frames counted whole, that may be on their way unread.
WINDOW = 256 * 1024
#: Their aux is the number of the stream again: TCP misses a wrong bit now and then, and what is for
#: one call must not reach another.
NUMBERED_TWICE = frozenset({REPLY, DATA, END, CANCEL})
#: In the aux of an ERROR: no handler has seen the call.
NOT_EXECUTED = 0x8000_0000
#: Longest deadline that a caller can ask for, in milliseconds.
_MAX_TIMEOUT = 300_000
#: Most bytes of metadata that are remembered.
_SHORT = 512
_CODECS = {
    "application/json": 1,
    "application/msgpack": 2,
    "application/protobuf": 3,
    "application/octet-stream": 4,
}
_CONTENT_TYPES = {number: name for name, number in _CODECS.items()}


class Broken(Exception):
    """The peer does not keep to the protocol; nothing that it says can be trusted any more."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What one side takes of the other; the body of a HELLO, as a MessagePack map.

    ``message`` is bytes of one message, ``headers`` of one head, ``calls`` and ``streams`` how many
    may run at once, ``window`` the credit with which each stream begins.
    """

    message: int
    headers: int
    calls: int
    streams: int
    window: int = WINDOW

    @classmethod
    def of(cls, limits: Limits) -> Settings:
        """Those of a side with these limits."""
        return cls(
            message=limits.message,
            headers=min(limits.headers, 0xFFFF),
            calls=limits.calls,
            streams=limits.streams,
        )


_encode = msgspec.msgpack.Encoder().encode
_settings = msgspec.msgpack.Decoder(Settings).decode
_metadata = msgspec.msgpack.Decoder(dict[str, str]).decode


# -- frames to bytes ---------------------------------------------------------------------------


def frame(
    kind: int,
    stream: int,
    body: bytes = b"",
    *,
    head: bytes = b"",
    flags: int = 0,
    aux: int | None = None,
) -> bytes:
    """One frame."""
    aux = stream if aux is None else aux
    return pack(len(head) + len(body), kind, flags, len(head), stream, aux) + head + body


def header(kind: int, flags: int, head: int, body: int, stream: int, aux: int) -> bytes:
    """A header alone, for a body that is sent from where it lies."""
    return pack(head + body, kind, flags, head, stream, aux)


def hello(settings: Settings) -> bytes:
    return frame(HELLO, 0, _encode(settings))


@lru_cache(maxsize=4096)
def method_head(service: str, endpoint: str, content_type: str) -> tuple[bytes, int]:
    """The start of a call's head, and its codec."""
    codec = _CODECS.get(content_type, 0)
    try:
        name, named = f"{service}/{endpoint}".encode(), content_type.encode("ascii")
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"{endpoint[:80]!r}, {content_type[:80]!r}: {exc.reason}") from None
    if len(name) > 255 or len(named) > 255:
        raise InvalidArgument(f"{endpoint[:80]}: service, endpoint or content type is too long")
    return bytes([len(name)]) + name + (b"" if codec else bytes([len(named)]) + named), codec


def call_head(call: Call, most: int) -> tuple[bytes, int]:
    """Head and flags of the frame that begins ``call``.

    Raises:
        TooLarge: the head is over ``most`` bytes.
        InvalidArgument: a name or the metadata cannot travel.
    """
    head, flags = method_head(call.service, call.endpoint, call.content_type)
    if call.metadata:
        head += _packed(tuple(call.metadata.items()))
        flags |= METADATA
        if len(head) > most:
            raise TooLarge(f"the metadata has {len(head)} bytes, {most} at most", sent=False)
    return head, flags


@lru_cache(maxsize=256)
def _packed(items: tuple[tuple[str, str], ...]) -> bytes:
    """Checked metadata as bytes; callers repeat themselves, so they are remembered."""
    packed = _encode(checked_metadata(dict(items)))
    if len(packed) > 0xFFFF:
        raise TooLarge(f"the metadata has {len(packed)} bytes, {0xFFFF} at most", sent=False)
    return packed


def time_left(deadline: float | None) -> int:
    """The aux of the frame that begins a call: milliseconds, 0 for no deadline."""
    if deadline is None:
        return 0
    left = int((deadline - monotonic()) * 1000) + 1
    if 0 < left <= _MAX_TIMEOUT:
        return left
    return 1 if left <= 0 else _MAX_TIMEOUT


def metadata_head(metadata: Mapping[str, str], most: int) -> tuple[bytes, int]:
    """Head and flags of a frame that carries nothing but metadata there.

    Raises:
        TooLarge: the head is over ``most`` bytes.
    """
    if not metadata:
        return b"", 0
    head = _encode(metadata)
    if len(head) > most:
        raise TooLarge(f"the metadata of the reply has {len(head)} bytes, {most} at most")
    return head, METADATA


def error(stream: int, told: MicroError, service: str) -> bytes:
    aux = told.code | (NOT_EXECUTED if told.sent is False else 0)
    return frame(ERROR, stream, encode_error(told, id=service).encode(), aux=aux)


# -- bytes to what they mean -------------------------------------------------------------------


def call_of(stream: int, flags: int, aux: int, head: bytes, peer: str) -> Call:
    """The call that a REQUEST or an OPEN begins.

    Raises:
        InvalidArgument: the head is none.
    """
    metadata: dict[str, str] = {}
    if flags & METADATA:
        end = _end_of_names(head, flags)
        metadata = _metadata_in(head[end:])
        head = head[:end]
    service, endpoint, content_type = _names(head, flags & _CODEC)
    if aux > _MAX_TIMEOUT:  # noqa: PLR1730 - every call: a fifth of the time of min()
        aux = _MAX_TIMEOUT
    return Call(
        service=service,
        endpoint=endpoint,
        content_type=content_type,
        metadata=metadata,
        deadline=monotonic() + aux / 1000 if aux else None,
        id=str(stream),
        peer=peer,
    )


def _end_of_names(head: bytes, flags: int) -> int:
    end = 1 + head[0] if head else 0
    if not flags & _CODEC:
        end += 1 + (head[end] if len(head) > end else 0)
    return end


@lru_cache(maxsize=4096)
def _names(head: bytes, codec: int) -> tuple[str, str, str]:
    """Service, endpoint and content type."""
    try:
        end = 1 + head[0]
        service, slash, endpoint = head[1:end].decode().partition("/")
        content_type = _CONTENT_TYPES[codec] if codec else head[end + 1 :].decode("ascii")
    except (IndexError, KeyError, UnicodeDecodeError):
        raise InvalidArgument("the head of the call is malformed") from None
    rest = 0 if codec else 1 + len(content_type)
    complete = len(head) == end + rest and (codec or head[end] == len(content_type))
    if not slash or not endpoint or not complete:
        raise InvalidArgument("the head of the call is malformed")
    return service, endpoint, content_type


def _checked(packed: bytes) -> dict[str, str]:
    try:
        return checked_metadata(_metadata(packed))
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"the metadata is malformed: {exc}") from None


_remembered = lru_cache(maxsize=1024)(_checked)


def _metadata_in(packed: bytes) -> dict[str, str]:
    """A dictionary of its own; callers repeat themselves, so what was checked is remembered."""
    checked = _remembered(packed) if len(packed) <= _SHORT else _checked(packed)
    return checked.copy()


def metadata_of(head: bytes, flags: int) -> dict[str, str]:
    """The metadata of a reply or of the end of a stream.

    Raises:
        Broken: it is none.
    """
    if not flags & METADATA:
        return {}
    try:
        return _metadata_in(head)
    except MicroError as exc:
        raise Broken(f"a reply has bad metadata: {exc.detail}") from None


def error_of(body: bytes, aux: int) -> MicroError:
    told = decode_error(body.decode("utf-8", "replace"))
    if aux & NOT_EXECUTED:
        told.sent = False
    return told


def settings_of(body: bytes) -> Settings:
    """What a HELLO says.

    Raises:
        Broken: they are none, or of a side with which nothing can be done.
    """
    try:
        settings = _settings(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Broken(f"the settings in HELLO are malformed: {exc}") from None
    least = min(settings.message, settings.headers, settings.calls)
    if least < 1 or settings.window < FRAGMENT + SIZE:
        raise Broken("the settings in HELLO leave no room for a call")
    return settings
