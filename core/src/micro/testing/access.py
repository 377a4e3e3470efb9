"""What every registry on servers promises of the way to them, as tests."""

from __future__ import annotations

import asyncio
import importlib
import logging
import re
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote

import msgspec
import pytest

from micro.access import ServerOptions
from micro.backend import Connections
from micro.errors import Closed, ConfigError, MicroError, Unavailable
from micro.plugins import Plugins
from micro.registry import Registry
from micro.testing._access_tls import NewServer, TLSCases
from micro.testing._nodes import new_node
from micro.testing.lifecycle import SLACK, nobody
from micro.testing.servers import Server
from micro.url import URL

C = TypeVar("C")

__all__ = ["AccessSuite", "NewServer"]

_Call = Callable[[], Awaitable[object]]


class AccessSuite(TLSCases):
    """How a registry on servers gets there, with the options of ``micro.access.ServerOptions``.

    ::

        class TestEtcdAccess(AccessSuite):
            backend = EtcdRegistry
            libraries = ("grpc",)
            port = 2379

            @pytest.fixture
            def url(self, etcd_url: str) -> str:  # a namespace of its own for each test
                return etcd_url

            @pytest.fixture
            def server(self, etcd: EtcdServer) -> EtcdServer:  # the server at url
                return etcd

            @pytest.fixture(scope="class")
            @classmethod
            def new_server(cls, etcd_binary: Path) -> NewServer:  # more servers, also with TLS
                return partial(EtcdServer, etcd_binary)

            @pytest.fixture
            def login_url(self, locked: EtcdServer) -> str:  # with the secret of who may do all
                return f"etcd://me:secret@{locked.address}"

    All of them are needed.
    """

    #: What the plugin imports first when it connects.
    libraries: ClassVar[Sequence[str]]
    #: Where the server listens by itself.
    port: ClassVar[int]
    #: The option that names a file with the secret.
    file_option: ClassVar[str] = "password_file"

    @pytest.fixture
    def login_url(self) -> str:
        raise TypeError(f"{type(self).__name__} must give the fixture 'login_url'")

    @asynccontextmanager
    async def in_use(
        self, url: str, server: Server, connections: Connections
    ) -> AsyncIterator[list[_Call]]:
        """Calls of each method, a heartbeat among them, while the server is paused."""
        async with self.joined(url, connections) as registry:
            node = new_node()
            await registry.register(node, ttl=60)
            await asyncio.to_thread(server.pause)
            try:
                yield [lambda: registry.register(node, ttl=60), *self.calls(registry)]
            finally:
                server.resume()

    # -- without a server

    def test_scheme_selects_it(self) -> None:
        kind: type[Any] = Registry
        given = Plugins(importlib.import_module(_package(self.backend)))
        for plugins in (given, Plugins()):
            made = plugins.create(kind, URL.parse(f"{self.backend.schemes[0]}://127.0.0.1:1"))
            assert type(made) is self.backend

    def test_library_is_loaded_by_the_first_that_connects(self) -> None:
        package = _package(self.backend)
        program = f"import {package}, sys; print(*sys.modules)"
        told = subprocess.check_output([sys.executable, "-c", program], text=True)  # noqa: S603
        loaded = {name.partition(".")[0] for name in told.split()}
        assert package in loaded
        assert loaded.isdisjoint(self.libraries)

    @pytest.mark.parametrize("query", ["", "tls=true", "ca=a.pem", "cert=a.pem&key=b.pem"])
    def test_tls_is_on_by_option_or_by_file(self, query: str) -> None:
        url = URL.parse(f"{self.backend.schemes[0]}://a?timeout=250ms&{query}")
        options = url.options(self.backend.Options)
        assert isinstance(options, ServerOptions)
        assert options.timeout == 0.25
        assert options.wants_tls == bool(query)

    @pytest.mark.asyncio
    async def test_unknown_option_is_refused_before_it_connects(self) -> None:
        url = f"{self.backend.schemes[0]}://127.0.0.1:1?timout=2s"
        assert "did you mean 'timeout'" in await self.mistake(url)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("port", ["", "0", "65536", "100000", "²", "-1", "1x", "etcd"])
    async def test_port_that_cannot_be_is_refused_before_it_connects(self, port: str) -> None:
        host = f"localhost:{port}"
        text = await self.mistake(f"{self.backend.schemes[0]}://127.0.0.1:1,{host}")
        assert text.endswith(f": the port of {host!r} is no number from 1 to 65535")

    @pytest.mark.asyncio
    async def test_host_without_a_port_has_the_usual_one(self) -> None:
        url = f"{self.backend.schemes[0]}://127.255.255.254?timeout=1s"
        with pytest.raises(Unavailable, match=f"127.255.255.254:{self.port}: connection refused"):
            async with self.connected(url, Plugins()):
                pass

    @pytest.mark.asyncio
    async def test_before_it_is_connected_it_is_closed(self) -> None:
        registry = self.backend(URL.parse(self.backend.schemes[0]))
        for call in self.calls(registry):
            with pytest.raises(Closed):
                await call()
        await registry.aclose()

    # -- the end of calls

    @pytest.mark.asyncio
    async def test_calls_of_a_paused_server_end_in_time(
        self, url: str, server: Server, plugins: Plugins
    ) -> None:
        connections = plugins.connections()
        async with self.in_use(f"{url}?timeout=500ms", server, connections) as calls:
            began = time.monotonic()
            asked = [call() for call in calls for _ in range(20)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            # Who waits for a turn may do so for as long as who has one.
            assert time.monotonic() - began < 2 * 0.5 + SLACK
        await connections.aclose()
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        assert all("no answer in 0.5 s" in str(outcome) for outcome in outcomes), outcomes

    @pytest.mark.asyncio
    async def test_connections_that_close_during_calls_are_closed_and_no_cancellation(
        self, url: str, server: Server, plugins: Plugins
    ) -> None:
        connections = plugins.connections()
        async with self.in_use(url, server, connections) as calls:
            asked = await _hanging(calls)
            await connections.aclose()
            assert await _kinds(asked) == [Closed] * len(calls)

    @pytest.mark.asyncio
    async def test_calls_that_are_cancelled_are_cancelled(
        self, url: str, server: Server, plugins: Plugins
    ) -> None:
        connections = plugins.connections()
        async with self.in_use(url, server, connections) as calls:
            asked = await _hanging(calls)
            for task in asked:
                task.cancel()
            assert await _kinds(asked) == [asyncio.CancelledError] * len(calls)
        await connections.aclose()

    @pytest.mark.asyncio
    async def test_calls_when_the_connections_are_closed_are_closed(
        self, url: str, server: Server, plugins: Plugins
    ) -> None:
        connections = plugins.connections()
        async with self.in_use(url, server, connections) as calls:
            await connections.aclose()
            asked = [asyncio.ensure_future(call()) for call in calls]
            assert await _kinds(asked) == [Closed] * len(calls)

    # -- hosts

    @pytest.mark.asyncio
    async def test_dead_first_host_is_passed_over(
        self, url: str, server: Server, plugins: Plugins
    ) -> None:
        began = time.monotonic()
        with nobody(silent=False) as dead:
            async with self.connected(_at(url, dead, server.address), plugins) as registry:
                await self.work(registry)
                assert await registry.services() == ()
        assert time.monotonic() - began < SLACK

    @pytest.mark.asyncio
    async def test_silent_first_host_costs_its_share_of_the_time_and_once(
        self, url: str, server: Server, plugins: Plugins
    ) -> None:
        node, began = new_node(), time.monotonic()
        with nobody(silent=True) as silent, nobody(silent=False) as dead:
            hosts = _at(f"{url}?timeout=4s", silent, server.address, dead, dead)
            async with self.connected(hosts, plugins) as registry:
                for _ in range(20):
                    await registry.register(node, ttl=60)
        assert time.monotonic() - began < 1 + SLACK

    @pytest.mark.asyncio
    async def test_when_no_host_answers_it_says_who_and_whose(
        self, url: str, plugins: Plugins
    ) -> None:
        began = time.monotonic()
        with nobody(silent=False) as first, nobody(silent=False) as second:
            hosts = f"{first},{second.replace('127.0.0.1', 'localhost')}"
            nowhere = _at(f"{url}?timeout=2s", *hosts.split(","))
            with pytest.raises(Unavailable) as caught:
                async with self.connected(nowhere, plugins):
                    pass
        assert time.monotonic() - began < 2 + SLACK
        text = str(caught.value)
        assert re.match(rf"test: [^:]+://{re.escape(hosts)}[/?]", text)
        whose = hosts.replace(",", "|")
        assert re.search(rf": ({whose}): connection refused; does \w+ run there\?", text)

    # -- who shares a client

    @pytest.mark.asyncio
    async def test_one_url_is_one_client_whatever_the_path(self, url: str) -> None:
        connections = _Seen()
        async with (
            self.joined(url, connections) as one,
            self.joined(f"{url}-2", connections) as two,
            self.joined(f"{url}?timeout=9s", connections),
        ):
            first, second, other = connections.clients
            assert first is second
            assert first is not other  # it would be as patient as the first
            await one.register(new_node(), ttl=60)
            assert await two.services() == ()
        await connections.aclose()

    @pytest.mark.asyncio
    async def test_registry_that_closes_leaves_the_client_to_others(
        self, url: str, plugins: Plugins
    ) -> None:
        connections = plugins.connections()
        async with self.joined(url, connections) as stays:
            async with self.joined(url, connections) as closes:
                await self.work(closes)
            await self.work(stays)
        await connections.aclose()

    # -- secrets

    @pytest.mark.asyncio
    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    async def test_secret_may_be_in_a_file(
        self, login_url: str, plugins: Plugins, tmp_path: Path, end: str
    ) -> None:
        url, path = URL.parse(login_url, source="test"), tmp_path / "secret"
        path.write_bytes(f"{url.password}{end}".encode())
        async with self.connected(self._by_file(url, path), plugins) as registry:
            await self.work(registry)

    @pytest.mark.asyncio
    @pytest.mark.parametrize(
        ("name", "says"), [("missing", "No such file"), ("folder", "directory"), ("bytes", "UTF-8")]
    )
    async def test_secret_file_that_cannot_be_read_is_told(
        self, login_url: str, plugins: Plugins, tmp_path: Path, name: str, says: str
    ) -> None:
        url, path = URL.parse(login_url, source="test"), tmp_path / name
        (tmp_path / "folder").mkdir()
        (tmp_path / "bytes").write_bytes(b"\xff" + url.password.encode())
        with pytest.raises(ConfigError, match=says) as caught:
            async with self.connected(self._by_file(url, path), plugins):
                pass
        assert str(caught.value).startswith(f"test: cannot read the secret in {path}")
        assert url.password not in _told(caught.value)

    @pytest.mark.asyncio
    async def test_secret_is_in_no_text(
        self,
        login_url: str,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        url, connections = URL.parse(login_url, source="test"), _Seen()
        async with self.joined(url, connections) as registry:
            await registry.services()
        with pytest.raises(Closed) as closed:
            await registry.services()
        texts = [_told(closed.value), repr(registry), str(registry.url), repr(connections.clients)]
        await connections.aclose()
        for wrong in (
            msgspec.structs.replace(url, password=f"{url.password}x"),
            msgspec.structs.replace(url, hosts=("127.0.0.1:1",)),
            msgspec.structs.replace(url, query=(("tls", "true"),)),
            msgspec.structs.replace(url, query=(("timout", "1"),)),
        ):
            with pytest.raises(MicroError) as caught:
                async with self.connected(wrong, Plugins()):
                    pass
            texts.append(_told(caught.value))
        for text in (*texts, caplog.text, *capfd.readouterr()):
            assert url.password not in text
            assert quote(url.password, safe="") not in text

    def _by_file(self, url: URL, path: Path) -> URL:
        """``url``, with its secret in a file."""
        return msgspec.structs.replace(url, password="", query=((self.file_option, str(path)),))


class _Seen(Connections):
    """Keeps what was taken of it."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[object] = []

    async def get(self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[C]]) -> C:
        client = await super().get(key, make)
        self.clients.append(client)
        return client


def _package(backend: type[Registry]) -> str:
    return backend.__module__.partition(".")[0]


def _at(url: str, *hosts: str) -> URL:
    """``url``, with other hosts."""
    return msgspec.structs.replace(URL.parse(url, source="test"), hosts=hosts)


async def _hanging(calls: Sequence[_Call]) -> list[asyncio.Future[object]]:
    """Begin calls, none of which can end."""
    asked: list[asyncio.Future[object]] = [asyncio.ensure_future(call()) for call in calls]
    done, _ = await asyncio.wait(asked, timeout=0.1)
    assert not done
    return asked


async def _kinds(asked: Sequence[asyncio.Future[object]]) -> list[type[object]]:
    """How they end, soon."""
    async with asyncio.timeout(SLACK):
        return [type(end) for end in await asyncio.gather(*asked, return_exceptions=True)]


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)
