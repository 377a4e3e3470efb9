"""The registry: an entry of Go Micro for each node, under a lease that a heartbeat keeps."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import msgspec

from micro.backend import Connections
from micro.errors import Closed, DecodeError, NotFound, ServiceNotFound, Unavailable, Unsupported
from micro.record import decode_node, encode_node
from micro.registry import (
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_service,
    check_ttl,
    in_order,
)
from micro.url import URL
from micro_plugin_etcd._options import EtcdOptions

if TYPE_CHECKING:
    from micro_plugin_etcd._api import Etcd
    from micro_plugin_etcd._history import Event, Mark

_log = logging.getLogger("micro.etcd")


class _Held(NamedTuple):
    """A node as it was registered: its record, and its lease."""

    node: Node
    record: bytes
    lease: int
    ttl: float


class EtcdRegistry(Registry):
    """Nodes in etcd 3.4 or later, each under a lease of its own.

    Without a path the keys are Go Micro's, ``/micro/registry/<service>/<id>``; a path is a
    namespace: it stands before them. ``dropped`` counts entries of others that are no nodes.
    """

    schemes: ClassVar[tuple[str, ...]] = ("etcd",)
    Options: ClassVar[type[msgspec.Struct]] = EtcdOptions
    features: RegistryFeatures = RegistryFeatures(min_ttl=2.0, converge=1.0, history=True)

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.dropped: int = 0
        self._root = f"/{url.path}/micro/registry/" if url.path else "/micro/registry/"
        self._etcd: Etcd | None = None
        self._held: dict[tuple[str, str], _Held] = {}

    async def connect(self, connections: Connections) -> None:
        from micro_plugin_etcd._api import Etcd
        from micro_plugin_etcd._client import connected

        options = self.url.options(EtcdOptions)
        server = msgspec.structs.replace(self.url, path="")
        key = msgspec.structs.replace(server, source="")
        etcd = Etcd(await connections.get(key, lambda: connected(server, options)))
        await etcd.check(self._prefix(None))
        self._etcd = etcd

    async def aclose(self) -> None:
        etcd, self._etcd = self._etcd, None
        self._held.clear()
        if etcd is not None:
            etcd.close()

    async def register(self, node: Node, *, ttl: float) -> None:
        etcd, name = self._open(), (node.service, node.id)
        check_ttl(ttl, self.features)
        held = self._held.get(name)
        if held is not None and held.node is not node:  # else it is a heartbeat
            held = self._held[name] = held._replace(node=node, record=encode_node(node))
        if held is not None and held.ttl == ttl and await etcd.keep_alive(held.lease):
            try:
                await etcd.ensure(self._key(node), held.record, held.lease)
            except NotFound:
                _log.debug("%s: the lease of %s ended during a heartbeat", self.url, node.id)
            else:
                return
        await self._register_anew(etcd, node, ttl)

    async def _register_anew(self, etcd: Etcd, node: Node, ttl: float) -> None:
        record = encode_node(node)
        id_, granted = await etcd.grant(math.ceil(ttl))
        if granted > 2 * ttl:
            await etcd.revoke(id_)
            raise Unsupported(
                f"etcd: this server keeps a node for {granted} s at least, for its election "
                f"timeout; set register_ttl to that, from {ttl:g} s"
            )
        before = self._held.get((node.service, node.id))
        self._held[node.service, node.id] = _Held(node, record, id_, ttl)
        try:
            await etcd.ensure(self._key(node), record, id_)
        except NotFound as exc:
            raise Unavailable(f"etcd: the lease of {granted} s ended at once: {exc}") from exc
        if before is not None:
            await etcd.revoke(before.lease)

    async def deregister(self, node: Node) -> None:
        check_service(node.service)  # the id may be one of Go Micro's, which are longer than ours
        etcd = self._open()
        await etcd.delete(self._key(node))
        held = self._held.pop((node.service, node.id), None)
        if held is not None:
            await etcd.revoke(held.lease)

    async def get(self, service: str) -> tuple[Node, ...]:
        found = await self._open().read(self._prefix(check_service(service)))
        nodes = self._nodes(found.entries)
        if not nodes:
            raise ServiceNotFound(f"service {service!r} is not registered with {self.url}")
        return nodes

    async def services(self) -> tuple[str, ...]:
        found = await self._open().read(self._prefix(None))
        return tuple(sorted({node.service for node in self._nodes(found.entries)}))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        etcd = self._open()
        prefix = self._prefix(None if service is None else check_service(service))
        if mark is None:
            found = await etcd.read(prefix)
            yield found.mark, Snapshot(nodes=self._nodes(found.entries))
            known = found.mark
        else:
            known = cast("Mark", mark)
            await etcd.check_mark(prefix, known)
        async with aclosing(self._since(prefix, known)) as changes:
            async for item in changes:
                if mark is not None or item[1] is not None:  # a snapshot proves enough
                    yield item

    async def _since(
        self, prefix: bytes, mark: Mark
    ) -> AsyncGenerator[tuple[Mark, Change | None], None]:
        """Every change after ``mark``; None first, when the server has agreed."""
        try:
            async with aclosing(self._open().watch(prefix, mark)) as events:
                async for event in events:
                    self._open()
                    change = None if event is None else self._change(event)
                    if event is None or change is not None:
                        yield (mark if event is None else event.mark), change
        except Unavailable:
            self._open()  # what broke may be our own end
            raise

    def _change(self, event: Event) -> Change | None:
        """What an event means for nodes; an entry that stops being one is a delete."""
        now = None if event.now is None else self._node(event.key, event.now)
        before = None if event.before is None else self._node(event.key, event.before)
        if now is not None:
            return Change(kind="create" if before is None else "update", node=now)
        return None if before is None else Change(kind="delete", node=before)

    def _nodes(self, entries: Iterable[tuple[bytes, bytes]]) -> tuple[Node, ...]:
        found = (self._node(key, value) for key, value in entries)
        return in_order(node for node in found if node is not None)

    def _node(self, key: bytes, record: bytes) -> Node | None:
        """The node of an entry; None, and counted, when somebody wrote something else there."""
        try:
            node = decode_node(record)
        except DecodeError as exc:
            self.dropped += 1
            _log.debug("%s: entry %r: %s", self.url, key[:200], exc)
            return None
        if self._key(node) != key:
            self.dropped += 1
            _log.debug("%s: entry %r says that it is %s", self.url, key[:200], node.id)
            return None
        return node

    def _prefix(self, service: str | None) -> bytes:
        return (self._root if service is None else f"{self._root}{service}/").encode()

    def _key(self, node: Node) -> bytes:
        return f"{self._root}{node.service}/{node.id}".encode()

    def _open(self) -> Etcd:
        if self._etcd is None:
            raise Closed("etcd: the registry is not connected")
        return self._etcd
