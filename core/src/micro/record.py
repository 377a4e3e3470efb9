"""A registered node as Go Micro's registries keep it: the JSON of its ``Service``, with one node.

Source: ``registry/registry.go`` of https://github.com/micro/go-micro, v2 to v5; etcd and NATS hold
these bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from micro.codec import codec_for
from micro.errors import DecodeError, InvalidArgument, TooLarge
from micro.registry import NODE_SIZE, Endpoint, Node, Value, check_node, check_service

# Go Micro's ids are longer than ours, and may have dots: name of the server, a dash, a uuid.
_FOREIGN_ID = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_ADDRESS = re.compile(r"(?:[A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})")
_strict = codec_for("application/json").decoder(Any)


class _GoNode(msgspec.Struct, frozen=True):
    id: str
    address: str
    metadata: Mapping[str, str] = {}


class _GoService(msgspec.Struct, frozen=True):
    name: str
    nodes: tuple[_GoNode]
    version: str = ""
    metadata: Mapping[str, str] = {}
    endpoints: tuple[Endpoint, ...] = ()


def encode_node(node: Node) -> bytes:
    """The record of ``node``: names in Go's order, ``null`` where Go has nothing.

    Raises:
        InvalidArgument: the node cannot be registered.
        TooLarge: the record is over 64 KiB.
    """
    check_node(node)
    record = msgspec.json.encode(
        {
            "name": node.service,
            "version": node.version,
            "metadata": node.service_metadata or None,
            "endpoints": [_endpoint(endpoint) for endpoint in node.endpoints] or None,
            "nodes": [{"metadata": node.metadata, "id": node.id, "address": node.address}],
        }
    )
    if len(record) > NODE_SIZE:
        raise TooLarge(
            f"node {node.id} of {node.service}: {len(record)} bytes, {NODE_SIZE} at most"
        )
    return record


def decode_node(record: bytes) -> Node:
    """The node of a record; what others wrote is hostile until proven otherwise.

    Raises:
        DecodeError: it is no record of one node, or of none that may be used.
    """
    if len(record) > NODE_SIZE:
        raise DecodeError(f"a record of {len(record)} bytes, {NODE_SIZE} at most")
    try:
        said = msgspec.convert(without_nulls(_strict(record)), _GoService)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise DecodeError(f"not the record of a node: {str(exc)[:200]}") from exc
    (node,) = said.nodes
    return check_found(
        Node(
            service=said.name,
            id=node.id,
            address=node.address,
            version=said.version,
            metadata=node.metadata,
            service_metadata=said.metadata,
            endpoints=said.endpoints,
        )
    )


def check_found(node: Node) -> Node:
    """``node``, which somebody else registered, when it can be called.

    Raises:
        DecodeError: its service, id or address cannot be.
    """
    try:
        check_service(node.service)
    except InvalidArgument as exc:
        raise DecodeError(exc.detail) from exc
    address = _ADDRESS.fullmatch(node.address)
    if not _FOREIGN_ID.fullmatch(node.id) or not address or not 0 < int(address[1]) < 65536:
        raise DecodeError(
            f"a node of {node.service} with id {node.id[:80]!r} and address {node.address[:80]!r}"
        )
    return node


def without_nulls(value: Any) -> Any:
    """JSON from Go, where an absent list or map is ``null``, with those names left out."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _endpoint(endpoint: Endpoint) -> dict[str, object]:
    return {
        "request": _value(endpoint.request),
        "response": _value(endpoint.response),
        "metadata": endpoint.metadata,
        "name": endpoint.name,
    }


def _value(value: Value | None) -> dict[str, object] | None:
    if value is None:
        return None
    values = [_value(inner) for inner in value.values] or None
    return {"name": value.name, "type": value.type, "values": values}
