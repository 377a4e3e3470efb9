"""JSON, as strict as two parsers need to understand the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from micro.codec._base import MAX_DEPTH, MAX_ITEMS, from_builtins, to_builtins
from micro.errors import DecodeError, InvalidArgument

# A string that does not end counts to the end: looking for its end from each quote would be slow.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_EMPTY = re.compile(rb"\{\s*\}|\[\s*\]")
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_INTEGER = b"0" * 19
_untyped = msgspec.json.Decoder()
_encode = msgspec.json.Encoder(enc_hook=to_builtins).encode


class JSON:
    """Strict JSON: what two parsers could understand differently is refused.

    Refused are duplicate names, numbers outside of 64 bits, NaN, more than 64 levels or 100,000
    values, lone surrogates, anything but UTF-8. Unknown fields are ignored, a missing one without a
    default is an error. An empty body is ``{}``. Messages of protobuf are as its own JSON.
    """

    content_type = "application/json"

    def encode(self, value: object) -> bytes:
        try:
            return b"{}" if value is None else _encode(value)
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidArgument(f"not a JSON message: {exc}") from exc

    def decoder(self, shape: Any) -> Callable[[bytes], Any]:
        decode = msgspec.json.Decoder(shape, dec_hook=from_builtins).decode

        def strict(body: bytes) -> Any:
            try:
                _refuse_ambiguous(body)
                return decode(body or b"{}")
            except RecursionError:
                raise DecodeError(f"the JSON has more than {MAX_DEPTH} levels") from None
            except UnicodeDecodeError as exc:
                raise DecodeError(f"the JSON is not UTF-8 (byte {exc.start})") from None
            except msgspec.ValidationError as exc:
                raise DecodeError(str(exc)) from None
            except msgspec.DecodeError as exc:
                end = f" (after {len(body)} bytes)" if "truncated" in str(exc) else ""
                raise DecodeError(f"{exc}{end}") from None

        return strict


def _refuse_ambiguous(body: bytes) -> None:
    """What msgspec lets pass and two parsers could read differently, or what costs too much.

    The common message is settled by counting bytes; only what that leaves open is parsed again.
    """
    if not body.isascii():
        body.decode()
    brackets = body.count(b"{") + body.count(b"[")
    if brackets + body.count(b",") > MAX_ITEMS:
        _refuse_many(body)
    colons = body.count(b":")
    tree = _untyped.decode(body) if colons or brackets > MAX_DEPTH else None
    if brackets > MAX_DEPTH:
        _refuse_deep(tree)
    if _has_long_integer(body) or (colons > 1 and b"\\u" in body):
        _parse_again(body)
    elif colons > 1 and _encode(tree).count(b":") != colons:
        # msgspec keeps the last of equal names: one was dropped between reading and writing.
        _parse_again(body)


def _has_long_integer(body: bytes) -> bool:
    return len(body) > 18 and _LONG_INTEGER in body.translate(_DIGITS_TO_ZERO)


def _refuse_many(body: bytes) -> None:
    bare = _EMPTY.sub(b"0", _STRING.sub(b"0", body))
    if bare.count(b"{") + bare.count(b"[") + bare.count(b",") > MAX_ITEMS:
        raise DecodeError(f"the JSON has more than {MAX_ITEMS:,} values")


def _refuse_deep(tree: Any) -> None:
    level: list[Any] = [[tree]]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for inner in level
            for item in (inner.values() if type(inner) is dict else inner)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return
    raise DecodeError(f"the JSON has more than {MAX_DEPTH} levels")


def _parse_again(body: bytes) -> None:
    """Settle with the standard library's parser, which shows every name and every number."""
    import json

    try:
        json.loads(body, object_pairs_hook=_distinct, parse_int=_int64)
    except json.JSONDecodeError:
        return  # malformed: the decoder says where


def _distinct(pairs: list[tuple[str, object]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise DecodeError(f"the JSON has the name {name[:80]!r} twice in one object")
        seen.add(name)


def _int64(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise DecodeError(f"the number {digits[:24]}... does not fit 64 bits")
    return 0
