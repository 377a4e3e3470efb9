"""What the tests of the plugin share: a connected registry, and a way to etcd behind its back."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import pytest_asyncio

from micro.backend import Connections
from micro.testing.servers import EtcdServer
from micro.url import URL
from micro_plugin_etcd import EtcdRegistry

_BYTES = ("key", "value")
#: It has all that a URL has to quote.
_SECRET = "canary:/@?&=% 7f3b"


@pytest.fixture(scope="session")
def ask() -> Callable[..., dict[str, Any]]:
    """``ask(server, "kv/put", key=b"a", value=b"b", token="")``, by etcd's gateway for JSON."""
    return _ask


@pytest.fixture(scope="session")
def connected() -> Callable[..., AbstractAsyncContextManager[EtcdRegistry]]:
    """``async with connected(url) as registry``; a second argument are connections to share."""
    return _connected


@pytest_asyncio.fixture
async def registry(etcd_url: str) -> AsyncIterator[EtcdRegistry]:
    """A registry with a namespace of its own."""
    async with _connected(etcd_url) as registry:
        yield registry


@pytest.fixture(scope="module")
def login_url(etcd_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of who may do all, where a login is asked for."""
    with EtcdServer(etcd_binary, tmp_path_factory.mktemp("locked")) as server:
        _ask(server, "auth/user/add", name="root", password=_SECRET)
        _ask(server, "auth/role/add", name="root")
        _ask(server, "auth/user/grant", user="root", role="root")
        _ask(server, "auth/enable")
        yield f"etcd://root:{quote(_SECRET, safe='')}@{server.address}"


@pytest.fixture
def prefix(etcd_url: str) -> bytes:
    """What the keys of ``registry`` begin with."""
    return f"/{URL.parse(etcd_url).path}/micro/registry/".encode()


def _ask(server: EtcdServer, what: str, *, token: str = "", **said: object) -> dict[str, Any]:
    body = json.dumps(said, default=lambda raw: base64.b64encode(raw).decode())
    headers = {"Authorization": token} if token else {}
    request = Request(f"http://{server.address}/v3/{what}", body.encode(), headers)
    with urlopen(request, timeout=5) as answer:
        told: dict[str, Any] = json.load(answer, object_hook=_decoded)
        return told


def _decoded(told: dict[str, Any]) -> dict[str, Any]:
    """With bytes for base64, and numbers for the texts that 64 bits are in JSON."""
    for name, value in told.items():
        if name in _BYTES:
            told[name] = base64.b64decode(value)
        elif isinstance(value, str) and value.isdecimal():
            told[name] = int(value)
    return told


@asynccontextmanager
async def _connected(
    url: str, connections: Connections | None = None
) -> AsyncIterator[EtcdRegistry]:
    registry = EtcdRegistry(URL.parse(url, source="--registry"))
    shared = connections or Connections()
    try:
        await registry.connect(shared)
        yield registry
    finally:
        await registry.aclose()
        if connections is None:
            await shared.aclose()
