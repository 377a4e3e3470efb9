"""What holds of the plugin without a server."""

from __future__ import annotations

import asyncio

import pytest

import micro
from micro.backend import Connections
from micro.url import URL
from micro_plugin_nats import NatsKVRegistry, NatsRegistry

SCHEMES = {"nats": NatsRegistry, "nats-kv": NatsKVRegistry}


def connect(url: str) -> None:
    parsed = URL.parse(url, source="--registry")
    asyncio.run(SCHEMES[parsed.scheme](parsed).connect(Connections()))


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
