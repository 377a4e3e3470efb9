"""The registry ``nats``: every process answers for its own nodes, on the wire of Go Micro."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, ClassVar

import msgspec

from micro.backend import Connections
from micro.errors import Closed, ConfigError, Gap, MicroError, ServiceNotFound
from micro.registry import (
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_service,
    check_ttl,
)
from micro.url import URL
from micro_plugin_nats import _wire
from micro_plugin_nats._options import NatsOptions

if TYPE_CHECKING:
    from micro_plugin_nats._exchange import Exchange

_log = logging.getLogger("micro.nats")

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


class NatsRegistry(Registry):
    """Nodes whose processes answer for them, as Go Micro's do, which see ours and are seen.

    The server keeps nothing. A path is a namespace of ours, which Go Micro does not see.
    ``dropped`` counts messages of others that tell of no node, or of more than there is room for.
    """

    schemes: ClassVar[tuple[str, ...]] = ("nats",)
    Options: ClassVar[type[msgspec.Struct]] = NatsOptions
    features: RegistryFeatures = RegistryFeatures(min_ttl=1.0, converge=1.0)

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.dropped: int = 0
        self._exchange: Exchange | None = None

    async def connect(self, connections: Connections) -> None:
        from micro_plugin_nats._client import shared
        from micro_plugin_nats._exchange import Exchange

        if self.url.path and not _NAMESPACE.fullmatch(self.url.path):
            raise ConfigError(
                f"{self.url.source}: nats: namespace: write labels of A-Z a-z 0-9 _ -, / between"
            )
        client = await shared(self.url, self.url.options(NatsOptions), connections)
        exchange = Exchange(client, _wire.subjects(self.url.path), self._drop)
        await exchange.open()
        self._exchange = exchange

    async def aclose(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            await exchange.aclose()

    async def register(self, node: Node, *, ttl: float) -> None:
        exchange, until = self._open(), time.monotonic() + check_ttl(ttl, self.features)
        await exchange.say(node, until)

    async def deregister(self, node: Node) -> None:
        check_service(node.service)  # the id may be one of Go Micro's, which are longer than ours
        await self._open().unsay(node)

    async def get(self, service: str) -> tuple[Node, ...]:
        async with self._open().viewing(check_service(service)) as view:
            nodes = view.nodes()
        if not nodes:
            raise ServiceNotFound(f"service {service!r} is not registered: nobody answers for it")
        return nodes

    async def services(self) -> tuple[str, ...]:
        async with self._open().viewing(None) as view:
            return tuple(sorted({node.service for node in view.nodes()}))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        exchange = self._open()
        if mark is not None:
            raise Gap("nats: what was told meanwhile is not known")
        wanted = None if service is None else check_service(service)
        async with exchange.viewing(wanted) as view:
            yield True, Snapshot(nodes=view.begin())
            while True:
                for change in await view.changes():
                    yield True, change

    def _open(self) -> Exchange:
        if self._exchange is None:
            raise Closed("nats: the registry is not connected")
        return self._exchange

    def _drop(self, why: MicroError) -> None:
        self.dropped += 1
        _log.debug("%s: what somebody said does not count: %s", self.url, why)
