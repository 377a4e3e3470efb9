"""docs/what-happens.md: what it says becomes of a call, row by row.

A fleet of real services in this process: the registry is in memory, calls go over sockets.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import micro
from micro import Selector
from micro.testing import FaultProxy, eventually
from micro.testing.certificates import Authority

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "what-happens.md").read_text()
#: Seconds that a busy machine may add to a time that is promised.
SLACK = 2.0


class Shop:
    """One node's handler: does what the test says, and counts what was executed."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.executed: int = 0
        self.running: int = 0
        self.cancelled: int = 0
        self.fails: Exception | None = None
        self.release = asyncio.Event()

    async def where(self) -> str:
        self.executed += 1
        if self.fails is not None:
            raise self.fails
        return self.node

    @micro.endpoint(idempotent=True)
    async def stock(self) -> str:
        return await self.where()

    async def hold(self) -> str:
        self.executed += 1
        self.running += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return self.node

    async def left(self) -> float:
        deadline = micro.context().deadline
        assert deadline is not None
        return deadline - time.monotonic()

    async def prices(self, count: int) -> AsyncIterator[int]:
        self.executed += 1
        self.running += 1
        try:
            for price in range(count):
                yield price
            await self.release.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class Node:
    """A node behind a proxy, by which its network can fail."""

    def __init__(self, shop: Shop, proxy: FaultProxy, stack: AsyncExitStack) -> None:
        self.shop = shop
        self.proxy = proxy
        self._stack = stack

    def die(self) -> None:
        """As the machine does: all connections are cut, and none is accepted."""
        self.proxy.refuse()
        self.proxy.cut()

    async def stop(self) -> None:
        await self._stack.aclose()


class Fleet:
    """Nodes of the service ``shop``, and who calls them."""

    def __init__(self) -> None:
        self._plugins = micro.Plugins()
        self.nodes: list[Node] = []
        self.web = self.service("web")

    def service(self, name: str, **options: Any) -> micro.Service:
        return micro.Service(
            name, registry="memory://fleet", transport="tcp", plugins=self._plugins, **options
        )

    async def add(self, stack: AsyncExitStack, **options: Any) -> None:
        shop = Shop(f"node-{len(self.nodes)}")
        address = f"127.0.0.1:{_free_port()}"
        proxy = await stack.enter_async_context(FaultProxy(address))
        service = self.service(
            "shop", id=shop.node, address=address, advertise=proxy.address, **options
        )
        service.handle(shop)
        running = AsyncExitStack()
        await running.enter_async_context(service)
        stack.push_async_callback(running.aclose)
        self.nodes.append(Node(shop, proxy, running))

    @property
    def executed(self) -> int:
        return sum(node.shop.executed for node in self.nodes)

    async def call(self, endpoint: str, request: object = None, **options: Any) -> Any:
        return await self.web.call("shop", f"Shop.{endpoint}", request, **options)


@asynccontextmanager
async def fleet(count: int, **options: Any) -> AsyncIterator[Fleet]:
    made = Fleet()
    async with AsyncExitStack() as stack:
        for _ in range(count):
            await made.add(stack, **options)
        await stack.enter_async_context(made.web)
        yield made


def only(node: Node) -> Selector:
    return Selector(filters=(lambda registered: registered.id == node.shop.node,))


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


async def eventually_called(made: Fleet, node: str) -> None:
    async with asyncio.timeout(10):
        while await made.call("Where") != node:
            pass


def rows() -> list[str]:
    return re.findall(r"^\|.*\| `(test_\w+)` \|$", PAGE, re.MULTILINE)


def test_every_row_of_the_page_is_a_test_and_every_test_a_row() -> None:
    own = "test_every_row_of_the_page_is_a_test_and_every_test_a_row"
    tests = [name for name in globals() if name.startswith("test_") and name != own]
    assert sorted(rows()) == sorted(tests)


@pytest.mark.asyncio
async def test_node_that_refuses_the_connection() -> None:
    async with fleet(2) as made:
        made.nodes[0].die()
        for _ in range(20):
            assert await made.call("Where") == "node-1"
        assert made.executed == 20
        assert made.web.client.counts.retries >= 1


@pytest.mark.asyncio
async def test_node_that_dies_while_it_executes() -> None:
    async with fleet(2) as made:
        one, other = made.nodes
        call = asyncio.create_task(made.call("Hold", selector=only(one)))
        await eventually(lambda: one.shop.running == 1)
        one.die()
        with pytest.raises(micro.Unavailable) as caught:
            await call
        assert caught.value.sent is None
        assert (one.shop.executed, other.shop.executed) == (1, 0)


@pytest.mark.asyncio
async def test_node_that_dies_while_it_executes_what_is_idempotent() -> None:
    async with fleet(2) as made:
        calls = [asyncio.create_task(made.call("Hold", idempotent=True)) for _ in range(8)]
        await eventually(lambda: all(node.shop.running for node in made.nodes))
        one, other = made.nodes
        one.die()
        await eventually(lambda: other.shop.running == 8)
        other.shop.release.set()
        assert await asyncio.gather(*calls) == ["node-1"] * 8


@pytest.mark.asyncio
async def test_node_that_is_dead_for_long() -> None:
    async with fleet(3) as made:
        made.nodes[0].die()
        for _ in range(20):
            await made.call("Where")
        counts = made.web.client.counts
        assert counts.ejections == 1
        retries = counts.retries
        for _ in range(50):
            await made.call("Where")
        assert counts.retries == retries
        made.nodes[0].proxy.heal()
        await eventually(lambda: counts.readmissions == 1, within=10)
        await eventually_called(made, "node-0")


@pytest.mark.asyncio
async def test_node_that_hangs() -> None:
    async with fleet(1) as made:
        await made.call("Where")
        made.nodes[0].proxy.blackhole()
        began = time.monotonic()
        with pytest.raises(micro.DeadlineExceeded):
            await made.call("Where", timeout=0.3)
        assert 0.3 <= time.monotonic() - began < 0.3 + SLACK


@pytest.mark.asyncio
async def test_node_that_stops_while_it_executes() -> None:
    async with fleet(1) as made:
        (node,) = made.nodes
        call = asyncio.create_task(made.call("Hold"))
        await eventually(lambda: node.shop.running == 1)
        stopping = asyncio.create_task(node.stop())
        node.shop.release.set()
        assert await call == "node-0"
        await stopping


@pytest.mark.asyncio
async def test_call_while_a_node_stops() -> None:
    async with fleet(2) as made:
        told: list[str] = []
        over = asyncio.Event()

        async def caller() -> None:
            while not over.is_set():
                told.append(await made.call("Where"))

        async with asyncio.TaskGroup() as callers:
            for _ in range(8):
                callers.create_task(caller())
            await eventually(lambda: {"node-0", "node-1"} <= set(told) and len(told) > 100)
            await made.nodes[0].stop()
            before = len(told)
            await eventually(lambda: len(told) > before + 100)
            over.set()
        assert set(told[before + 8 :]) == {"node-1"}
        assert made.executed == len(told)


@pytest.mark.asyncio
async def test_handler_that_raises_a_micro_error() -> None:
    async with fleet(2) as made:
        for node in made.nodes:
            node.shop.fails = micro.FailedPrecondition("sold out", details={"left": 0})
        with pytest.raises(micro.FailedPrecondition, match="sold out") as caught:
            await made.call("Stock")
        assert caught.value.details == {"left": 0}
        assert caught.value.id == "shop"
        assert made.executed == 1


@pytest.mark.asyncio
async def test_handler_that_raises_anything_else() -> None:
    async with fleet(2) as made:
        for node in made.nodes:
            node.shop.fails = ValueError("the password is 1234")
        with pytest.raises(micro.Internal, match="incident") as caught:
            await made.call("Stock")
        assert "1234" not in str(caught.value)
        assert made.executed == 1


@pytest.mark.asyncio
async def test_handler_that_raises_unavailable() -> None:
    async with fleet(2) as made:
        for node in made.nodes:
            node.shop.fails = micro.Unavailable("the database is away")
        with pytest.raises(micro.Unavailable):
            await made.call("Where")
        assert made.executed == 1


@pytest.mark.asyncio
async def test_handler_that_raises_unavailable_and_is_idempotent() -> None:
    async with fleet(2) as made:
        made.nodes[0].shop.fails = micro.Unavailable("the database is away")
        for _ in range(8):
            assert await made.call("Stock", idempotent=True) == "node-1"


@pytest.mark.asyncio
async def test_handler_that_takes_too_long() -> None:
    async with fleet(1) as made:
        shop = made.nodes[0].shop
        began = time.monotonic()
        with pytest.raises(micro.DeadlineExceeded):
            await made.call("Hold", timeout=0.3)
        assert 0.3 <= time.monotonic() - began < 0.3 + SLACK
        await eventually(lambda: shop.cancelled == 1)


@pytest.mark.asyncio
async def test_caller_that_gives_up() -> None:
    async with fleet(1) as made:
        shop = made.nodes[0].shop
        call = asyncio.create_task(made.call("Hold"))
        await eventually(lambda: shop.running == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await eventually(lambda: shop.cancelled == 1)


@pytest.mark.asyncio
async def test_call_made_inside_a_handler() -> None:
    async with fleet(1) as made:

        class Front:
            async def left(self) -> float:
                return await front.call("shop", "Shop.Left", returns=float, timeout=60)

        front = made.service("front")
        front.handle(Front())
        async with front:
            left = await made.web.call("front", "Front.Left", returns=float, timeout=2)
        assert 0 < left < 2


@pytest.mark.asyncio
async def test_server_that_has_too_much_to_do() -> None:
    limits = micro.Limits(in_flight=1)
    async with fleet(1, limits=limits) as made:
        shop = made.nodes[0].shop
        first = asyncio.create_task(made.call("Hold"))
        await eventually(lambda: shop.running == 1)
        with pytest.raises(micro.ResourceExhausted) as caught:
            await made.call("Where")
        assert caught.value.sent is False
        assert caught.value.retry_after
        assert shop.executed == 1
        shop.release.set()
        await first


@pytest.mark.asyncio
async def test_one_of_two_servers_has_too_much_to_do() -> None:
    limits = micro.Limits(in_flight=1)
    async with fleet(2, limits=limits) as made:
        busy = made.nodes[0]
        first = asyncio.create_task(made.call("Hold", selector=only(busy)))
        await eventually(lambda: busy.shop.running == 1)
        for _ in range(4):
            assert await made.call("Where") == "node-1"
        busy.shop.release.set()
        await first


@pytest.mark.asyncio
async def test_service_that_always_fails() -> None:
    async with fleet(2) as made:
        for node in made.nodes:
            node.shop.fails = micro.Unavailable("no")
        failed = 0
        for _ in range(1000):
            with pytest.raises(micro.Unavailable):
                await made.call("Stock", idempotent=True)
            failed += 1
        assert made.executed <= 1.2 * failed


@pytest.mark.asyncio
async def test_service_that_nobody_has_registered() -> None:
    async with fleet(1) as made:
        with pytest.raises(micro.ServiceNotFound, match="did you mean shop"):
            await made.web.call("shops", "Shop.Where")


@pytest.mark.asyncio
async def test_endpoint_that_does_not_exist() -> None:
    async with fleet(1) as made:
        with pytest.raises(micro.EndpointNotFound, match=r"did you mean Shop\.Where"):
            await made.call("Were")


@pytest.mark.asyncio
async def test_reply_that_is_not_what_the_caller_expects() -> None:
    async with fleet(1) as made:
        with pytest.raises(micro.DecodeError):
            await made.call("Where", returns=int)


@pytest.mark.asyncio
async def test_request_that_is_too_large() -> None:
    async with fleet(1) as made:
        with pytest.raises(micro.TooLarge) as caught:
            await made.call("Where", {"text": "x" * (5 * 1024 * 1024)})
        assert caught.value.sent is False
        assert made.executed == 0


@pytest.mark.asyncio
async def test_node_that_shows_the_certificate_of_another_service(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path)

    def tls(name: str) -> micro.TLS:
        issued = authority.service(name)
        return micro.TLS(cert=issued.certificate, key=issued.key, ca=issued.ca)

    made, shop = Fleet(), Shop("stranger")
    bank, web = made.service("bank", tls=tls("bank")), made.service("web", tls=tls("web"))
    bank.handle(shop)
    async with bank, web:
        registry = await web.client.registered()
        (node,) = await registry.get("bank")
        await registry.register(msgspec.structs.replace(node, service="shop"), ttl=60)
        with pytest.raises(micro.Unavailable, match="bank") as caught:
            await web.call("shop", "Shop.Where")
        assert caught.value.sent is False
        assert shop.executed == 0


@pytest.mark.asyncio
async def test_stream_whose_node_dies() -> None:
    async with fleet(2) as made:
        one, other = made.nodes
        got: list[int] = []
        with pytest.raises(micro.Unavailable):
            async with made.web.client.stream(
                "shop", "Shop.Prices", {"count": 3}, returns=int, selector=only(one)
            ) as prices:
                async for price in prices:
                    got.append(price)
                    if len(got) == 3:
                        one.die()
        assert got == [0, 1, 2]
        assert other.shop.executed == 0


@pytest.mark.asyncio
async def test_stream_that_its_caller_leaves() -> None:
    async with fleet(1) as made:
        (node,) = made.nodes
        async with made.web.client.stream("shop", "Shop.Prices", {"count": 3}) as prices:
            assert await anext(prices) == 0
            assert node.shop.running == 1
        await eventually(lambda: node.shop.running == 0)
        assert node.shop.cancelled == 1


@pytest.mark.asyncio
async def test_registry_that_is_away() -> None:
    async with fleet(2) as made:
        await made.call("Where")
        registry = await made.web.client.registered()
        await registry.aclose()
        for _ in range(20):
            await made.call("Where")
