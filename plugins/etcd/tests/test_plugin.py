"""What holds of the plugin without a server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

import micro
import micro_plugin_etcd
from micro.backend import Connections
from micro.registry import Node, Registry
from micro.url import URL
from micro_plugin_etcd import EtcdOptions, EtcdRegistry

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")


@pytest.mark.parametrize("plugins", [micro.Plugins(micro_plugin_etcd), micro.Plugins()])
def test_the_scheme_selects_the_registry(plugins: micro.Plugins) -> None:
    kind: type[Any] = Registry
    registry = plugins.create(kind, URL.parse("etcd://127.0.0.1:1"))
    assert isinstance(registry, EtcdRegistry)


def test_grpc_and_protobuf_are_loaded_by_the_first_that_connects() -> None:
    program = "import micro_plugin_etcd, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert "micro_plugin_etcd" in loaded
    assert not [name for name in loaded if f"{name}.".startswith(("grpc.", "google."))]


def test_an_unknown_option_is_refused_before_anything_is_connected() -> None:
    registry = EtcdRegistry(URL.parse("etcd://127.0.0.1:1?timout=2s"))
    with pytest.raises(micro.ConfigError, match="did you mean 'timeout'"):
        asyncio.run(registry.connect(Connections()))


def test_before_it_is_connected_it_is_closed() -> None:
    registry = EtcdRegistry(URL.parse("etcd"))
    with pytest.raises(micro.Closed):
        asyncio.run(registry.services())
    with pytest.raises(micro.Closed):
        asyncio.run(registry.register(NODE, ttl=5))
    asyncio.run(registry.aclose())


@pytest.mark.parametrize("query", ["tls=true", "ca=a.pem", "cert=a.pem&key=b.pem"])
def test_tls_is_on_by_option_or_by_file(query: str) -> None:
    assert URL.parse(f"etcd://a?{query}").options(EtcdOptions).wants_tls


def test_tls_is_off_by_default() -> None:
    assert not URL.parse("etcd://a?timeout=250ms").options(EtcdOptions).wants_tls
    assert URL.parse("etcd://a?timeout=250ms").options(EtcdOptions).timeout == 0.25
