"""The suite of registries on a key-value bucket of a real server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from micro.testing import RegistrySuite
from micro.testing.servers import NatsServer
from micro.url import URL
from micro_plugin_nats import NatsKVRegistry

GARBAGE = [b"", b"no JSON", b"{}", b'{"name": ".", "nodes": []}', b"\xff" * 10]

Publish = Callable[..., Awaitable[None]]


class TestNatsKVRegistry(RegistrySuite):
    backend = NatsKVRegistry
    timeout = 2.0
    model_examples = 10

    @pytest.fixture
    def url(self, nats_url: str) -> str:
        return f"nats-kv{nats_url.removeprefix('nats')}?timeout=2s"

    @pytest.fixture
    def server(self, nats: NatsServer) -> NatsServer:
        return nats

    @pytest.fixture
    def garbage(
        self, nats: NatsServer, url: str, publish: Publish
    ) -> Callable[[str], Awaitable[None]]:
        async def write(service: str) -> None:
            key = f"$KV.micro-registry.{URL.parse(url).path}.{service}"
            subjects = [f"{key}.{number}" for number in range(len(GARBAGE))]
            await publish(nats.address, dict(zip(subjects, GARBAGE, strict=True)))

        return write

    @pytest.fixture
    def bad_credentials_url(self, login_url: str) -> str:
        return f"nats-kv{login_url.removeprefix('nats')}".replace("@", "-wrong@")
