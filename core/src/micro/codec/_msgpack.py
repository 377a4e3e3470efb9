"""MessagePack, as strict as our JSON. Source of the format: spec.md of msgpack/msgpack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import msgspec

from micro.codec._base import (
    MAX_DEPTH,
    MAX_ITEMS,
    from_builtins,
    has_long_integer,
    joined,
    refuse_deep,
    to_builtins,
)
from micro.codec._shape import Shape, shape_of
from micro.errors import DecodeError, InvalidArgument

_EMPTY = b"\x80"  # a map of nothing
_TIMESTAMP = 0xFF
_UINT64 = 0xCF  # also a byte of texts
#: Bytes that no list or map begins with; the others are in texts too.
_HARMLESS = bytes({*range(0x80), *range(0xA0, 0xDC), *range(0xE0, 0x100)})
Decode: TypeAlias = Callable[[bytes], Any]


def _refuse_extension(code: int, _: memoryview) -> Any:
    raise DecodeError(f"the MessagePack has an extension of type {code}; only timestamps are taken")


_untyped = msgspec.msgpack.Decoder(ext_hook=_refuse_extension).decode
_encode = msgspec.msgpack.Encoder(enc_hook=to_builtins).encode


class MessagePack:
    """Strict MessagePack: what two parsers could understand differently is refused.

    Refused are duplicate names, integers outside of 64 bits with sign, more than 64 levels or
    100,000 values, lengths over what is there, anything but UTF-8 in text, bytes after the message,
    extensions. A timestamp is taken when it is exact: in whole microseconds; it becomes UTC.
    Floats are as they are, NaN too. Unknown fields are ignored; an empty body is an empty map.
    Messages of protobuf and models of pydantic are as their JSON.
    """

    content_type = "application/msgpack"

    def encode(self, value: object) -> bytes:
        try:
            return _EMPTY if value is None else _encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise InvalidArgument(f"not a MessagePack message: {exc}") from exc

    def decoder(self, shape: Any) -> Decode:
        decode = msgspec.msgpack.Decoder(
            shape, dec_hook=from_builtins, ext_hook=_refuse_extension
        ).decode
        carefully = partial(_decode_carefully, None if shape is Any else decode)
        known = shape_of(shape)
        if not known.closed:
            return carefully
        settled = _of(known, decode, carefully)
        if known.is_flat and known.exact and known.names < 16:
            return _of_flat(known, decode, settled)
        return settled


# -- the common message: settled by what its type says -----------------------------------------


def _of_flat(known: Shape, decode: Decode, otherwise: Decode) -> Decode:
    """For objects that always have the same names, and nothing that has an inside.

    What has just as many names as it needs has each of them once, and no other.
    """
    head, numbers = 0x80 + known.names, known.numbers

    def strict(body: bytes) -> Any:
        try:
            value = decode(body)
            if body[0] == head and not (numbers and _UINT64 in body):
                return value
        except (ValueError, RecursionError):
            pass  # what is wrong is told by the careful one
        return otherwise(body)

    return strict


def _of(known: Shape, decode: Decode, carefully: Decode) -> Decode:
    """For all types of which msgspec reads everything: what we write just so hides nothing."""
    numbers, may_be_deep = known.numbers, not known.is_bound

    def strict(body: bytes) -> Any:
        if not 0 < len(body) <= MAX_ITEMS or (may_be_deep and _may_be_deep(body)):
            return carefully(body)
        try:
            value = decode(body)
            if _encode(value) == body and not (
                numbers and _UINT64 in body and not _fits_json(value)
            ):
                return value
        except (ValueError, OverflowError, RecursionError):
            pass  # what is wrong is told by the careful one
        return carefully(body)

    return strict


# -- any message -------------------------------------------------------------------------------


def _decode_carefully(decode: Decode | None, body: bytes) -> Any:
    body = body or _EMPTY
    try:
        tree = _parse(body)
        return decode(body) if decode else tree
    except RecursionError:
        raise DecodeError(f"the MessagePack has more than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as exc:
        raise DecodeError(f"text in the MessagePack is not UTF-8: {exc.reason}") from None
    except ValueError as exc:
        raise DecodeError(joined(str(exc))) from None


def _parse(body: bytes) -> Any:
    """What is in it, unless two parsers could read it differently, or it costs too much.

    What is the same when it is written again has no name twice; only the rest is walked through.
    """
    if len(body) <= MAX_ITEMS:
        tree = _untyped(body)
        if _encode(tree) == body:
            if not (_UINT64 in body or _may_be_deep(body)):
                return tree
            if _fits_json(tree):
                refuse_deep(tree, "MessagePack")
                return tree
    _Walk(body).through()
    return _untyped(body)


def _may_be_deep(body: bytes) -> bool:
    return len(body) > MAX_DEPTH and len(body.translate(None, _HARMLESS)) > MAX_DEPTH


def _fits_json(value: Any) -> bool:
    """Whether JSON can hold it, with no long integer: so all fit 64 bits, and no name is a list."""
    try:
        return not has_long_integer(msgspec.json.encode(value, enc_hook=to_builtins))
    except (TypeError, ValueError):
        return False


def _forms() -> list[tuple[str, int, int]]:
    """What a value is, by its first byte; how many bytes of length follow; the length without."""
    forms = [("plain", 0, 0)] * 256
    for count in range(16):
        forms[0x80 + count] = ("map", 0, count)
        forms[0x90 + count] = ("list", 0, count)
    for count in range(32):
        forms[0xA0 + count] = ("plain", 0, count)
    for power in range(3):
        forms[0xC4 + power] = ("plain", 1 << power, 0)
        forms[0xC7 + power] = ("extension", 1 << power, 1)
        forms[0xD9 + power] = ("plain", 1 << power, 0)
    for power in range(4):
        forms[0xCC + power] = forms[0xD0 + power] = ("plain", 0, 1 << power)
    for power in range(5):
        forms[0xD4 + power] = ("extension", 0, (1 << power) + 1)
    for power in range(2):
        forms[0xCA + power] = ("plain", 0, 4 << power)
        forms[0xDC + power] = ("list", 2 << power, 0)
        forms[0xDE + power] = ("map", 2 << power, 0)
    forms[0xCF] = ("unsigned", 0, 8)
    return forms


_FORMS = _forms()


class _Walk:
    """One message, value by value; nothing is made of it but the names of maps."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0
        self._items = 0

    def through(self) -> None:
        self._value(0)
        if self._at != len(self._body):
            raise DecodeError(f"the MessagePack ends before byte {self._at}, and more follows")

    def _value(self, depth: int) -> None:
        kind, width, length = _FORMS[self._take(1)[0]]
        if width:
            length += int.from_bytes(self._take(width), "big")
        if kind == "plain":
            self._take(length)
        elif kind == "list":
            self._enter(depth, length)
            for _ in range(length):
                self._value(depth + 1)
        elif kind == "map":
            self._enter(depth, length)
            self._map(depth + 1, length)
        elif kind == "extension":
            _check_extension(self._take(length))
        elif self._take(length) >= b"\x80":
            raise DecodeError("an integer in the MessagePack does not fit 64 bits with sign")

    def _take(self, count: int) -> bytes:
        start = self._at
        self._at += count
        if self._at > len(self._body):
            raise DecodeError(f"Input data was truncated (after {len(self._body)} bytes)")
        return self._body[start : self._at]

    def _enter(self, depth: int, length: int) -> None:
        if depth == MAX_DEPTH:
            raise DecodeError(f"the MessagePack has more than {MAX_DEPTH} levels")
        self._items += length
        if self._items > MAX_ITEMS:
            raise DecodeError(f"the MessagePack has more than {MAX_ITEMS:,} values")

    def _map(self, depth: int, length: int) -> None:
        seen: set[object] = set()
        for _ in range(length):
            start = self._at
            self._value(depth)
            # As the name of a map, so that what is a list becomes what can be one.
            name = next(iter(_untyped(b"\x81" + self._body[start : self._at] + b"\xc0")))
            if name in seen:
                told = repr(name)[:80]
                raise DecodeError(f"the MessagePack has the name {told} twice in one object")
            seen.add(name)
            self._value(depth)


def _check_extension(extension: bytes) -> None:
    code, stamp = extension[0], extension[1:]
    if code != _TIMESTAMP:
        _refuse_extension(code - 256 if code > 127 else code, memoryview(stamp))
    # 8 bytes are 30 bits of nanoseconds and 34 of seconds; 12 are 32 and 64.
    nanoseconds = int.from_bytes(stamp[:4], "big") >> (2 if len(stamp) == 8 else 0)
    if len(stamp) > 4 and nanoseconds % 1000:
        raise DecodeError("a timestamp in the MessagePack is finer than a microsecond")
