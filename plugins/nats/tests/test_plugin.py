"""What holds of the plugin without a server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

import micro
import micro_plugin_nats
from micro.backend import Connections
from micro.registry import Node, Registry
from micro.url import URL
from micro_plugin_nats import NatsKVOptions, NatsKVRegistry, NatsOptions, NatsRegistry

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
SCHEMES = {"nats": NatsRegistry, "nats-kv": NatsKVRegistry}


def connect(url: str) -> None:
    parsed = URL.parse(url, source="--registry")
    asyncio.run(SCHEMES[parsed.scheme](parsed).connect(Connections()))


@pytest.mark.parametrize("plugins", [micro.Plugins(micro_plugin_nats), micro.Plugins()])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_selects_the_registry(plugins: micro.Plugins, scheme: str) -> None:
    kind: type[Any] = Registry
    registry = plugins.create(kind, URL.parse(f"{scheme}://127.0.0.1:1"))
    assert type(registry) is SCHEMES[scheme]


def test_nats_py_is_loaded_by_the_first_that_connects() -> None:
    program = "import micro_plugin_nats, sys; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert "micro_plugin_nats" in loaded
    assert not [name for name in loaded if f"{name}.".startswith("nats.")]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_unknown_option_is_refused_before_anything_is_connected(scheme: str) -> None:
    with pytest.raises(micro.ConfigError, match="did you mean 'timeout'"):
        connect(f"{scheme}://127.0.0.1:1?timout=2s")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", ["a.b", "a//b", "ü", "a%20b", "a*", ">"])
def test_a_namespace_that_is_no_subject_is_refused(scheme: str, path: str) -> None:
    with pytest.raises(micro.ConfigError, match=r"--registry: .*: namespace: write labels"):
        connect(f"{scheme}://127.0.0.1:1/{path}")


@pytest.mark.parametrize(
    ("query", "text"), [("bucket=a.b", "write 1 to 64"), ("bucket_ttl=500ms", "1 s at least")]
)
def test_a_bucket_that_cannot_be_made_is_refused(query: str, text: str) -> None:
    with pytest.raises(micro.ConfigError, match=text):
        connect(f"nats-kv://127.0.0.1:1?{query}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_user_without_a_password_is_refused_and_not_told(scheme: str) -> None:
    with pytest.raises(micro.ConfigError, match="a token is written :token@host") as caught:
        connect(f"{scheme}://canary@127.0.0.1:1")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_before_it_is_connected_it_is_closed(scheme: str) -> None:
    registry = SCHEMES[scheme](URL.parse(scheme))
    with pytest.raises(micro.Closed):
        asyncio.run(registry.services())
    with pytest.raises(micro.Closed):
        asyncio.run(registry.register(NODE, ttl=5))
    asyncio.run(registry.aclose())


@pytest.mark.parametrize("query", ["tls=true", "ca=a.pem", "cert=a.pem&key=b.pem"])
def test_tls_is_on_by_option_or_by_file(query: str) -> None:
    assert URL.parse(f"nats://a?{query}").options(NatsOptions).wants_tls
    assert URL.parse(f"nats-kv://a?{query}").options(NatsKVOptions).wants_tls


def test_tls_is_off_by_default() -> None:
    assert not URL.parse("nats://a?timeout=250ms").options(NatsOptions).wants_tls
    assert URL.parse("nats://a?timeout=250ms").options(NatsOptions).timeout == 0.25
