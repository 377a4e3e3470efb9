"""Codecs: how a message becomes bytes, by content type."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from micro.codec._base import MAX_DEPTH, MAX_ITEMS, Codec, is_protobuf, is_pydantic
from micro.codec._json import JSON
from micro.errors import InvalidArgument, UnsupportedContentType

__all__ = [
    "JSON",
    "MAX_DEPTH",
    "MAX_ITEMS",
    "Codec",
    "Raw",
    "codec_for",
    "is_protobuf",
    "is_pydantic",
]


class Raw:
    """Bytes as they are."""

    content_type = "application/octet-stream"

    def encode(self, value: object) -> bytes:
        if isinstance(value, bytes):
            return value
        raise InvalidArgument(f"{self.content_type} holds bytes, not {type(value).__name__}")

    def decoder(self, shape: Any) -> Callable[[bytes], Any]:
        if shape in (bytes, Any):
            return bytes
        raise UnsupportedContentType(f"{self.content_type} gives bytes, not {shape}; send JSON")


@cache
def _message_pack() -> Codec:
    from micro.codec._msgpack import MessagePack

    return MessagePack()


@cache
def _protobuf() -> Codec:
    from micro.codec._protobuf import Protobuf

    return Protobuf()


_READY: dict[str, Codec] = {codec.content_type: codec for codec in (JSON(), Raw())}
_MSGPACK = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
_PROTOBUF = ("application/protobuf", "application/x-protobuf", "application/proto")
#: Those that are made when they are used first.
_LATE: dict[str, Callable[[], Codec]] = {
    **dict.fromkeys(_MSGPACK, _message_pack),
    **dict.fromkeys(_PROTOBUF, _protobuf),
}


def codec_for(content_type: str) -> Codec:
    """The codec of a content type; its parameters (``; charset=utf-8``) are ignored.

    Raises:
        UnsupportedContentType: none is known; the text names those that are.
    """
    found = _READY.get(content_type)
    if found is not None:
        return found
    name = content_type.partition(";")[0].strip().lower()
    if name in _READY:
        return _READY[name]
    if name in _LATE:
        return _LATE[name]()
    known = ", ".join((*_READY, _MSGPACK[0], _PROTOBUF[0]))
    raise UnsupportedContentType(f"content type {content_type!r} is not one of {known}")
