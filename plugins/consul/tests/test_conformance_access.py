"""The suite of the way to servers, to real agents of Consul."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from micro.testing import AccessSuite, NewServer
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry


class TestConsulAccess(AccessSuite):
    backend = ConsulRegistry
    libraries = ("aiohttp",)
    port = 8500
    file_option = "token_file"

    @pytest.fixture
    def url(self, consul_url: str) -> str:
        return consul_url

    @pytest.fixture
    def server(self, consul: ConsulServer) -> ConsulServer:
        return consul

    @pytest.fixture(scope="class")
    @classmethod
    def new_server(cls, consul_binary: Path) -> NewServer:
        return partial(ConsulServer, consul_binary)

    @pytest.fixture
    def login_url(self, login_url: str) -> str:
        return login_url
