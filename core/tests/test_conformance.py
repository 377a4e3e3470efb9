"""Every suite on every embedded backend."""

from __future__ import annotations

import pytest

from micro.backends.http import HTTPTransport
from micro.backends.memory import MemoryRegistry, MemoryTransport
from micro.testing import RegistrySuite, TransportSuite


class TestMemoryRegistry(RegistrySuite):
    backend = MemoryRegistry

    @pytest.fixture
    def url(self) -> str:
        return "memory://suite"


class TestMemoryTransport(TransportSuite):
    backend = MemoryTransport


class TestHTTPTransport(TransportSuite):
    backend = HTTPTransport
