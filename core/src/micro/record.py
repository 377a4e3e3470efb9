"""A registered node as Go Micro's registries keep it: the JSON of its ``Service``, with one node.

Source: ``registry/registry.go`` of https://github.com/micro/go-micro, v2 to v5; etcd and NATS hold
these bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
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
    nodes: tuple[_GoNode, ...]
    version: str = ""
    metadata: Mapping[str, str] = {}
    endpoints: tuple[Endpoint, ...] = ()


class _WrittenNode(msgspec.Struct, frozen=True):
    metadata: Mapping[str, str] | None
    id: str
    address: str


class _Written(msgspec.Struct, frozen=True):
    """A record as Go and we write it, name for name."""

    name: str
    version: str
    metadata: Mapping[str, str] | None
    endpoints: msgspec.Raw
    nodes: tuple[_WrittenNode]


#: Bytes of the longest record that is read as such.
_USUAL = 8 * 1024
_written = msgspec.json.Decoder(_Written).decode
_as_written = msgspec.json.Encoder().encode


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
    if len(record) <= _USUAL and record.isascii() and (usual := _usual(record)) is not None:
        return usual
    try:
        said = _strict(record)
    except RecursionError as exc:
        raise DecodeError(f"not the record of a node: {exc}") from exc
    nodes = nodes_of(said)
    if len(nodes) != 1:
        raise DecodeError(f"not the record of a node: it has {len(nodes)}")
    return nodes[0]


@lru_cache(maxsize=1024)
def _usual(record: bytes) -> Node | None:
    """The node of a record that we would write likewise; None for any other.

    Nothing can hide in one that is the same byte for byte: what a decoder passes over is lost then.
    Most records are read again and again, with each snapshot, and before and after each change.
    """
    try:
        said = _written(record)
        if _as_written(said) != record:
            return None
        endpoints = _endpoints(bytes(said.endpoints))
    except (msgspec.MsgspecError, DecodeError, ValueError, RecursionError):
        return None  # what is wrong is told by who reads it with care
    (node,) = said.nodes
    return check_found(
        Node(
            service=said.name,
            id=node.id,
            address=node.address,
            version=said.version,
            metadata=node.metadata or {},
            service_metadata=said.metadata or {},
            endpoints=endpoints,
        )
    )


@lru_cache(maxsize=256)
def _endpoints(written: bytes) -> tuple[Endpoint, ...]:
    """Those of a service: its nodes all have the same, and share them here."""
    said = without_nulls(_strict(written))
    return () if said is None else msgspec.convert(said, tuple[Endpoint, ...])


def nodes_of(said: object) -> tuple[Node, ...]:
    """The nodes of a record that is read already, and may have several.

    Raises:
        DecodeError: it is no record of nodes, or one of them may not be used.
    """
    try:
        service = msgspec.convert(without_nulls(said), _GoService)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise DecodeError(f"not the record of a node: {str(exc)[:200]}") from exc
    return tuple(_found(service, node) for node in service.nodes)


def _found(service: _GoService, node: _GoNode) -> Node:
    return check_found(
        Node(
            service=service.name,
            id=node.id,
            address=node.address,
            version=service.version,
            metadata=node.metadata,
            service_metadata=service.metadata,
            endpoints=service.endpoints,
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
