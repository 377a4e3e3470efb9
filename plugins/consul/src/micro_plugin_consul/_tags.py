"""What Go Micro keeps of a node in the tags of its instance, each packed: "v-" and so on.

Source: ``v4/registry/consul/encoding.go`` of https://github.com/go-micro/plugins.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import msgspec

from micro.codec import codec_for
from micro.errors import DecodeError
from micro.record import without_nulls
from micro.registry import NODE_SIZE, Endpoint, Node

T = TypeVar("T")

#: Tags that are remembered, since nodes say the same again and again; of so many bytes at most.
_REMEMBERED = 1024
_SHORT = 2048
_strict = codec_for("application/json").decoder(Any)


class Said(NamedTuple):
    """What the tags of an instance say of its node."""

    version: str
    metadata: dict[str, str]
    service_metadata: dict[str, str]
    endpoints: tuple[Endpoint, ...]


def tags_of(node: Node) -> Iterator[str]:
    """The tags that say what Consul has no other place for."""
    for key, value in node.metadata.items():
        yield _packed("t", msgspec.json.encode({key: value}))
    for endpoint in node.endpoints:
        yield _packed("e", msgspec.json.encode(endpoint))
    yield _packed("v", node.version.encode())
    # Go's entries have no metadata of the service; its readers skip other letters than t, e and v.
    for key, value in node.service_metadata.items():
        yield _packed("s", msgspec.json.encode({key: value}))


def read_tags(tags: Iterable[str]) -> Said:
    """What they say.

    Raises:
        DecodeError: one of them is packed, and says nothing that is known; or it is too much.
    """
    said = _unpacked_all(tags)
    return Said(
        version=_text(said["v"][0]) if said["v"] else "",
        metadata=_pairs(said["t"]),
        service_metadata=_pairs(said["s"]),
        endpoints=tuple(_decoded(raw, Endpoint) for raw in said["e"]),
    )


def _unpacked_all(tags: Iterable[str]) -> dict[str, list[bytes]]:
    """What tags say, by their letters; of two forms the first that is there counts, as for Go.

    Others have tags of their own, ``v1`` or ``e-mail``: what cannot be unpacked is none of ours.
    """
    said: dict[str, list[bytes]] = {letter: [] for letter in "tevs"}
    forms: dict[str, str] = {}
    left = NODE_SIZE
    for tag in tags:
        letter, form = tag[:1], tag[1:2]
        if letter in said and form in ("-", "=") and forms.get(letter, form) == form:
            raw = tag[2:].encode() if form == "=" else _unpacked(tag[2:], left)
            if raw is not None:
                forms[letter] = form
                said[letter].append(raw)
                left -= len(raw)
                if left < 0:  # what stands there as it is may be of any length
                    raise DecodeError(f"tags of over {NODE_SIZE} bytes")
    return said


def _pairs(said: Iterable[bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for raw in said:
        found |= _decoded(raw, dict[str, str])
    return found


def _decoded(raw: bytes, kind: type[T]) -> T:
    """What a tag says; nobody may change it, as others get the same."""
    read: Callable[[bytes, Any], Any] = _known if len(raw) <= _SHORT else _read
    return cast("T", read(raw, kind))


def _read(raw: bytes, kind: Any) -> Any:
    try:
        return msgspec.convert(without_nulls(_strict(raw)), kind)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise DecodeError(f"a tag that is no {kind}: {str(exc)[:200]}") from exc


_known = lru_cache(maxsize=_REMEMBERED)(_read)


def _packed(letter: str, text: bytes) -> str:
    return f"{letter}-{zlib.compress(text).hex()}"


def _unpacked(text: str, most: int) -> bytes | None:
    """What a tag holds, None where it is none of ours.

    Raises:
        DecodeError: it is over ``most`` bytes.
    """
    said = _short(text) if len(text) <= _SHORT else None
    return said if said is not None and len(said) <= most else _inflated(text, most)


@lru_cache(maxsize=_REMEMBERED)
def _short(text: str) -> bytes | None:
    """What a tag holds, if that is short."""
    try:
        return _inflated(text, _SHORT)
    except DecodeError:
        return None


def _inflated(text: str, most: int) -> bytes | None:
    inflater = zlib.decompressobj()
    try:
        said = inflater.decompress(bytes.fromhex(text), most + 1)
    except (ValueError, zlib.error):
        return None
    if len(said) > most:
        raise DecodeError(f"tags of over {NODE_SIZE} bytes")
    return said if inflater.eof else None


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as exc:
        raise DecodeError(f"a version that is not UTF-8: {exc}") from exc
