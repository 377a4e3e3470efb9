"""Every suite on every embedded backend."""

from __future__ import annotations

import uuid

import pytest

from micro.backends.http import HTTPTransport
from micro.backends.mdns import MDNSRegistry
from micro.backends.memory import MemoryRegistry, MemoryTransport
from micro.testing import RegistrySuite, TransportSuite


class TestMemoryRegistry(RegistrySuite):
    backend = MemoryRegistry

    @pytest.fixture
    def url(self) -> str:
        return "memory://suite"


class TestMDNSRegistry(RegistrySuite):
    backend = MDNSRegistry

    @pytest.fixture
    def url(self) -> str:
        return f"mdns:///{uuid.uuid4().hex[:3]}"

    @pytest.fixture
    def namespaced_url(self, url: str) -> str:
        return f"{url}x"


class TestMemoryTransport(TransportSuite):
    backend = MemoryTransport


class TestHTTPTransport(TransportSuite):
    backend = HTTPTransport
