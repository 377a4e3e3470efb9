"""The suite of the way to servers, to real ones of NATS, for both registries."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from micro.registry import Registry
from micro.testing import AccessSuite, NewServer
from micro.testing.servers import NatsServer
from micro_plugin_nats import NatsKVRegistry, NatsRegistry


class TestNatsAccess(AccessSuite):
    backend: type[Registry] = NatsRegistry
    libraries = ("nats",)
    port = 4222

    @pytest.fixture
    def url(self, nats_url: str) -> str:
        return nats_url

    @pytest.fixture
    def server(self, nats: NatsServer) -> NatsServer:
        return nats

    @pytest.fixture(scope="class")
    @classmethod
    def new_server(cls, nats_binary: Path) -> NewServer:
        return partial(NatsServer, nats_binary)

    @pytest.fixture
    def login_url(self, login_url: str) -> str:
        return login_url


class TestNatsKVAccess(TestNatsAccess):
    backend = NatsKVRegistry

    @pytest.fixture
    def url(self, kv_url: str) -> str:
        return kv_url

    @pytest.fixture
    def login_url(self, login_url: str) -> str:
        return f"nats-kv{login_url.removeprefix('nats')}"
