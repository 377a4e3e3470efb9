"""The suite of registries, where processes answer for their nodes by way of a real server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from micro.testing import RegistrySuite
from micro.testing.servers import NatsServer
from micro.url import URL
from micro_plugin_nats import NatsRegistry

GARBAGE = [b"", b"no JSON", b"{}", b'{"Service": {"name": "."}, "Action": "create"}', b"\xff" * 10]

Publish = Callable[..., Awaitable[None]]


class TestNatsRegistry(RegistrySuite):
    backend = NatsRegistry
    timeout = 2.0
    kept_by_server = False
    model_examples = 3
    model_steps = 15

    @pytest.fixture
    def url(self, nats_url: str) -> str:
        return f"{nats_url}?timeout=2s"

    @pytest.fixture
    def server(self, nats: NatsServer) -> NatsServer:
        return nats

    @pytest.fixture
    def garbage(
        self, nats: NatsServer, url: str, publish: Publish
    ) -> Callable[[str], Awaitable[None]]:
        root = URL.parse(url).path.replace("/", ".")

        async def write(service: str) -> None:
            subjects = [f"{root}.micro.registry.nats.{kind}" for kind in ("watch", "query")]
            for data in [*GARBAGE, b'{"Service":{"name":"%b"},"Action":7}' % service.encode()]:
                await publish(nats.address, dict.fromkeys(subjects, data))

        return write

    @pytest.fixture
    def bad_credentials_url(self, login_url: str) -> str:
        return login_url.replace("@", "-wrong@")
