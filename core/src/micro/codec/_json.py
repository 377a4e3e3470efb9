"""JSON, as strict as two parsers need to understand the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import msgspec

from micro.codec._base import (
    MAX_DEPTH,
    MAX_ITEMS,
    from_builtins,
    has_long_integer,
    is_pydantic,
    joined,
    refuse_deep,
    to_builtins,
)
from micro.codec._shape import Shape, shape_of
from micro.errors import DecodeError, InvalidArgument

# A string that does not end counts to the end: looking for its end from each quote would be slow.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_EMPTY = re.compile(rb"\{\s*\}|\[\s*\]")
_untyped = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(enc_hook=to_builtins).encode
Decode: TypeAlias = Callable[[bytes], Any]
_COLON, _COMMA, _BACKSLASH, _U = b":,\\u"


class JSON:
    """Strict JSON: what two parsers could understand differently is refused.

    Refused are duplicate names, numbers outside of 64 bits, NaN, more than 64 levels or 100,000
    values, lone surrogates, anything but UTF-8. Unknown fields are ignored, a missing one without a
    default is an error. An empty body is ``{}``. Messages of protobuf are as its own JSON, models
    of pydantic as theirs.
    """

    content_type = "application/json"

    def encode(self, value: object) -> bytes:
        try:
            body = b"{}" if value is None else _encode(value)
            # msgspec writes null for NaN. Of the letters of null the u is rarest.
            if _U in body and body.rpartition(b"null")[1]:
                _refuse_not_finite(value)
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidArgument(f"not a JSON message: {exc}") from exc
        return body

    def decoder(self, shape: Any) -> Decode:
        if is_pydantic(shape):
            from micro.codec._pydantic import model_from_json

            return partial(_decode_carefully, partial(model_from_json, shape))
        decode = msgspec.json.Decoder(shape, dec_hook=from_builtins).decode
        carefully = partial(_decode_carefully, None if shape is Any else decode)
        known = shape_of(shape)
        if not known.closed:
            return carefully
        if known.is_flat and known.names == 1 and not known.numbers:
            return _of_one_name(decode, carefully)
        return _of(known, decode, carefully)


# -- the common message: settled by what its type says -----------------------------------------
#
# What msgspec lets pass hides in names that are twice or unknown. A message has as many names as it
# has colons, or fewer. So it hides nothing when it has no more of them than what was decoded shows;
# or when it is just what we write ourselves.


def _of_one_name(decode: Decode, carefully: Decode) -> Decode:
    """For objects of which one name, that of a text or the like, must be there."""

    def strict(body: bytes) -> Any:
        try:
            value = decode(body)
            # Without a comma there is no second name.
            if _COMMA not in body or _encode(value) == body:
                return value
        except (ValueError, RecursionError):
            pass  # what is wrong is told by the careful one
        return carefully(body)

    return strict


def _of(known: Shape, decode: Decode, carefully: Decode) -> Decode:
    """For all types of which msgspec reads everything."""
    names, more, exact = known.names, known.more, known.exact
    numbers, may_be_deep = known.numbers, not known.is_bound

    def strict(body: bytes) -> Any:
        if may_be_deep and _brackets(body) > MAX_DEPTH:
            return carefully(body)
        try:
            if len(body) > MAX_ITEMS:
                _refuse_many(body)
            value = decode(body)
            if (
                (not exact and _encode(value) == body)
                or body.count(_COLON) == (names if more is None else names + more(value))
                or (exact and _encode(value) == body)
            ) and not (numbers and has_long_integer(body)):
                return value
        except (ValueError, RecursionError):
            pass  # what is wrong is told by the careful one
        return carefully(body)

    return strict


# -- any message -------------------------------------------------------------------------------


def _decode_carefully(decode: Decode | None, body: bytes) -> Any:
    body = body or b"{}"
    try:
        tree = _parse(body)
        return decode(body) if decode else tree
    except RecursionError:
        raise DecodeError(f"the JSON has more than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as exc:
        raise DecodeError(f"the JSON is not UTF-8 (byte {exc.start})") from None
    except ValueError as exc:
        end = f" (after {len(body)} bytes)" if "truncated" in str(exc) else ""
        raise DecodeError(f"{joined(str(exc))}{end}") from None


def _parse(body: bytes) -> Any:
    """What is in it, unless two parsers could read it differently, or it costs too much.

    Most is settled by counting bytes; only what that leaves open is parsed again.
    """
    if not body.isascii():
        body.decode()
    if len(body) > MAX_ITEMS:
        _refuse_many(body)
    tree = _untyped(body)
    if _brackets(body) > MAX_DEPTH:
        refuse_deep(tree, "JSON")
    # msgspec keeps the last of equal names: one was dropped between reading and writing.
    if (
        has_long_integer(body)
        or (_BACKSLASH in body and body.count(b"\\u"))
        or _encode(tree).count(_COLON) != body.count(_COLON)
    ):
        _parse_again(body)
    return tree


def _brackets(body: bytes) -> int:
    """No less than the levels; where the body is too short for many, its length says enough."""
    return body.count(b"{") + body.count(b"[") if len(body) > 2 * MAX_DEPTH else 0


def _refuse_many(body: bytes) -> None:
    if _values(body) > MAX_ITEMS and _values(_EMPTY.sub(b"0", _STRING.sub(b"0", body))) > MAX_ITEMS:
        raise DecodeError(f"the JSON has more than {MAX_ITEMS:,} values")


def _values(body: bytes) -> int:
    return body.count(b"{") + body.count(b"[") + body.count(b",")


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


# -- what JSON cannot hold ---------------------------------------------------------------------

#: The heads of floats in MessagePack that are not finite.
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]")


def _refuse_not_finite(value: object) -> None:
    """Find out whether a null has been a float."""
    try:
        if not _NOT_FINITE.search(msgspec.msgpack.encode(value, enc_hook=to_builtins)):
            return
    except (TypeError, OverflowError):
        pass  # what only JSON can hold
    path = _path_of_not_finite(msgspec.to_builtins(value, enc_hook=to_builtins))
    if path is not None:
        raise ValueError(f"NaN and infinity have no form in it - at `${path}`")


def _path_of_not_finite(tree: Any) -> str | None:
    if isinstance(tree, float):
        return None if math.isfinite(tree) else ""
    if isinstance(tree, dict):
        places = ((f".{name}", inner) for name, inner in tree.items())
    elif isinstance(tree, list | tuple):
        places = ((f"[{at}]", inner) for at, inner in enumerate(tree))
    else:
        return None
    for place, inner in places:
        path = _path_of_not_finite(inner)
        if path is not None:
            return place + path
    return None
