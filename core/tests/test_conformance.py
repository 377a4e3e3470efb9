"""Every suite on every embedded backend, but for mdns, which takes its time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from micro.backends import _tcp_client
from micro.backends.http import HTTPTransport
from micro.backends.memory import MemoryRegistry, MemoryTransport
from micro.backends.tcp import TCPTransport
from micro.registry import Node, Registry
from micro.testing import RegistrySuite, TransportSuite


class TestMemoryRegistry(RegistrySuite):
    backend = MemoryRegistry

    @pytest.fixture
    def url(self) -> str:
        return "memory://suite"

    @pytest.fixture
    def compact(self, registry: Registry) -> Callable[[], Awaitable[None]]:
        async def flood() -> None:
            for number in range(1100):
                node = Node(service="flood", id="a", address="127.0.0.1:1", version=str(number))
                await registry.register(node, ttl=30)

        return flood


class TestMemoryTransport(TransportSuite):
    backend = MemoryTransport
    window = 512 * 1024


class TestTCPTransport(TransportSuite):
    backend = TCPTransport
    window = 1024 * 1024

    @pytest.fixture
    def hasty_url(self, url: str, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setattr(_tcp_client, "_LOOK", 0.25)
        return url


class TestHTTPTransport(TransportSuite):
    backend = HTTPTransport
    multiplexed = False
