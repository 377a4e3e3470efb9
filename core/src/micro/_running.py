"""One run of a service: its settings, resolved, and its backends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from micro.backend import Backend
from micro.errors import ConfigError
from micro.plugins import Plugins
from micro.port import SocketTransport
from micro.registry import Registry
from micro.retries import Retries
from micro.selector import Selector
from micro.tls import TLS
from micro.transport import Limits, Transport

if TYPE_CHECKING:
    from micro.secured import Secured
    from micro.settings import Settings

B = TypeVar("B", bound=Backend[Any])


class Code(msgspec.Struct, frozen=True, kw_only=True):
    """What the program gave to Service; None where it said nothing."""

    registry: Any
    transport: Any
    version: str | None
    id: str | None
    address: str | None
    advertise: str | None
    metadata: Mapping[str, str]
    register_ttl: float | None
    register_interval: float | None
    request_timeout: float | None
    retries: Retries
    selector: Selector
    tls: TLS | None
    limits: Limits


class Running:
    """One run of a service: its settings, resolved, and its backends, opened when asked for."""

    def __init__(self, name: str, code: Code, settings: Settings, plugins: Plugins) -> None:
        self.name = settings.text("server_name", name)
        self.version = settings.text("server_version", code.version, "latest")
        self.id = settings.text("server_id", code.id, _new_id())
        self.address = settings.text("server_address", code.address, "127.0.0.1:0")
        self.advertise = settings.text("server_advertise", code.advertise)
        self.metadata = settings.pairs("server_metadata", code.metadata)
        self.insecure = settings.switch("server_insecure")
        self.register_ttl = settings.duration("register_ttl", code.register_ttl, 30.0)
        third = self.register_ttl / 3
        self.interval = settings.duration("register_interval", code.register_interval, third)
        self.request_timeout = settings.duration(
            "client_request_timeout", code.request_timeout, 5.0
        )
        attempts = settings.number("client_retries", code.retries.attempts - 1) + 1
        self.retries: Retries = msgspec.structs.replace(code.retries, attempts=attempts)
        self.selector: Selector = code.selector
        size = settings.size("max_message_size", code.limits.message)
        self.limits = msgspec.structs.replace(code.limits, message=size)
        if self.interval > self.register_ttl / 2:
            raise ConfigError(
                f"register_interval {self.interval:g} s is more than half of register_ttl "
                f"{self.register_ttl:g} s; one lost heartbeat would lose the node"
            )
        self._code = code
        self._connections = plugins.connections()
        self._opening = asyncio.Lock()
        self._open: list[Backend[Any]] = []
        self._registry = _backend(Registry, code.registry, settings, plugins, "mdns")
        self._transports = _transports(code.transport, settings, plugins)
        crosses = any(transport.features.multi_process for transport in self._transports)
        #: None: calls are not encrypted, or do not leave the process.
        self.tls: Secured | None = _secured(code.tls, settings) if crosses else None

    async def open_given(self) -> None:
        """Open what the code names; the rest opens at first use."""
        if self._code.registry is not None:
            await self.registry()
        if self._code.transport is not None:
            await self.transports()

    async def registry(self) -> Registry:
        return await self._opened(self._registry)

    async def transports(self) -> Sequence[Transport]:
        return [await self._opened(transport) for transport in self._transports]

    async def aclose(self) -> None:
        while self._open:
            await self._open.pop().aclose()
        await self._connections.aclose()

    async def _opened(self, backend: B) -> B:
        if backend not in self._open:
            async with self._opening:
                if backend not in self._open:
                    await backend.connect(self._connections)
                    self._open.append(backend)
        return backend


def _backend(
    kind: type[B], code: B | str | None, settings: Settings, plugins: Plugins, default: str
) -> B:
    if isinstance(code, kind):
        return code
    if code is not None and not isinstance(code, str):
        raise ConfigError(f"code: {code!r} is no {kind.__name__}; give one, or a URL as text")
    return plugins.create(kind, settings.url(kind.__name__.lower(), code, default))


def _transports(code: object, settings: Settings, plugins: Plugins) -> Sequence[Transport]:
    """The transports, the best first; several of them share one port."""
    if code is not None and not isinstance(code, str):
        if not isinstance(code, Transport):
            raise ConfigError(f"code: {code!r} is no Transport; give one, or a URL as text")
        return [code]
    urls = settings.urls("transport", code, "tcp,http")
    kind: type[Transport] = Transport  # type: ignore[type-abstract]
    found = [plugins.create(kind, url) for url in urls]
    for transport in found:
        if len(found) > 1 and not isinstance(transport, SocketTransport):
            raise ConfigError(
                f"{transport.url.source}: transport {transport.url} cannot share a port with others"
            )
    return found


def _secured(code: TLS | None, settings: Settings) -> Secured | None:
    """TLS as it is asked for; None where it is not."""
    weakest = code or TLS()
    paths = {"cert": weakest.cert, "key": weakest.key, "ca": weakest.ca}
    given = {
        name: settings.text(f"tls_{name}_file", os.fspath(path) or None)
        for name, path in paths.items()
    }
    anonymous = settings.switch("tls_anonymous", default=weakest.anonymous)
    if code is None and not any(one.text for one in given.values()):
        return None
    from micro.secured import Secured

    cert, key, ca = (given[name].text for name in ("cert", "key", "ca"))
    sources = {name: one.source for name, one in given.items() if one.text}
    return Secured(TLS(cert=cert, key=key, ca=ca, anonymous=anonymous), sources)


def _new_id() -> str:
    import uuid

    return str(uuid.uuid4())
