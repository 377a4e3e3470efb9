"""What holds of the plugin without a server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

import micro
import micro_plugin_consul
from micro.backend import Connections
from micro.registry import Node, Registry
from micro.settings import Settings
from micro.url import URL
from micro_plugin_consul import ConsulOptions, ConsulRegistry, micro_backends

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")


def test_the_hook_gives_the_registry() -> None:
    assert micro_backends() == [ConsulRegistry]


@pytest.mark.parametrize("plugins", [micro.Plugins(micro_plugin_consul), micro.Plugins()])
def test_the_scheme_selects_the_registry(plugins: micro.Plugins) -> None:
    kind: type[Any] = Registry
    registry = plugins.create(kind, URL.parse("consul://127.0.0.1:1"))
    assert isinstance(registry, ConsulRegistry)


def test_aiohttp_is_loaded_by_the_first_that_connects() -> None:
    program = "import micro_plugin_consul, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert "micro_plugin_consul" in loaded
    assert not [name for name in loaded if name.split(".")[0] == "aiohttp"]


def test_an_unknown_option_is_refused_before_anything_is_connected() -> None:
    registry = ConsulRegistry(URL.parse("consul://127.0.0.1:1?timout=2s"))
    with pytest.raises(micro.ConfigError, match="did you mean 'timeout'"):
        asyncio.run(registry.connect(Connections()))


def test_before_it_is_connected_it_is_closed() -> None:
    registry = ConsulRegistry(URL.parse("consul"))
    with pytest.raises(micro.Closed):
        asyncio.run(registry.services())
    with pytest.raises(micro.Closed):
        asyncio.run(registry.register(NODE, ttl=5))
    asyncio.run(registry.aclose())


@pytest.mark.parametrize("query", ["tls=true", "ca=a.pem", "cert=a.pem&key=b.pem"])
def test_tls_is_on_by_option_or_by_file(query: str) -> None:
    assert URL.parse(f"consul://a?{query}").options(ConsulOptions).wants_tls


def test_tls_is_off_by_default() -> None:
    assert not URL.parse("consul://a?timeout=250ms").options(ConsulOptions).wants_tls
    assert URL.parse("consul://a?timeout=250ms").options(ConsulOptions).timeout == 0.25


def test_what_selects_consul_for_go_micro_does_so_here() -> None:
    environment = {"MICRO_REGISTRY": "consul", "MICRO_REGISTRY_ADDRESS": "10.0.0.1:8500,b:8500"}
    url = Settings(environment=environment).url("registry", None, "mdns")
    assert (url.scheme, url.hosts, url.path) == ("consul", ("10.0.0.1:8500", "b:8500"), "")
