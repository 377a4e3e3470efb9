"""What every backend promises of its life, whatever its kind, as tests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import socket
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, Generic, TypeVar

import msgspec
import pytest
import pytest_asyncio

from micro.backend import Backend, Connections
from micro.errors import Closed, Unauthenticated, Unavailable
from micro.plugins import Plugins
from micro.testing._leaks import given_back, held
from micro.testing.proxy import FaultProxy
from micro.testing.servers import Server
from micro.testing.waiting import eventually
from micro.url import URL

B = TypeVar("B", bound=Backend[Any])
T = TypeVar("T")

#: Seconds more than promised that a busy machine gets; never less than promised.
SLACK = 2.0
#: Seconds in which a client is right again once its server is.
RECOVERY = 5.0


def needed(given: T | None, otherwise: str) -> T:
    """``given``; the test is skipped when the backend's tests do not give it."""
    if given is None:
        pytest.skip(otherwise)
    return given


class Clients(ABC, Generic[B]):
    """Connected backends of one kind, and what can be asked of each."""

    backend: type[B]

    @abstractmethod
    def calls(self, backend: B) -> Sequence[Callable[[], Awaitable[object]]]:
        """One call of each method."""

    @abstractmethod
    async def work(self, backend: B) -> None:
        """Use each method on something new, and check that each answer is about that."""

    @pytest.fixture
    def url(self) -> str:
        raise TypeError(f"{type(self).__name__} must give the fixture 'url'")

    @pytest.fixture
    def server(self) -> Server | None:
        """The server at ``url``, for the tests that stop it."""
        return None

    @pytest.fixture
    def plugins(self) -> Plugins:
        return Plugins()

    @asynccontextmanager
    async def connected(self, url: str | URL, plugins: Plugins) -> AsyncIterator[B]:
        """A client of its own."""
        connections = plugins.connections()
        try:
            async with self.joined(url, connections) as backend:
                yield backend
        finally:
            await connections.aclose()

    @asynccontextmanager
    async def joined(self, url: str | URL, connections: Connections) -> AsyncIterator[B]:
        """A client that shares what others have of ``connections``."""
        backend = self.backend(url if isinstance(url, URL) else URL.parse(url, source="test"))
        try:
            await backend.connect(connections)
            yield backend
        finally:
            await backend.aclose()


class LifecycleSuite(Clients[B]):
    """The contract of ``Backend``: the suite of each kind stands on it.

    ``server`` is what lets the faults be tested: without it they are skipped.
    """

    #: Seconds in which a call ends, whatever the server does, with the options of ``url``.
    timeout: ClassVar[float] = 5.0
    #: Where all chance of a run comes from; None: another seed each time, which a failure shows.
    seed: ClassVar[int | None] = None

    @pytest.fixture
    def bad_credentials_url(self) -> str | None:
        """The URL of a server that refuses the password in it."""
        return None

    @pytest.fixture
    def chance(self, request: pytest.FixtureRequest) -> random.Random:
        seed = random.getrandbits(32) if self.seed is None else self.seed
        request.node.add_report_section("call", "seed", f"repeat this with: seed = {seed}")
        return random.Random(seed)

    @pytest_asyncio.fixture
    async def proxy(
        self, server: Server | None, chance: random.Random
    ) -> AsyncIterator[FaultProxy]:
        """Stands between the server and the clients whose URL is ``through`` it."""
        address = needed(server, "no server").address
        async with FaultProxy(address, seed=chance.getrandbits(32)) as proxy:
            yield proxy

    @pytest.mark.asyncio
    @pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
    async def test_init_bad_address(
        self,
        url: str,
        server: Server | None,
        plugins: Plugins,
        silent: bool,  # noqa: FBT001 - pytest gives it by name
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        needed(server, "no server")
        before, began = asyncio.all_tasks(), time.monotonic()
        with nobody(silent=silent) as address, pytest.raises(Unavailable):
            async with self.connected(through(url, address), plugins):
                pass
        assert time.monotonic() - began < self.timeout + SLACK
        await eventually(lambda: asyncio.all_tasks() <= before)
        gc.collect()
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    @pytest.mark.asyncio
    async def test_init_bad_credentials(
        self,
        bad_credentials_url: str | None,
        plugins: Plugins,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        url = URL.parse(needed(bad_credentials_url, "no credentials"), source="test")
        assert url.password, "bad_credentials_url has no password"
        with caplog.at_level(logging.DEBUG), pytest.raises(Unauthenticated) as caught:
            async with self.connected(url, plugins):
                pass
        shown = "".join(traceback.format_exception(caught.value))
        for text in (shown, repr(caught.value), caplog.text, repr(self.backend(url)), str(url)):
            assert url.password not in text

    @pytest.mark.asyncio
    async def test_close_idempotent(self, url: str, plugins: Plugins) -> None:
        async with self.connected(url, plugins) as backend:
            await self.work(backend)
            await backend.aclose()
            await backend.aclose()
        await self.backend(URL.parse(url, source="test")).aclose()

    @pytest.mark.asyncio
    async def test_use_after_close(self, url: str, plugins: Plugins) -> None:
        async with self.connected(url, plugins) as backend:
            await backend.aclose()
            for call in self.calls(backend):
                with pytest.raises(Closed):
                    await call()

    @pytest.mark.asyncio
    async def test_close_leaks_nothing(self, url: str, plugins: Plugins) -> None:
        await self._live_and_close(url, plugins)  # what a library makes once, it may keep
        before = held()
        for _ in range(5):
            await self._live_and_close(url, plugins)
        await given_back(before)

    @pytest.mark.asyncio
    async def test_connect_cancelled_leaks_nothing(
        self, url: str, plugins: Plugins, chance: random.Random
    ) -> None:
        took = await self._live_and_close(url, plugins)
        before = held()
        for _ in range(20):
            await self._connect_for(took * chance.random() ** 3, url, plugins)
        await given_back(before)

    @pytest.mark.asyncio
    async def test_cancel_mid_call(self, url: str, plugins: Plugins, chance: random.Random) -> None:
        async with self.connected(url, plugins) as backend:
            began = time.monotonic()
            await asyncio.gather(*(self.work(backend) for _ in range(20)))
            took = time.monotonic() - began
            for _ in range(20):
                tasks = [asyncio.create_task(self.work(backend)) for _ in range(20)]
                timers = [
                    asyncio.get_running_loop().call_later(chance.uniform(0, took), task.cancel)
                    for task in tasks[::2]
                ]
                outcomes = await asyncio.gather(*tasks, return_exceptions=True)
                for timer in timers:
                    timer.cancel()
                assert not [out for out in outcomes if isinstance(out, Exception)]
                assert outcomes[1::2] == [None] * 10
            await self.work(backend)

    @pytest.mark.asyncio
    async def test_concurrent_50_tasks(self, url: str, plugins: Plugins) -> None:
        async def often(backend: B) -> None:
            for _ in range(5):
                await self.work(backend)

        async with self.connected(url, plugins) as backend:
            await asyncio.gather(*(often(backend) for _ in range(50)))

    @pytest.mark.asyncio
    async def test_down_up(self, url: str, server: Server | None, plugins: Plugins) -> None:
        server = needed(server, "no server")
        async with self.connected(url, plugins) as backend:
            await self.work(backend)
            async with stopped(server):
                await self._is_unavailable(backend)
            await self.recovers(backend)

    @pytest.mark.asyncio
    async def test_server_that_says_nothing(
        self, url: str, server: Server | None, plugins: Plugins
    ) -> None:
        server = needed(server, "no server")
        async with self.connected(url, plugins) as backend:
            await self.work(backend)
            await asyncio.to_thread(server.pause)
            try:
                await self._is_unavailable(backend)
            finally:
                await asyncio.to_thread(server.resume)
            await self.recovers(backend)

    @pytest.mark.asyncio
    async def test_reconnects_after_restart(
        self, url: str, server: Server | None, plugins: Plugins
    ) -> None:
        server = needed(server, "no server")
        async with self.connected(url, plugins) as backend:
            for keep_data in (True, False):
                await self.work(backend)
                await asyncio.to_thread(server.restart, keep_data=keep_data)
                await self.recovers(backend)

    async def recovers(self, backend: B) -> None:
        """Wait until it works; it has to, a short time after its server does."""
        async with asyncio.timeout(RECOVERY + SLACK):
            await eventually(lambda: self._works(backend), within=RECOVERY + SLACK, every=0.05)

    async def _works(self, backend: B) -> bool:
        try:
            await self.work(backend)
        except Unavailable:
            return False
        return True

    async def _is_unavailable(self, backend: B) -> None:
        began = time.monotonic()
        outcomes = await asyncio.gather(
            *(call() for call in self.calls(backend)), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes} == {Unavailable}, outcomes
        assert time.monotonic() - began < self.timeout + SLACK

    async def _connect_for(self, seconds: float, url: str, plugins: Plugins) -> None:
        """Begin to connect, and cancel it after ``seconds``."""
        connections = plugins.connections()
        backend = self.backend(URL.parse(url, source="test"))
        connecting = asyncio.create_task(backend.connect(connections))
        await asyncio.wait([connecting], timeout=seconds)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        await backend.aclose()
        await connections.aclose()

    async def _live_and_close(self, url: str, plugins: Plugins) -> float:
        """The seconds from before it was connected to when it was closed."""
        began = time.monotonic()
        async with self.connected(url, plugins) as backend:
            await self.work(backend)
        return time.monotonic() - began


def through(url: str, address: str) -> URL:
    """``url``, with this address in place of its hosts."""
    return msgspec.structs.replace(URL.parse(url, source="test"), hosts=(address,))


@asynccontextmanager
async def stopped(server: Server) -> AsyncIterator[None]:
    """Within, the server is down; it keeps its data."""
    await asyncio.to_thread(server.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start)


@contextmanager
def nobody(*, silent: bool) -> Iterator[str]:
    """An address where connections are refused, or accepted by nobody who answers."""
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        if silent:
            sock.listen()
        yield "{}:{}".format(*sock.getsockname())
