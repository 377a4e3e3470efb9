"""The suite of registries on a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from micro.testing import RegistrySuite
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry

Ask = Callable[..., dict[str, Any]]


class TestEtcdRegistry(RegistrySuite):
    backend = EtcdRegistry
    model_examples = 10

    @pytest.fixture
    def url(self, etcd_url: str) -> str:
        return etcd_url

    @pytest.fixture
    def server(self, etcd: EtcdServer) -> EtcdServer:
        return etcd

    @pytest.fixture
    def garbage(
        self, etcd: EtcdServer, ask: Ask, prefix: bytes
    ) -> Callable[[str], Awaitable[None]]:
        def write(service: str) -> None:
            for number, record in enumerate(
                [b"", b"no JSON", b"{}", b'{"name": ".", "nodes": []}']
            ):
                key = prefix + f"{service}/{number}".encode()
                ask(etcd, "kv/put", key=key, value=record)

        return lambda service: asyncio.to_thread(write, service)

    @pytest.fixture
    def compact(self, etcd: EtcdServer, ask: Ask) -> Callable[[], Awaitable[None]]:
        def forget() -> None:
            now = ask(etcd, "kv/range", key=b"none")["header"]["revision"]
            ask(etcd, "kv/compaction", revision=now)

        return lambda: asyncio.to_thread(forget)

    @pytest.fixture
    def bad_credentials_url(self, login_url: str) -> str:
        return login_url.replace("@", "-wrong@")
