"""What registries of Go Micro say to each other over NATS, and what we add to it.

Every process answers questions for its own nodes, and tells changes to all. Go Micro tells no time
to live: ours is the name ``ttl`` beside the names of a service, in seconds from the moment on at
which it is said; ``from`` beside ``Action`` tells our own messages. Go's decoder takes neither.
Source: ``v4/registry/nats`` of https://github.com/go-micro/plugins, v1.2.1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec

from micro.codec import codec_for
from micro.errors import DecodeError
from micro.record import nodes_of
from micro.registry import Node

#: Bytes of a message at most: Go Micro may tell several nodes of a process in one.
_LARGEST = 1024 * 1024
#: Seconds; who claims to live longer is asked when these are over.
_LONGEST_TTL = 3600.0

#: A service that nobody has: no label begins it.
NOBODY: str = ""

_strict = codec_for("application/json").decoder(Any)


class Told(NamedTuple):
    """Nodes that are said to be there, or not; ``ttl`` None: it is not told for how long."""

    nodes: tuple[Node, ...]
    ttl: float | None
    is_delete: bool = False
    origin: str = ""


class Question(NamedTuple):
    """Which nodes are asked for: of one service, or all."""

    service: str | None


def subjects(namespace: str) -> tuple[str, str]:
    """Where questions are asked, and where changes are told; Go's own without a namespace."""
    root = f"{namespace.replace('/', '.')}." if namespace else ""
    return f"{root}micro.registry.nats.query", f"{root}micro.registry.nats.watch"


def answer(record: bytes, ttl: float) -> bytes:
    """The record of a node, as an answer to a question."""
    return b'%b,"ttl":%.3f}' % (record[:-1], ttl)


def create(record: bytes, ttl: float, origin: str) -> bytes:
    return _result(answer(record, ttl), b"create", origin)


def delete(node: Node, origin: str) -> bytes:
    record = {
        "name": node.service,
        "version": node.version,
        "metadata": None,
        "endpoints": None,
        "nodes": [{"metadata": None, "id": node.id, "address": node.address}],
    }
    return _result(msgspec.json.encode(record), b"delete", origin)


def question(service: str | None) -> bytes:
    if service is None:
        return b'{"Service":null,"Action":"list"}'
    return (
        b'{"Service":{"name":"%b","version":"","metadata":null,"endpoints":null,"nodes":null},'
        b'"Action":"get"}' % service.encode()
    )


def read_answer(data: bytes) -> Told:
    """What an answer tells.

    Raises:
        DecodeError: it is none.
    """
    return _told(_object(data))


def read_change(data: bytes) -> Told:
    """What a change tells.

    Raises:
        DecodeError: it is none.
    """
    said = _object(data)
    action = said.get("action")
    if action not in ("create", "update", "delete"):
        raise DecodeError(f"a change of kind {str(action)[:40]!r}")
    told = _told(said.get("service"))
    return told._replace(is_delete=action == "delete", origin=str(said.get("from", "")))


def read_question(data: bytes) -> Question:
    """What is asked for.

    Raises:
        DecodeError: it is no question.
    """
    said = _object(data)
    action, service = said.get("action"), said.get("service")
    if action == "list":
        return Question(None)
    name = service.get("name") if isinstance(service, dict) else None
    if action != "get" or not isinstance(name, str):
        raise DecodeError(f"a question of kind {str(action)[:40]!r}")
    return Question(name)


def _result(record: bytes, action: bytes, origin: str) -> bytes:
    return b'{"Service":%b,"Action":"%b","from":"%b"}' % (record, action, origin.encode())


def _object(data: bytes) -> dict[str, Any]:
    """JSON of one object; the case of its names does not matter to Go."""
    if len(data) > _LARGEST:
        raise DecodeError(f"a message of {len(data)} bytes, {_LARGEST} at most")
    try:
        said = _strict(data)
    except RecursionError as exc:
        raise DecodeError(f"not a message of a registry: {exc}") from exc
    if not isinstance(said, dict):
        raise DecodeError("not a message of a registry: no object")
    return {name.lower(): value for name, value in said.items()}


def _told(service: object) -> Told:
    ttl = service.get("ttl") if isinstance(service, dict) else None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl < math.inf:
        return Told(nodes_of(service), None)
    return Told(nodes_of(service), min(float(ttl), _LONGEST_TTL))
