"""Discovery: which nodes run a service, and where."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Literal

import msgspec

from micro.backend import Backend
from micro.errors import InvalidArgument, Unsupported

_PORT = re.compile(r"[0-9]{1,5}")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
#: Most bytes of one registered node, as JSON.
NODE_SIZE = 64 * 1024


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A field of a message: its name, its type in words, and the fields inside of it."""

    name: str
    type: str
    values: tuple[Value, ...] = ()


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a service answers: ``name`` is ``Handler.Method``."""

    name: str
    request: Value | None = None
    response: Value | None = None
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One running process of a service.

    ``id`` is one label of ``[A-Za-z0-9_-]``, 46 at most; ``address`` is ``host:port``, or
    ``unix:/path`` of a socket in the file system.
    ``metadata`` is the node's, ``service_metadata`` that of the whole service.
    """

    service: str
    id: str
    address: str
    version: str = "latest"
    metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    service_metadata: Mapping[str, str] = msgspec.field(default_factory=dict)
    endpoints: tuple[Endpoint, ...] = ()


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one node; a delete carries the node as it was last known."""

    kind: Literal["create", "update", "delete"]
    node: Node


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All nodes that there are, at one moment of a followed stream."""

    nodes: tuple[Node, ...]


class RegistryFeatures(msgspec.Struct, frozen=True, kw_only=True):
    """What a registry can do.

    ``min_ttl`` is the least time to live, in seconds, that it keeps; ``converge`` the seconds in
    which every other client sees a change; with ``ignores_case`` names that differ only in case
    are one service. With ``history`` a follower that goes on from a mark gets every change since,
    in order and once; without it, it gets a Gap.
    """

    min_ttl: float
    converge: float
    ignores_case: bool = False
    history: bool = False


class Registry(Backend[RegistryFeatures]):
    """Where nodes are registered and found.

    A node is known by its service and its id. One that is not registered again within its time to
    live disappears within twice that time, and never before it. The registry starts no timer to
    keep a node registered: its owner calls ``register`` as heartbeat.

    An outage raises Unavailable and is never told as an empty answer. So does a server that says
    nothing for as long as the backend's options let a call take; what was asked of it may or may
    not have been done. When the server is back, the same object works again. What others wrote and
    what is no node is skipped: it hides nothing, and ends no stream.

    Names of services are dot-separated labels of ``[A-Za-z0-9_-]``, 63 each and 200 in all; every
    method raises InvalidArgument for others, and Closed after ``aclose``, which also ends who
    follows.
    """

    #: How many entries of others were skipped, counted each time that they were read.
    dropped: int = 0

    @abstractmethod
    async def register(self, node: Node, *, ttl: float) -> None:
        """Make ``node`` known for ``ttl`` seconds from now, in place of what was known of it.

        Once it has returned, ``get`` of this registry sees the node.

        Raises:
            InvalidArgument: the id or the address cannot be registered.
            TooLarge: the node is over 64 KiB, or over what the server keeps.
            Unsupported: ``ttl`` is below ``features.min_ttl``.
            Unavailable: the registry cannot be reached.
        """

    @abstractmethod
    async def deregister(self, node: Node) -> None:
        """Forget this node and no other; one that is not known is no error.

        Raises:
            Unavailable: the registry cannot be reached.
        """

    @abstractmethod
    async def get(self, service: str) -> tuple[Node, ...]:
        """The nodes of a service, by id; the consistent read where the server has one.

        Raises:
            ServiceNotFound: there are none.
            Unavailable: the registry cannot be reached.
        """

    @abstractmethod
    async def services(self) -> tuple[str, ...]:
        """The names of all services that have nodes, each once, sorted.

        Raises:
            Unavailable: the registry cannot be reached.
        """

    @abstractmethod
    def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        """One attempt at seeing all changes from ``mark`` on; for Watch alone.

        ``service`` None means all. ``mark`` None begins with a Snapshot. Another one begins as soon
        as the server has agreed to go on from it, with None if there is no change to tell: until
        something came, nothing is proven. Each item comes with the mark, never None, from which to
        go on after it. Who reads slowly holds up nobody else. It never reconnects by itself.

        Raises:
            Unavailable: the stream broke, or nothing proves any more that it lives; go on from the
                last mark.
            Gap: there is no going on from this mark; begin with None.
            Closed: the registry was closed meanwhile.
        """


def in_order(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """``nodes`` by service, those of one service by id."""
    return tuple(sorted(nodes, key=lambda node: (node.service, node.id)))


def check_service(name: str) -> str:
    """``name``, when it can be the name of a service.

    Raises:
        InvalidArgument: it cannot; the text says what can.
    """
    if len(name) <= 200 and all(_LABEL.fullmatch(label) for label in name.split(".")):
        return name
    shown = name if len(name) <= 80 else name[:80] + "..."
    raise InvalidArgument(
        f"service name {shown!r}: write dot-separated labels of A-Z a-z 0-9 _ -, "
        "63 characters each and 200 in all"
    )


def check_ttl(ttl: float, features: RegistryFeatures) -> float:
    """``ttl``, when a registry with these features keeps it.

    Raises:
        Unsupported: it is below ``features.min_ttl``, or no number of seconds.
    """
    if not (0 < ttl < math.inf and features.min_ttl <= ttl):
        raise Unsupported(f"a time to live of {ttl:g} s: {features.min_ttl:g} s is the least")
    return ttl


def check_node(node: Node) -> Node:
    """``node``, when it can be registered.

    Raises:
        InvalidArgument: its service, id, address or texts cannot; the text says what can.
    """
    check_service(node.service)
    if not _LABEL.fullmatch(node.id) or len(node.id) > 46:
        raise InvalidArgument(f"node id {node.id[:80]!r}: write 1 to 46 of A-Z a-z 0-9 _ -")
    try:
        msgspec.json.encode(node)
    except UnicodeEncodeError as exc:
        raise InvalidArgument(f"node {node.id}: a text of it is no Unicode: {exc.reason}") from None
    if node.address.startswith("unix:/"):
        return node
    host, _, port = node.address.rpartition(":")
    if not host or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise InvalidArgument(f"node address {node.address[:80]!r}: write host:port")
    return node
