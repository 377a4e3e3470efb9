"""What the tests of the plugin share: a connected registry, and a way to Consul behind its back."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from micro.backend import Connections
from micro.testing.servers import ConsulServer
from micro.url import URL
from micro_plugin_consul import ConsulRegistry

_CRITICAL = "health/state/critical"
_ROOT = "00000000-0000-0000-0000-000000000001"
_ACLS = (
    'acl { enabled = true, default_policy = "deny", '
    f'tokens {{ initial_management = "{_ROOT}", agent = "{_ROOT}" }} }}'
)


class Told(NamedTuple):
    """``said`` is the JSON, or the text of what is none."""

    status: int
    said: Any
    headers: dict[str, str]


class Between:
    """Stands before the real agent, and says now and then what that one would say in a bad hour."""

    def __init__(self, server: ConsulServer, session: aiohttp.ClientSession) -> None:
        self.asked: list[str] = []
        #: What an answer is instead; None: it stays.
        self.instead: Callable[[web.Request], web.Response | None] = lambda _: None
        self.address: str = ""
        self._upstream = f"http://{server.address}"
        self._session = session

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path_qs}")
        if (lie := self.instead(request)) is not None:
            return lie
        url, body = self._upstream + request.path_qs, await request.read()
        async with self._session.request(request.method, url, data=body) as told:
            said = await told.read()
            headers = {k: v for k, v in told.headers.items() if k.startswith("X-Consul")}
        return self.instead(request) or web.Response(status=told.status, body=said, headers=headers)


@pytest.fixture(scope="session")
def ask() -> Callable[..., Told]:
    """``ask(server, "GET", "catalog/services", body=None, token="")``."""
    return _ask


@pytest.fixture(scope="session")
def connected() -> Callable[..., AbstractAsyncContextManager[ConsulRegistry]]:
    """``async with connected(url) as registry``; a second argument are connections to share."""
    return _connected


@pytest_asyncio.fixture
async def registry(consul_url: str) -> AsyncIterator[ConsulRegistry]:
    """A registry with a namespace of its own."""
    async with _connected(consul_url) as registry:
        yield registry


@pytest_asyncio.fixture
async def between(consul: ConsulServer, consul_url: str) -> AsyncIterator[Between]:
    """Stands before ``consul``; ``instead`` says what it answers otherwise."""
    async with aiohttp.ClientSession() as session:
        agent = Between(consul, session)
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", agent.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        agent.address = "{}:{}".format(*runner.addresses[0])
        try:
            yield agent
        finally:
            await runner.cleanup()


@pytest.fixture
def settled(consul: ConsulServer) -> ConsulServer:
    """``consul``, once its agent tells the servers at once what expires.

    For up to 3 s after a server came, and for 15 s and more after it could not tell them all, it
    tells only what it is asked to. Source: agent/ae/ae.go of Consul, serverUpInterval and
    retryFailInterval; seen in its log.
    """
    check = {"ID": "settled", "Name": "settled", "TTL": "10ms", "Status": "passing"}
    assert _ask(consul, "PUT", "agent/check/register", body=check).status == 200
    end = time.monotonic() + 40
    while not any(c["CheckID"] == "settled" for c in _ask(consul, "GET", _CRITICAL).said):
        assert time.monotonic() < end, "the agent does not tell its servers what expires"
        time.sleep(0.01)
    assert _ask(consul, "PUT", "agent/check/deregister/settled").status == 200
    return consul


@pytest.fixture(scope="module")
def login_url(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of who may do all, where a token is asked for."""
    with ConsulServer(consul_binary, tmp_path_factory.mktemp("locked"), hcl=[_ACLS]) as server:
        yield f"consul://:{_ROOT}@{server.address}"


@pytest.fixture
def prefix(consul_url: str) -> str:
    """What the names of the services of ``registry`` begin with."""
    return f"{URL.parse(consul_url).path}/"


def _ask(
    server: ConsulServer, method: str, path: str, *, body: object = None, token: str = ""
) -> Told:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as client:
        headers = {"X-Consul-Token": token} if token else {}
        said = None if body is None else json.dumps(body)
        client.request(method, f"/v1/{path}", said, headers)
        answer = client.getresponse()
        text = answer.read().decode()
        try:
            told = json.loads(text)
        except ValueError:
            told = text
        return Told(answer.status, told, dict(answer.getheaders()))


@asynccontextmanager
async def _connected(
    url: str, connections: Connections | None = None
) -> AsyncIterator[ConsulRegistry]:
    registry = ConsulRegistry(URL.parse(url, source="--registry"))
    shared = connections or Connections()
    try:
        await registry.connect(shared)
        yield registry
    finally:
        await registry.aclose()
        if connections is None:
            await shared.aclose()
