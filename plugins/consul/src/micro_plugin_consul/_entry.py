"""A node as Go Micro has it in Consul: an instance of a service, most of it in tags.

Source: ``v4/registry/consul`` of https://github.com/go-micro/plugins.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from micro.codec import codec_for
from micro.errors import ConfigError, DecodeError, InvalidArgument
from micro.record import check_found, encode_node, without_nulls
from micro.registry import NODE_SIZE, Endpoint, Node, check_service

T = TypeVar("T")

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99})*")
#: What Consul takes in ``Meta``; it is for people and for filters, since the tags have it all.
_META_KEY = re.compile(r"(?!consul-)[A-Za-z0-9_-]{1,128}")
_META_VALUE = 512
_META_PAIRS = 64
#: Seconds after which Consul takes a critical entry away, more than its time to live; 60 at least.
_REMAINS = 5.0
_REMAINS_LEAST = 65.0
_LONGEST_TTL = 3e8
_strict = codec_for("application/json").decoder(Any)


class Instance(msgspec.Struct, frozen=True, rename="pascal"):
    """What Consul keeps of an instance, as far as we read it."""

    id: str = msgspec.field(name="ID")
    service: str
    port: int = 0
    address: str = ""
    tags: tuple[str, ...] | None = None
    modify_index: int = 0


class Registration(NamedTuple):
    """What an agent is told to register a node."""

    id: str
    name: str
    body: dict[str, Any]


class Namespace:
    """Names and ids in Consul: the path of the URL stands before ours."""

    def __init__(self, path: str, source: str) -> None:
        if path and not _PATH.fullmatch(path):
            raise ConfigError(
                f"{source}: consul: namespace {path[:80]!r}: write labels of A-Z a-z 0-9 _ . - "
                "with / between them"
            )
        self.prefix: str = f"{path}/" if path else ""

    def name(self, service: str) -> str:
        return self.prefix + check_service(service)

    def service(self, name: str) -> str | None:
        """The service of a name in Consul; None for one that is not of this namespace."""
        service = name.removeprefix(self.prefix)
        if not name.startswith(self.prefix):
            return None
        try:
            return check_service(service)
        except InvalidArgument:
            return None

    def id(self, node: Node) -> str:
        """Ids are of the whole agent in Consul, whatever the service, and without case.

        So the name stands before ours, and after it, if any, which of all letters are large. Go's
        have no slash.
        """
        id_ = f"{self.name(node.service)}/{node.id}"
        large = int("".join("01"[letter.isupper()] for letter in id_), 2)
        return f"{id_}~{large:x}" if large else id_

    def registration(self, node: Node, ttl: float) -> Registration:
        """What registers ``node`` for ``ttl`` seconds.

        Raises:
            InvalidArgument: it cannot be registered. TooLarge: it is over 64 KiB.
        """
        encode_node(node)
        host, _, port = node.address.rpartition(":")
        if node.address.startswith("unix:"):
            raise InvalidArgument(f"node address {node.address[:80]!r}: Consul keeps host:port")
        ttl = min(ttl, _LONGEST_TTL)
        id_, name = self.id(node), self.name(node.service)
        body = {
            "ID": id_,
            "Name": name,
            "Tags": list(_tags(node)),
            "Port": int(port),
            "Address": host.removeprefix("[").removesuffix("]"),
            "Meta": _meta(node.metadata),
            "Check": {
                "TTL": _duration(ttl),
                "DeregisterCriticalServiceAfter": _duration(max(ttl + _REMAINS, _REMAINS_LEAST)),
                # Else it is critical until it has passed, and watchers see it leave.
                "Status": "passing",
                # So that whatever changes of an entry changes its check: see _catalog.
                "Notes": node.address,
            },
        }
        return Registration(id_, name, body)

    def node(self, found: Instance, address: str) -> Node:
        """The node of an instance; one without an address has ``address``, that of its agent.

        Raises:
            DecodeError: it is none that may be used.
        """
        said = _said(found.tags or ())
        host = found.address or address
        return check_found(
            Node(
                service=found.service.removeprefix(self.prefix),
                id=_own_id(found),
                address=f"[{host}]:{found.port}" if ":" in host else f"{host}:{found.port}",
                version=_text(said["v"][0]) if said["v"] else "",
                metadata=_pairs(said["t"]),
                service_metadata=_pairs(said["s"]),
                endpoints=tuple(_decoded(raw, Endpoint) for raw in said["e"]),
            )
        )


def _own_id(found: Instance) -> str:
    own = found.id.removeprefix(f"{found.service}/")
    return found.id if own == found.id else own.partition("~")[0]


def _tags(node: Node) -> Iterator[str]:
    for key, value in node.metadata.items():
        yield _packed("t", msgspec.json.encode({key: value}))
    for endpoint in node.endpoints:
        yield _packed("e", msgspec.json.encode(endpoint))
    yield _packed("v", node.version.encode())
    # Go's entries have no metadata of the service; its readers skip other letters than t, e and v.
    for key, value in node.service_metadata.items():
        yield _packed("s", msgspec.json.encode({key: value}))


def _meta(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those pairs that Consul takes, as many as it takes."""
    fit = (
        (key, value)
        for key, value in metadata.items()
        if _META_KEY.fullmatch(key) and len(value.encode()) <= _META_VALUE
    )
    return dict(pair for pair, _ in zip(fit, range(_META_PAIRS), strict=False))


def _said(tags: Iterable[str]) -> dict[str, list[bytes]]:
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
    return said


def _pairs(said: Iterable[bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for raw in said:
        found |= _decoded(raw, dict[str, str])
    return found


def _decoded(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.convert(without_nulls(_strict(raw)), kind)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise DecodeError(f"a tag that is no {kind}: {str(exc)[:200]}") from exc


def _packed(letter: str, text: bytes) -> str:
    return f"{letter}-{zlib.compress(text).hex()}"


def _unpacked(text: str, most: int) -> bytes | None:
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


def _duration(seconds: float) -> str:
    return f"{math.ceil(seconds * 1000)}ms"
