"""The registry ``nats-kv``: an entry of a bucket for each node, which lives as heartbeats come."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

import msgspec

from micro.backend import Connections
from micro.errors import Closed, ConfigError, DecodeError, Gap, ServiceNotFound
from micro.record import decode_node, encode_node
from micro.registry import (
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_node,
    check_service,
    check_ttl,
    in_order,
)
from micro.url import URL
from micro_plugin_nats._options import NatsKVOptions

if TYPE_CHECKING:
    from micro_plugin_nats._bucket import Bucket
    from micro_plugin_nats._stream import Entry

_log = logging.getLogger("micro.nats")

_BUCKET = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LABEL = re.compile(r"[A-Za-z0-9_-]+")
#: Stands for no namespace; no label is like it.
_NO_NAMESPACE = "="


class NatsKVRegistry(Registry):
    """Nodes in a key-value bucket of JetStream, each with a time to live of its own.

    A server before 2.11 has one time to live for the whole bucket, which bounds ``ttl`` from both
    sides. ``dropped`` counts entries of others that are no nodes.
    """

    schemes: ClassVar[tuple[str, ...]] = ("nats-kv",)
    Options: ClassVar[type[msgspec.Struct]] = NatsKVOptions
    features: RegistryFeatures = RegistryFeatures(min_ttl=1.0, converge=1.0)

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.dropped: int = 0
        self._bucket: Bucket | None = None
        self._namespace = url.path or _NO_NAMESPACE

    async def connect(self, connections: Connections) -> None:
        from micro_plugin_nats._bucket import Bucket
        from micro_plugin_nats._client import shared

        options = self.url.options(NatsKVOptions)
        source = f"{self.url.source}: nats-kv"
        if not _BUCKET.fullmatch(options.bucket):
            raise ConfigError(f"{source}: option 'bucket': write 1 to 64 of A-Z a-z 0-9 _ -")
        if options.bucket_ttl < self.features.min_ttl:
            raise ConfigError(
                f"{source}: option 'bucket_ttl': {self.features.min_ttl:g} s at least"
            )
        if self.url.path and not all(map(_LABEL.fullmatch, self.url.path.split("/"))):
            raise ConfigError(
                f"{source}: namespace: write labels of A-Z a-z 0-9 _ -, with / between"
            )
        client = await shared(self.url, options, connections)
        bucket = Bucket(client, options.bucket, options.bucket_ttl)
        await bucket.ensure()
        each, longest = bucket.settings
        if not each:
            least = max(self.features.min_ttl, longest / 2)
            self.features = msgspec.structs.replace(self.features, min_ttl=least)
        self._bucket = bucket

    async def aclose(self) -> None:
        bucket, self._bucket = self._bucket, None
        if bucket is not None:
            bucket.close(Closed("nats-kv: the registry was closed"))

    async def register(self, node: Node, *, ttl: float) -> None:
        bucket, record = self._open(), encode_node(node)
        await bucket.put(self._key(node), record, check_ttl(ttl, self.features))

    async def deregister(self, node: Node) -> None:
        await self._open().delete(self._key(check_node(node)))

    async def get(self, service: str) -> tuple[Node, ...]:
        entries = await self._open().read(self._pattern(check_service(service)))
        if not (nodes := self._nodes(entries)):
            raise ServiceNotFound(f"service {service!r} is not registered with {self.url}")
        return nodes

    async def services(self) -> tuple[str, ...]:
        entries = await self._open().read(self._pattern(None))
        return tuple(sorted({node.service for node in self._nodes(entries)}))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        bucket = self._open()
        pattern = self._pattern(None if service is None else check_service(service))
        if mark is not None:
            raise Gap("nats-kv: what changed meanwhile is not known")
        async with bucket.watching(pattern) as (entries, stream):
            # A server before 2.11 does not tell when an entry expires.
            known = _Known(0 if bucket.settings.each else bucket.settings.longest)
            self._fold(known, entries)
            yield True, Snapshot(nodes=in_order(known.nodes.values()))
            while True:
                more = await stream.next(known.due)
                for change in [*self._fold(known, more), *known.expired()]:
                    self._open()
                    yield True, change

    def _fold(self, known: _Known, entries: Iterable[Entry]) -> list[Change]:
        """What entries change, after what was known."""
        changes: list[Change] = []
        for entry in entries:
            if not known.is_same(entry):
                node = self._node(entry)
                changes += known.hold(entry, node)
        return changes

    def _nodes(self, entries: Iterable[Entry]) -> tuple[Node, ...]:
        """The nodes of entries, of which the last of each key counts."""
        last = {entry.key: entry for entry in entries}
        found = [node for entry in last.values() if (node := self._node(entry)) is not None]
        return in_order(found)

    def _node(self, entry: Entry) -> Node | None:
        """The node of an entry, if it holds one, under its own key."""
        if entry.value is None:
            return None
        try:
            node = decode_node(entry.value)
        except DecodeError as exc:
            why = exc.detail
        else:
            if entry.key == self._key(node):
                return node
            why = f"it is of node {node.id} of {node.service}"
        self.dropped += 1
        _log.debug("%s: the entry %s does not count: %s", self.url, entry.key, why)
        return None

    def _pattern(self, service: str | None) -> str:
        """The keys of a service; no dot of its name is one of theirs."""
        name = "*" if service is None else service.replace(".", "/")
        return f"{self._namespace}.{name}.*"

    def _key(self, node: Node) -> str:
        return f"{self._namespace}.{node.service.replace('.', '/')}.{node.id}"

    def _open(self) -> Bucket:
        if self._bucket is None:
            raise Closed("nats-kv: the registry is not connected")
        return self._bucket


class _Known:
    """The nodes that one who follows knows of; with ``ttl`` it forgets those that are silent.

    When an entry was there before, its age is not known: it is forgotten late, and never early.
    """

    def __init__(self, ttl: float) -> None:
        self.nodes: dict[str, Node] = {}
        self._records: dict[str, bytes | None] = {}
        self._until: dict[str, float] = {}
        self._ttl = ttl

    @property
    def due(self) -> float:
        """The moment at which the next one is forgotten."""
        return min(self._until.values(), default=math.inf) if self._ttl else math.inf

    def is_same(self, entry: Entry) -> bool:
        """Whether it is a heartbeat alone."""
        same = entry.value is not None and self._records.get(entry.key) == entry.value
        if same and self._ttl:
            self._until[entry.key] = time.monotonic() + self._ttl
        return same

    def hold(self, entry: Entry, node: Node | None) -> Iterator[Change]:
        """Know of what a key holds now."""
        before = self.nodes.get(entry.key)
        if node is None:
            yield from self._forget(entry.key)
            return
        self.nodes[entry.key] = node
        self._records[entry.key] = entry.value
        if self._ttl:
            self._until[entry.key] = time.monotonic() + self._ttl
        if before != node:
            yield Change(kind="update" if before else "create", node=node)

    def expired(self) -> Iterator[Change]:
        """Forget who was silent for too long."""
        if self._ttl:
            now = time.monotonic()
            for key in [key for key, until in self._until.items() if until <= now]:
                yield from self._forget(key)

    def _forget(self, key: str) -> Iterator[Change]:
        self._records.pop(key, None)
        self._until.pop(key, None)
        before = self.nodes.pop(key, None)
        if before is not None:
            yield Change(kind="delete", node=before)
