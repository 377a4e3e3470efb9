"""The suite of the way to servers, to real etcds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from micro.testing import AccessSuite, NewServer
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry


class TestEtcdAccess(AccessSuite):
    backend = EtcdRegistry
    libraries = ("grpc", "google")
    port = 2379

    @pytest.fixture
    def url(self, etcd_url: str) -> str:
        return etcd_url

    @pytest.fixture
    def server(self, etcd: EtcdServer) -> EtcdServer:
        return etcd

    @pytest.fixture(scope="class")
    @classmethod
    def new_server(cls, etcd_binary: Path) -> NewServer:
        return partial(EtcdServer, etcd_binary)

    @pytest.fixture
    def login_url(self, login_url: str) -> str:
        return login_url
