"""What a service tells of itself."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

import micro
from micro.codec import codec_for
from micro.contract import read_handler
from micro.debug import Debug
from micro.stats import Stats
from micro.testing import eventually, serving


def counted(*seconds: float, errors: int = 0, running: int = 0) -> Stats:
    """The counters of an endpoint whose calls took so long."""
    stats = Stats()
    for each in seconds:
        stats.add(each)
    stats.errors, stats.running = errors, running
    return stats


@pytest.fixture
def debug() -> Iterator[Debug]:
    told = {"B.Slow": counted(0.2, 0.2, errors=2, running=1), "A.Quick": counted(*[0.001] * 8)}
    with Debug(lambda: told) as entered:
        yield entered


def test_its_endpoints_are_those_of_go_micro_and_two_of_ours() -> None:
    names = [method.endpoint for method in read_handler(Debug(dict), None)]
    assert names == ["Debug.Health", "Debug.Stats", "Debug.Endpoints", "Debug.Counters"]


@pytest.mark.asyncio
async def test_health_is_ok(debug: Debug) -> None:
    assert msgspec.to_builtins(await debug.health()) == {"status": "ok"}


@pytest.mark.asyncio
async def test_stats_are_whole_numbers_under_the_names_of_go_micro_and_no_other(
    debug: Debug,
) -> None:
    told = json.loads(msgspec.json.encode(await debug.stats()))
    names = ["timestamp", "started", "uptime", "memory", "threads", "gc", "requests", "errors"]
    assert list(told) == names
    assert {type(value) for value in told.values()} == {int}
    assert min(told.values()) >= 0


@pytest.mark.asyncio
async def test_stats_add_up_the_calls_of_all_endpoints(debug: Debug) -> None:
    told = await debug.stats()
    assert (told.requests, told.errors) == (10, 2)


@pytest.mark.asyncio
async def test_stats_tell_when_it_was_made_and_how_long_ago() -> None:
    before = int(time.time())
    debug = Debug(dict)

    async def is_up() -> bool:
        return (await debug.stats()).uptime >= 1

    await eventually(is_up, within=5)
    told = await debug.stats()
    assert before <= told.started < told.timestamp <= time.time()


@pytest.mark.asyncio
async def test_stats_tell_the_threads_of_the_process(debug: Debug) -> None:
    end = threading.Event()
    before = (await debug.stats()).threads
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert (await debug.stats()).threads == before + 1
    finally:
        end.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
@pytest.mark.asyncio
async def test_stats_tell_the_memory_of_the_process(debug: Debug) -> None:
    gc.collect()  # else what other tests have left may go meanwhile
    before = (await debug.stats()).memory
    much = b"x" * 2**27
    assert 2**26 < (await debug.stats()).memory - before < 2 * len(much)


@pytest.mark.asyncio
async def test_stats_count_the_time_of_garbage_collection_while_entered() -> None:
    callbacks = list(gc.callbacks)
    debug = Debug(dict)
    gc.collect()
    assert (await debug.stats()).gc == 0
    with debug:
        began = time.perf_counter_ns()
        gc.collect()
        assert 0 < (await debug.stats()).gc <= time.perf_counter_ns() - began
    assert gc.callbacks == callbacks


@pytest.mark.asyncio
async def test_endpoints_tell_their_counters_by_name(debug: Debug) -> None:
    told = msgspec.to_builtins(await debug.endpoints())
    quick, slow = told.pop("endpoints")
    assert told == {}
    assert (quick["name"], quick["calls"], quick["errors"], quick["running"]) == (
        "A.Quick",
        8,
        0,
        0,
    )
    assert (slow["name"], slow["calls"], slow["errors"], slow["running"]) == ("B.Slow", 2, 2, 1)
    assert 0.001 <= quick["p50"] <= quick["p99"] <= 0.002
    assert 0.2 <= slow["p50"] <= slow["p99"] <= 0.4


@pytest.mark.asyncio
async def test_counters_are_those_of_the_moment() -> None:
    stats: dict[str, Stats] = {}
    debug = Debug(lambda: stats)
    assert (await debug.endpoints()).endpoints == []
    stats["A.Quick"] = counted(0.001)
    assert (await debug.stats()).requests == 1
    stats["A.Quick"].add(0.001)
    assert (await debug.stats()).requests == 2


@pytest.mark.parametrize("request_", ["", "{}", '{"service": "greeter"}'])
def test_request_of_a_go_client_is_taken(request_: str) -> None:
    for method in read_handler(Debug(dict), None):
        decoded = codec_for("application/json").decoder(method.request)(request_.encode())
        assert decoded.service in ("", "greeter")


# -- as every service has it -------------------------------------------------------------------


class Work:
    """Endpoints that are counted."""

    def __init__(self) -> None:
        self.end = threading.Event()

    async def add(self, a: int, b: int) -> int:
        return a + b

    async def fail(self) -> None:
        raise micro.Aborted("as asked")

    async def count(self, to: int) -> AsyncIterator[int]:
        for number in range(to):
            yield number

    def block(self) -> None:
        self.end.wait()


def serves(handler: object, name: str | None = None) -> micro.Service:
    service = micro.Service("work")
    service.handle(handler, name=name)
    return service


@pytest.mark.asyncio
async def test_every_service_tells_what_its_calls_were() -> None:
    async with serving(serves(Work())) as client:
        assert await client.call("work", "Debug.Health") == {"status": "ok"}
        for a in range(3):
            await client.call("work", "Work.Add", {"a": a, "b": 1})
        with pytest.raises(micro.Aborted):
            await client.call("work", "Work.Fail")
        async with client.stream("work", "Work.Count", {"to": 3}) as replies:
            assert [reply async for reply in replies] == [0, 1, 2]

        async def told() -> dict[str, dict[str, float]]:
            listed = (await client.call("work", "Debug.Endpoints"))["endpoints"]
            return {one["name"]: one for one in listed}

        async def stream_has_ended() -> bool:
            return (await told())["Work.Count"]["calls"] == 1

        await eventually(stream_has_ended)
        endpoints = await told()
        stats = await client.call("work", "Debug.Stats")
    counted = {name: (one["calls"], one["errors"]) for name, one in endpoints.items()}
    assert counted == {
        "Work.Add": (3, 0),
        "Work.Block": (0, 0),
        "Work.Count": (1, 0),
        "Work.Fail": (1, 1),
    }
    assert (stats["requests"], stats["errors"]) == (5, 1)
    assert endpoints["Work.Block"]["p99"] == 0
    assert 0 < endpoints["Work.Add"]["p50"] <= endpoints["Work.Add"]["p99"]


@pytest.mark.asyncio
async def test_it_is_not_registered() -> None:
    async with serving(serves(Work())) as client:
        (node,) = await (await client.registered()).get("work")
        assert not [one.name for one in node.endpoints if not one.name.startswith("Work.")]


@pytest.mark.asyncio
async def test_it_answers_while_handlers_have_all_threads() -> None:
    work = Work()
    async with serving(serves(work)) as client, asyncio.TaskGroup() as tasks:
        for _ in range(32):
            tasks.create_task(client.call("work", "Work.Block", timeout=30))

        async def running() -> bool:
            (blocked,) = [
                one["running"]
                for one in (await client.call("work", "Debug.Endpoints", timeout=2))["endpoints"]
                if one["name"] == "Work.Block"
            ]
            return bool(blocked == 32)

        try:
            await eventually(running)
            assert await client.call("work", "Debug.Health", timeout=2) == {"status": "ok"}
        finally:
            work.end.set()


@pytest.mark.asyncio
async def test_handler_of_that_name_stands_before_it() -> None:
    class Own:
        async def stats(self) -> str:
            return "mine"

    async with serving(serves(Own(), name="Debug")) as client:
        assert await client.call("work", "Debug.Stats") == "mine"
        assert await client.call("work", "Debug.Health") == {"status": "ok"}
