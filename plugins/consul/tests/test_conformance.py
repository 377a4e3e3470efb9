"""The suite of registries on a real Consul."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from micro.testing import RegistrySuite
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

GARBAGE: tuple[dict[str, Any], ...] = (
    {"Address": "no host", "Port": 80},
    {"Address": "127.0.0.1"},  # without a port
    {"Address": "127.0.0.1", "Port": 80, "Tags": [f"t-{zlib.compress(b'no JSON').hex()}"]},
    {"Address": "127.0.0.1", "Port": 80, "Tags": [f"v-{zlib.compress(bytes(2**20)).hex()}"]},
)

Ask = Callable[..., Any]


class TestConsulRegistry(RegistrySuite):
    backend = ConsulRegistry
    timeout = 3.0
    silence = 4.5
    model_examples = 5

    @pytest.fixture
    def url(self, consul_url: str, settled: ConsulServer) -> str:
        return f"{consul_url}?timeout=3s"

    @pytest.fixture
    def server(self, consul: ConsulServer) -> ConsulServer:
        return consul

    @pytest.fixture
    def garbage(
        self, consul: ConsulServer, ask: Ask, prefix: str
    ) -> Callable[[str], Awaitable[None]]:
        def write(service: str) -> None:
            for number, said in enumerate(GARBAGE):
                body = {"Name": prefix + service, "ID": f"garbage-{number}", **said}
                ask(consul, "PUT", "agent/service/register", body=body)

        return lambda service: asyncio.to_thread(write, service)

    @pytest.fixture
    def compact(self) -> Callable[[], Awaitable[None]]:
        return lambda: asyncio.sleep(0)  # it never keeps any changes

    @pytest.fixture
    def bad_credentials_url(self, login_url: str) -> str:
        return login_url.replace("@", "-wrong@")
