"""A node as Go Micro has it in Consul: an instance of a service, most of it in tags.

Source: ``v4/registry/consul`` of https://github.com/go-micro/plugins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from micro.errors import ConfigError, InvalidArgument
from micro.record import check_found, encode_node
from micro.registry import Node, check_service
from micro_plugin_consul._tags import read_tags, tags_of

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99})*")
#: What Consul takes in ``Meta``; it is for people and for filters, since the tags have it all.
_META_KEY = re.compile(r"(?!consul-)[A-Za-z0-9_-]{1,128}")
_META_VALUE = 512
_META_PAIRS = 64
#: Seconds after which Consul takes a critical entry away, more than its time to live; 60 at least.
_REMAINS = 5.0
_REMAINS_LEAST = 65.0
_LONGEST_TTL = 3e8


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
            "Tags": list(tags_of(node)),
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
        said = read_tags(found.tags or ())
        host = found.address or address
        return check_found(
            Node(
                service=found.service.removeprefix(self.prefix),
                id=_own_id(found),
                address=f"[{host}]:{found.port}" if ":" in host else f"{host}:{found.port}",
                version=said.version,
                metadata=said.metadata,
                service_metadata=said.service_metadata,
                endpoints=said.endpoints,
            )
        )


def _own_id(found: Instance) -> str:
    own = found.id.removeprefix(f"{found.service}/")
    return found.id if own == found.id else own.partition("~")[0]


def _meta(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those pairs that Consul takes, as many as it takes."""
    fit = (
        (key, value)
        for key, value in metadata.items()
        if _META_KEY.fullmatch(key) and len(value.encode()) <= _META_VALUE
    )
    return dict(pair for pair, _ in zip(fit, range(_META_PAIRS), strict=False))


def _duration(seconds: float) -> str:
    return f"{math.ceil(seconds * 1000)}ms"
