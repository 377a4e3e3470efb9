"""Backends, and the clients that they share."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from micro.backend import Backend, Connections, NoOptions
from micro.errors import Closed, Unavailable
from micro.plugins import Plugins
from micro.testing import eventually


class Pool:
    """What is made, opened and closed, in order; ``gate`` holds back who opens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures = 0

    def client(self, name: str) -> Callable[[], AbstractAsyncContextManager[str]]:
        @asynccontextmanager
        async def opened() -> AsyncIterator[str]:
            self.log.append(f"open {name}")
            try:
                await self.gate.wait()
                if self.failures:
                    self.failures -= 1
                    raise Unavailable(f"{name} is away")
                yield name
            finally:
                self.log.append(f"close {name}")

        def make() -> AbstractAsyncContextManager[str]:
            self.log.append(f"make {name}")
            return opened()

        return make

    @property
    def open(self) -> int:
        told = [line.split()[0] for line in self.log]
        return told.count("open") - told.count("close")

    def times(self, what: str) -> int:
        return self.log.count(what)


def waiters(count: int, connections: Connections, pool: Pool) -> list[asyncio.Task[str]]:
    return [asyncio.create_task(connections.get("a", pool.client("a"))) for _ in range(count)]


@pytest.mark.asyncio
async def test_client_is_what_make_gives_entered() -> None:
    pool = Pool()
    assert await Connections().get("a", pool.client("a")) == "a"
    assert pool.open == 1


@pytest.mark.asyncio
async def test_second_get_gives_the_same_client() -> None:
    pool, connections = Pool(), Connections()
    for _ in range(3):
        assert await connections.get("a", pool.client("a")) == "a"
    assert pool.times("open a") == 1


@pytest.mark.asyncio
async def test_other_key_is_another_client() -> None:
    pool, connections = Pool(), Connections()
    assert await connections.get("a", pool.client("a")) == "a"
    assert await connections.get("b", pool.client("b")) == "b"


@pytest.mark.asyncio
async def test_client_is_entered_once_however_many_ask_at_once() -> None:
    pool, connections = Pool(), Connections()
    assert await asyncio.gather(*waiters(10, connections, pool)) == ["a"] * 10
    assert pool.times("open a") == 1


@pytest.mark.asyncio
async def test_client_is_made_once_however_many_ask() -> None:
    """Making one may already take what only its ``aclose`` gives back."""
    pool, connections = Pool(), Connections()
    await asyncio.gather(*waiters(10, connections, pool))
    await connections.get("a", pool.client("a"))
    assert pool.times("make a") == 1


@pytest.mark.asyncio
async def test_clients_are_closed_the_youngest_first() -> None:
    pool, connections = Pool(), Connections()
    for name in "abc":
        await connections.get(name, pool.client(name))
    await connections.aclose()
    assert pool.log[-3:] == ["close c", "close b", "close a"]


@pytest.mark.asyncio
async def test_client_that_was_taken_twice_is_closed_once() -> None:
    pool, connections = Pool(), Connections()
    for _ in range(2):
        await connections.get("a", pool.client("a"))
    await connections.aclose()
    assert pool.times("close a") == 1


@pytest.mark.asyncio
async def test_second_aclose_does_nothing() -> None:
    pool, connections = Pool(), Connections()
    await connections.get("a", pool.client("a"))
    await connections.aclose()
    await connections.aclose()
    assert pool.times("close a") == 1


@pytest.mark.asyncio
async def test_get_after_aclose_raises_closed_and_makes_nothing() -> None:
    pool, connections = Pool(), Connections()
    await connections.aclose()
    with pytest.raises(Closed):
        await connections.get("a", pool.client("a"))
    assert pool.log == []


@pytest.mark.asyncio
async def test_shared_of_a_closed_one_raises_closed() -> None:
    pool, connections = Pool(), Plugins().connections()
    await connections.aclose()
    with pytest.raises(Closed):
        await connections.shared.get("a", pool.client("a"))


@pytest.mark.asyncio
async def test_error_of_one_client_leaves_no_other_open() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[str]:
        yield "b"
        raise Unavailable("hung up")

    pool, connections = Pool(), Connections()
    await connections.get("a", pool.client("a"))
    await connections.get("b", broken)
    with pytest.raises(Unavailable):
        await connections.aclose()
    assert pool.open == 0


# -- failing and cancelled ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_failure_is_told_and_leaves_nothing_open() -> None:
    pool, connections = Pool(), Connections()
    pool.failures = 1
    with pytest.raises(Unavailable, match="a is away"):
        await connections.get("a", pool.client("a"))
    assert pool.open == 0
    await connections.aclose()
    assert pool.times("close a") == 1


@pytest.mark.asyncio
async def test_get_after_a_failure_tries_again() -> None:
    pool, connections = Pool(), Connections()
    pool.failures = 1
    with pytest.raises(Unavailable):
        await connections.get("a", pool.client("a"))
    assert await connections.get("a", pool.client("a")) == "a"


@pytest.mark.asyncio
async def test_failure_is_told_to_all_that_asked_at_once() -> None:
    pool, connections = Pool(), Connections()
    pool.failures = 3
    pool.gate.clear()
    asking = waiters(3, connections, pool)
    await eventually(lambda: pool.open)
    pool.gate.set()
    got = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(one) for one in got] == [Unavailable] * 3
    assert pool.open == 0


@pytest.mark.asyncio
async def test_cancelled_get_leaves_nothing_open() -> None:
    pool, connections = Pool(), Connections()
    pool.gate.clear()
    (task,) = waiters(1, connections, pool)
    await eventually(lambda: pool.open)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.open == 0


@pytest.mark.asyncio
async def test_cancelling_who_opens_does_not_fail_who_waits() -> None:
    pool, connections = Pool(), Connections()
    pool.gate.clear()
    first, second = waiters(2, connections, pool)
    await eventually(lambda: pool.open)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    pool.gate.set()
    assert await second == "a"
    await connections.aclose()
    assert pool.open == 0


@pytest.mark.asyncio
async def test_cancelling_who_waits_does_not_fail_who_opens() -> None:
    pool, connections = Pool(), Connections()
    pool.gate.clear()
    first, second = waiters(2, connections, pool)
    await eventually(lambda: pool.open)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    pool.gate.set()
    assert await first == "a"
    assert pool.open == 1
    await connections.aclose()
    assert pool.open == 0


@pytest.mark.asyncio
async def test_client_that_opens_while_its_connections_close_is_not_left_open() -> None:
    pool, connections = Pool(), Connections()
    pool.gate.clear()
    (task,) = waiters(1, connections, pool)
    await eventually(lambda: pool.open)
    closing = asyncio.create_task(connections.aclose())
    pool.gate.set()
    (got, _) = await asyncio.gather(task, closing, return_exceptions=True)
    assert isinstance(got, Closed)
    assert pool.open == 0


@pytest.mark.asyncio
async def test_cancelled_get_is_cancelled_though_its_connections_close() -> None:
    pool, connections = Pool(), Connections()
    pool.gate.clear()
    (task,) = waiters(1, connections, pool)
    await eventually(lambda: pool.open)
    closing = asyncio.create_task(connections.aclose())
    task.cancel()
    await asyncio.gather(task, closing, return_exceptions=True)
    assert task.cancelled()
    assert pool.open == 0


@pytest.mark.asyncio
async def test_waiter_that_is_cancelled_as_the_last_holder_closes_leaves_nothing_open() -> None:
    pool, plugins = Pool(), Plugins()
    one, other = plugins.connections(), plugins.connections()
    pool.gate.clear()

    async def hold() -> None:
        await one.shared.get("a", pool.client("a"))
        waiter.cancel()
        await one.aclose()

    holder = asyncio.create_task(hold())
    await eventually(lambda: pool.open)
    waiter = asyncio.create_task(other.shared.get("a", pool.client("a")))
    pool.gate.set()
    await asyncio.gather(holder, waiter, return_exceptions=True)
    await other.aclose()
    assert pool.open == 0


# -- shared by services ------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_clients_of_two_services_are_apart() -> None:
    pool, plugins = Pool(), Plugins()
    for connections in (plugins.connections(), plugins.connections()):
        await connections.get("a", pool.client("a"))
    assert pool.open == 2


@pytest.mark.asyncio
async def test_shared_client_is_one_for_all_services_of_one_plugins() -> None:
    pool, plugins = Pool(), Plugins()
    for connections in (plugins.connections(), plugins.connections()):
        await connections.shared.get("a", pool.client("a"))
    assert pool.open == 1


@pytest.mark.asyncio
async def test_shared_client_is_another_for_another_plugins() -> None:
    pool = Pool()
    for plugins in (Plugins(), Plugins()):
        await plugins.connections().shared.get("a", pool.client("a"))
    assert pool.open == 2


@pytest.mark.asyncio
async def test_shared_client_is_closed_with_the_last_service_that_took_it() -> None:
    pool, plugins = Pool(), Plugins()
    one, other, third = (plugins.connections() for _ in range(3))
    for connections in (one, other, other):
        await connections.shared.get("a", pool.client("a"))
    await third.aclose()
    await one.aclose()
    assert pool.open == 1
    await other.aclose()
    assert pool.open == 0


@pytest.mark.asyncio
async def test_own_clients_are_closed_before_the_shared_ones() -> None:
    pool, connections = Pool(), Plugins().connections()
    await connections.get("own", pool.client("own"))
    await connections.shared.get("shared", pool.client("shared"))
    await connections.aclose()
    assert pool.log[-2:] == ["close own", "close shared"]


@pytest.mark.asyncio
async def test_shared_client_can_be_opened_again_after_its_last_user() -> None:
    pool, plugins = Pool(), Plugins()
    for _ in range(2):
        connections = plugins.connections()
        await connections.shared.get("a", pool.client("a"))
        await connections.aclose()
    assert (pool.times("open a"), pool.open) == (2, 0)


# -- the interface -----------------------------------------------------------------------------


def test_backend_must_say_how_it_connects_and_closes() -> None:
    assert Backend.__abstractmethods__ == {"connect", "aclose"}
    assert inspect.isabstract(Backend)


def test_backend_takes_no_options_by_default() -> None:
    assert Backend.Options is NoOptions
    assert not NoOptions.__struct_fields__
