"""What a server takes on, and what it says to calls that are too much."""

from __future__ import annotations

import asyncio
import http.client
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

import micro
from micro import _overload
from micro._overload import PATIENCE, Turns
from micro.call import Call, Handler
from micro.client import Client
from micro.errors import ResourceExhausted
from micro.retries import Retries
from micro.server import Server
from micro.testing import eventually, serving
from micro.transport import Limits

from .simulated import running, simulated

#: Seconds that one call computes, and that a round of the loop takes besides.
BURN = 0.004
ROUND = 0.0001

TRANSPORTS = ["tcp", "http", "memory"]


# -- turns ----------------------------------------------------------------------------------------


async def held(turns: Turns, count: int) -> None:
    for _ in range(count):
        await turns.take()


def waiting(turns: Turns) -> asyncio.Task[None]:
    return asyncio.create_task(turns.take())


async def settled() -> None:
    """Let all tasks run until each waits for something."""
    for _ in range(5):
        await asyncio.sleep(0)


@simulated
async def test_no_more_run_than_may() -> None:
    turns = Turns(3, "calls")
    await held(turns, 3)
    more = [waiting(turns) for _ in range(2)]
    await settled()
    assert turns.running == 3
    assert not any(task.done() for task in more)
    turns.end()
    turns.end()
    await asyncio.gather(*more)
    assert turns.running == 3


@simulated
async def test_who_waits_first_has_the_next_turn() -> None:
    turns = Turns(5, "calls")
    order: list[int] = []
    tasks: list[asyncio.Task[None]] = []

    async def wait(number: int) -> None:
        await turns.take()
        order.append(number)
        turns.end()

    await held(turns, 5)
    for number in range(5):
        tasks.append(asyncio.create_task(wait(number)))
        await settled()
    turns.end()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]


@simulated
async def test_who_waits_too_long_is_refused() -> None:
    turns = Turns(1, "calls")
    await held(turns, 1)
    began = time.monotonic()
    with pytest.raises(ResourceExhausted, match="1 calls run already") as caught:
        await turns.take()
    assert time.monotonic() - began == pytest.approx(PATIENCE)
    assert caught.value.sent is False
    assert caught.value.retry_after == PATIENCE
    assert turns.refused == 1
    turns.end()
    await turns.take()


@simulated
async def test_no_more_wait_than_may_run_and_who_gave_up_makes_room() -> None:
    turns = Turns(2, "calls")
    await held(turns, 2)
    for _ in range(3):
        gave_up, refused = waiting(turns), waiting(turns)
        await settled()
        now = time.monotonic()
        with pytest.raises(ResourceExhausted):
            await turns.take()
        assert time.monotonic() == now
        gave_up.cancel()
        with suppress(asyncio.CancelledError):
            await gave_up
        with pytest.raises(ResourceExhausted):
            await refused


@simulated
async def test_wait_that_is_cancelled_takes_no_turn() -> None:
    turns = Turns(2, "calls")
    await held(turns, 2)
    first, second = waiting(turns), waiting(turns)
    await settled()
    first.cancel()
    turns.end()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert turns.running == 2


@simulated
async def test_turn_that_comes_with_a_cancellation_goes_to_the_next() -> None:
    turns = Turns(2, "calls")
    await held(turns, 2)
    first, second = waiting(turns), waiting(turns)
    await settled()
    turns.end()  # it is the first one's, who does not run before it is cancelled
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    assert turns.running == 2


# -- lateness -------------------------------------------------------------------------------------


class Work:
    """Computes, and knows when."""

    def __init__(self) -> None:
        self.began: list[float] = []

    async def burn(self) -> None:
        self.began.append(time.monotonic())
        running().compute(BURN)

    async def burn_long(self) -> None:
        running().compute(15 * BURN)

    async def stand(self) -> None:
        running().stand(10 * BURN)

    async def wait_and_burn(self) -> None:
        await asyncio.sleep(random.random() * 0.01)
        await self.burn()


class Served:
    """A server without a port, and what became of the calls to it."""

    def __init__(self) -> None:
        self.work = Work()
        self.server = Server("busy")
        self.server.handle(self.work)
        self.answer: Handler = self.server.handler(())
        self.answered = 0
        #: When they were.
        self.refused: list[float] = []

    async def call(self, endpoint: str = "Work.Burn") -> None:
        try:
            await self.answer(Call(service="busy", endpoint=endpoint), b"{}")
        except ResourceExhausted:
            self.refused.append(time.monotonic())
        else:
            self.answered += 1

    async def burst(self, calls: int, endpoint: str = "Work.Burn") -> tuple[int, int]:
        """So many calls at once: how many are answered, and refused."""
        before = self.answered, len(self.refused)
        await asyncio.gather(*(self.call(endpoint) for _ in range(calls)))
        return self.answered - before[0], len(self.refused) - before[1]

    async def overload(self, endpoint: str = "Work.Burn", seconds: float = 0.7) -> int:
        """Three times as many calls as can be: how many run at once, at most, at the end."""
        calls: set[asyncio.Task[None]] = set()
        began, made, most = time.monotonic(), 0, 0
        while (now := time.monotonic() - began) < seconds:
            running().compute(ROUND)
            while made < now * 3 / BURN:
                made += 1
                task = asyncio.create_task(self.call(endpoint))
                calls.add(task)
                task.add_done_callback(calls.discard)
            await asyncio.sleep(0)  # which may take long: what had a turn computes
            if now > seconds - 0.5:
                most = max(most, self.server.stats()[endpoint].running)
        await asyncio.gather(*calls)
        return most


@simulated
async def test_burst_is_not_shed_before_a_tenth_of_a_second() -> None:
    served = Served()
    _, refused = await served.burst(100)
    assert refused
    assert min(served.refused) - served.work.began[0] >= PATIENCE
    unseen = _overload._SELDOM * BURN  # until the first call that looks
    assert max(served.work.began) - served.work.began[0] < PATIENCE + unseen + BURN


@simulated
async def test_bursts_with_a_pause_between_them_are_each_as_long_as_one() -> None:
    served = Served()
    for _ in range(3):
        served.work.began.clear()
        await served.burst(100)
        assert served.work.began[-1] - served.work.began[0] > PATIENCE - BURN
        await asyncio.sleep(PATIENCE + 0.05)


@simulated
async def test_of_a_queue_that_stands_only_few_are_taken_and_those_at_once() -> None:
    served = Served()
    await served.overload()
    answered, refused = await served.burst(100)
    assert 0 < answered < 5
    assert refused > 95


@pytest.mark.parametrize("calls", [0, 1], ids=["nobody calls", "few call"])
@simulated
async def test_bursts_are_taken_again_after_a_calm(calls: int) -> None:
    served = Served()
    await served.overload()
    calm = time.monotonic() + 2.5 * _overload._CALM
    while time.monotonic() < calm:
        await served.burst(calls)
        await asyncio.sleep(0.01)
    assert await served.burst(20) == (20, 0)


@simulated
async def test_queue_of_handlers_that_wait_before_they_compute_is_shed_too() -> None:
    served = Served()
    most = await served.overload("Work.WaitAndBurn", 2.0)
    assert 0 < most <= 30
    assert served.refused


@simulated
async def test_slow_calls_one_after_the_other_are_no_queue() -> None:
    served = Served()
    for _ in range(5):
        slow = asyncio.create_task(served.call("Work.BurnLong"))
        await asyncio.sleep(0)
        assert await served.burst(5) == (5, 0)
        await slow


@simulated
async def test_slow_call_that_is_alone_in_its_round_is_no_queue() -> None:
    served = Served()
    for _ in range(50):
        await served.call("Work.BurnLong")
        await asyncio.sleep(0)
    assert await served.burst(20) == (20, 0)


@simulated
async def test_loop_that_had_no_processor_refuses_nothing() -> None:
    served = Served()
    for _ in range(3):
        assert await served.burst(10, "Work.Stand") == (10, 0)


# -- a server -------------------------------------------------------------------------------------


class Slow:
    def __init__(self) -> None:
        self.begun = 0
        self.executed = 0
        self.blocked: list[int] = []
        self.released = asyncio.Event()
        self.let_go = threading.Event()

    async def wait(self) -> None:
        self.begun += 1
        await self.released.wait()

    async def quick(self) -> None:
        self.executed += 1

    def block(self) -> None:
        self.blocked.append(threading.get_ident())
        self.let_go.wait(20)


@asynccontextmanager
async def slow(transport: str, limits: Limits) -> AsyncIterator[tuple[Slow, Client]]:
    """A service that takes few calls, and its client, which repeats none."""
    work = Slow()
    service = micro.Service("slow", limits=limits, retries=Retries(attempts=1))
    service.handle(work)
    environment = {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": transport}
    async with serving(service, environment) as client:
        try:
            yield work, client
        finally:
            work.released.set()
            work.let_go.set()


@asynccontextmanager
async def full(transport: str) -> AsyncIterator[tuple[Slow, Client]]:
    """As ``slow``, with the one call running that it takes."""
    async with slow(transport, Limits(in_flight=1)) as (work, client):
        running = asyncio.create_task(client.call("slow", "Slow.Wait"))
        await eventually(lambda: work.begun)
        yield work, client
        work.released.set()
        await running


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_call_that_is_too_much_was_not_executed_and_may_come_again(transport: str) -> None:
    async with full(transport) as (work, client):
        with pytest.raises(ResourceExhausted, match="ask again later") as caught:
            await client.call("slow", "Slow.Quick")
        assert caught.value.remote
        assert caught.value.sent is False
        assert caught.value.retry_after == PATIENCE
        assert not work.executed


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_call_that_is_too_much_waits_a_little(transport: str) -> None:
    async with full(transport) as (work, client):
        second = asyncio.create_task(client.call("slow", "Slow.Quick"))
        await asyncio.sleep(PATIENCE / 4)
        work.released.set()
        await second
        assert work.executed == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_health_is_told_while_there_is_too_much_to_do(transport: str) -> None:
    async with full(transport) as (_, client):
        assert await client.call("slow", "Debug.Health") == {"status": "ok"}
        with pytest.raises(ResourceExhausted):
            await client.call("slow", "Slow.Quick")
        told = await client.call("slow", "Debug.Counters")
        assert told["counters"]["shed_busy"] == 1


@pytest.mark.asyncio
async def test_plain_http_is_told_by_status_429_and_when_to_come_again() -> None:
    async with full("http") as (_, client):
        registry = await client.registered()
        (node,) = await registry.get("slow")
        status, after = await asyncio.to_thread(post, node.address, "/Debug/Health")
        assert (status, after) == (200, None)
        status, after = await asyncio.to_thread(post, node.address, "/Slow/Quick")
        assert (status, after) == (429, "1")


def post(address: str, path: str) -> tuple[int, str | None]:
    """Status and Retry-After of the answer."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.getheader("Retry-After")
    finally:
        connection.close()


@pytest.mark.asyncio
async def test_plain_functions_are_bounded_by_their_threads() -> None:
    async with slow("memory", Limits()) as (work, client):
        running = [asyncio.create_task(client.call("slow", "Slow.Block")) for _ in range(32)]
        await eventually(lambda: len(work.blocked) == 32)
        with pytest.raises(ResourceExhausted, match="32 plain functions run already") as caught:
            await client.call("slow", "Slow.Block")
        assert caught.value.sent is False
        await client.call("slow", "Slow.Quick")  # others are not kept from running
        work.let_go.set()
        await asyncio.gather(*running)
        await client.call("slow", "Slow.Block")
