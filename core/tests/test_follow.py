"""The one loop that keeps a view alive, against a registry whose every move is scripted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from micro.backend import Connections
from micro.errors import Closed, Gap, ServiceNotFound, Unavailable
from micro.follow import View
from micro.registry import Change, Node, Registry, RegistryFeatures, Snapshot
from micro.testing import eventually
from micro.url import URL


class ScriptedRegistry(Registry):
    """A registry whose streams say what the test puts in, and whose marks it records."""

    schemes = ("scripted",)
    features = RegistryFeatures(min_ttl=0.1, converge=0.0)

    def __init__(self) -> None:
        super().__init__(URL.parse("scripted"))
        self.marks: list[object] = []
        self.consistent: tuple[Node, ...] | Exception = ()
        self.reads = 0
        self.steps: asyncio.Queue[Snapshot | Change | Exception | None] = asyncio.Queue(1000)

    async def connect(self, connections: Connections) -> None: ...

    async def aclose(self) -> None: ...

    async def register(self, node: Node, *, ttl: float) -> None: ...

    async def deregister(self, node: Node) -> None: ...

    async def services(self) -> tuple[str, ...]:
        return tuple({node.service for node in await self.get("s")})

    async def get(self, service: str) -> tuple[Node, ...]:
        self.reads += 1
        if isinstance(self.consistent, Exception):
            raise self.consistent
        if not self.consistent:
            raise ServiceNotFound(service)
        return self.consistent

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        self.marks.append(mark)
        number = mark if isinstance(mark, int) else 0
        while True:
            step = await self.steps.get()
            if isinstance(step, Exception):
                raise step
            number += 1
            yield number, step

    def say(self, *steps: Snapshot | Change | Exception | None) -> None:
        for step in steps:
            self.steps.put_nowait(step)


A, B, C = (Node(service="s", id=name, address=f"h:{port}") for port, name in enumerate("abc", 1))
A2 = msgspec.structs.replace(A, version="2")


def snapshot(*nodes: Node) -> Snapshot:
    return Snapshot(nodes=nodes)


def create(node: Node) -> Change:
    return Change(kind="create", node=node)


def delete(node: Node) -> Change:
    return Change(kind="delete", node=node)


@asynccontextmanager
async def viewing(registry: ScriptedRegistry, *, ttl: float = 60) -> AsyncIterator[View]:
    view = View(registry, "s", ttl=ttl)
    try:
        yield view
    finally:
        await view.aclose()


@pytest.mark.asyncio
async def test_entered_means_the_first_snapshot_is_in() -> None:
    registry = ScriptedRegistry()
    async with viewing(registry) as view:
        entering = asyncio.create_task(view.entered())
        await asyncio.sleep(0)
        assert not entering.done()
        registry.say(snapshot(B, A))
        await entering
        assert view.nodes == (A, B)
        assert (view.state, view.age, view.error) == ("live", 0.0, None)


@pytest.mark.asyncio
async def test_first_attempt_that_fails_is_raised() -> None:
    registry = ScriptedRegistry()
    registry.say(Unavailable("no route"))
    async with viewing(registry) as view:
        with pytest.raises(Unavailable, match="no route"):
            await view.entered()


@pytest.mark.asyncio
async def test_view_recovers_by_itself_after_a_failed_first_attempt() -> None:
    registry = ScriptedRegistry()
    registry.say(Unavailable("no route"), snapshot(A))
    async with viewing(registry) as view:
        await eventually(lambda: view.nodes == (A,))
        await view.entered()


@pytest.mark.asyncio
async def test_changes_are_folded_and_told() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view, view.watch() as watch:
        for step, kind, nodes in (
            (create(B), "create", (A, B)),
            (create(A2), "update", (A2, B)),
            (delete(B), "delete", (A2,)),
        ):
            registry.say(step)
            change = await anext(watch)
            assert (change.kind, change.node) == (kind, step.node)
            assert watch.nodes == nodes


@pytest.mark.asyncio
async def test_what_says_nothing_new_is_not_told() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(create(A), delete(C), snapshot(A), create(B))
        assert await anext(watch) == create(B)


@pytest.mark.asyncio
async def test_delete_carries_the_last_known_node() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A2))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(delete(A))
        assert await anext(watch) == delete(A2)


@pytest.mark.asyncio
async def test_broken_stream_goes_on_from_the_last_mark() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A), create(B), Unavailable("cut"), create(C))
    async with viewing(registry) as view:
        await eventually(lambda: view.nodes == (A, B, C))
        assert registry.marks == [None, 2]
        assert view.state == "live"


@pytest.mark.asyncio
async def test_stream_that_goes_on_is_stale_until_the_server_has_said_so() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view:
        await view.entered()
        registry.say(Unavailable("cut"))
        await eventually(lambda: len(registry.marks) == 2)
        assert (view.state, view.nodes) == ("stale", (A,))
        registry.say(None)
        await eventually(lambda: view.state == "live")
        assert (registry.marks, view.nodes) == ([None, 1], (A,))


@pytest.mark.asyncio
async def test_gap_is_followed_by_a_new_snapshot() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A, B))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(Gap("compacted"), snapshot(B, C))
        assert {(await anext(watch)).kind for _ in range(2)} == {"create", "delete"}
        assert watch.nodes == (B, C)
        assert registry.marks == [None, None]
        assert view.state == "live"


@pytest.mark.asyncio
async def test_outage_keeps_the_nodes_and_says_stale() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(*[Unavailable("down")] * 3)
        await eventually(lambda: watch.state == "stale")
        assert watch.nodes == (A,)
        assert isinstance(watch.error, Unavailable)
        await eventually(lambda: watch.age > 0)
        registry.say(snapshot(A))
        await eventually(lambda: watch.state == "live")
        assert watch.age == 0.0
        assert watch.error is None


@pytest.mark.asyncio
async def test_whatever_a_backend_raises_the_view_goes_on() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view:
        await view.entered()
        registry.say(ZeroDivisionError("a bug"), create(B))
        await eventually(lambda: view.nodes == (A, B))


@pytest.mark.asyncio
async def test_however_often_it_has_failed_the_view_goes_on() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view:
        await view.entered()
        view._failures = 10_000  # those of an outage of hours
        registry.say(Unavailable("cut"), create(B))
        await eventually(lambda: view.nodes == (A, B))


# What a registry may say after an outage although all nodes live: their leases ended before they
# could renew them, or its data are lost.
EMPTY = pytest.mark.parametrize(
    "emptied",
    [[Gap("lost"), snapshot()], [Unavailable("cut"), None, delete(A), delete(B)]],
    ids=["snapshot", "deletes"],
)


@pytest.mark.asyncio
@EMPTY
async def test_outage_never_empties_a_view_at_once(
    emptied: list[Snapshot | Change | Exception | None],
) -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A, B))
    async with viewing(registry) as view:
        await view.entered()
        registry.say(*emptied, create(A), delete(A))
        await eventually(registry.steps.empty)
        await eventually(lambda: view.state == "live")
        assert view.nodes


@pytest.mark.asyncio
@EMPTY
async def test_empty_registry_is_believed_a_time_to_live_after_the_outage(
    emptied: list[Snapshot | Change | Exception | None],
) -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A, B))
    async with viewing(registry, ttl=0.3) as view, view.watch() as watch:
        began = time.monotonic()
        registry.say(*emptied)
        assert sorted([(await anext(watch)).node.id, (await anext(watch)).node.id]) == ["a", "b"]
        assert view.nodes == ()
        assert time.monotonic() - began >= 0.3


@pytest.mark.asyncio
async def test_outages_in_a_row_do_not_put_off_what_is_believed() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry, ttl=0.3) as view:
        await view.entered()
        began = time.monotonic()
        while view.nodes:
            registry.say(Gap("lost"), snapshot())
            await eventually(registry.steps.empty)
            assert time.monotonic() - began < 5


@pytest.mark.asyncio
async def test_outage_soon_after_another_is_doubted_as_long_as_any() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry, ttl=0.6) as view, view.watch() as watch:
        registry.say(Unavailable("cut"), None)
        began = time.monotonic()
        await eventually(lambda: time.monotonic() - began > 0.4)
        registry.say(Gap("lost"), snapshot())
        again = time.monotonic()
        assert await anext(watch) == delete(A)
        assert time.monotonic() - again >= 0.6


@pytest.mark.asyncio
async def test_node_that_comes_back_ends_the_doubt_about_the_others() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A, B))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(Gap("lost"), snapshot(), create(B))
        assert await anext(watch) == delete(A)
        assert view.nodes == (B,)


@pytest.mark.asyncio
async def test_outage_does_not_keep_a_node_while_there_are_others() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A, B))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(Unavailable("cut"), None, delete(A))
        assert await anext(watch) == delete(A)
        assert view.nodes == (B,)


@pytest.mark.asyncio
async def test_empty_snapshot_of_a_live_view_is_believed_at_once() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view:
        await view.entered()
        registry.say(snapshot())
        await eventually(lambda: view.nodes == ())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([create(B), delete(B)], []),
        ([create(B), create(msgspec.structs.replace(B, version="2"))], ["create"]),
        ([create(A2), delete(A2)], ["delete"]),
        ([delete(A), create(A)], ["update"]),
        ([delete(A), create(A), delete(A)], ["delete"]),
    ],
)
async def test_changes_that_a_slow_reader_missed_are_merged(
    steps: list[Change], told: list[str]
) -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view, view.watch() as watch:
        registry.say(*steps, create(C))
        await eventually(lambda: C in watch.nodes)
        kinds = []
        while (change := await anext(watch)).node != C:
            kinds.append(change.kind)
        assert kinds == told


@pytest.mark.asyncio
async def test_slow_watch_does_not_hold_up_another() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot())
    async with viewing(registry) as view, view.watch() as slow, view.watch() as fast:
        for _ in range(300):
            registry.say(create(A))
            assert (await anext(fast)).kind == "create"
            registry.say(delete(A))
            assert (await anext(fast)).kind == "delete"
        assert len(slow._pending) <= 1


@pytest.mark.asyncio
async def test_watch_ends_when_it_is_closed() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    async with viewing(registry) as view:
        async with view.watch() as watch:
            reading = asyncio.create_task(_all(watch))
            await asyncio.sleep(0)
        assert await asyncio.wait_for(reading, 5) == []


@pytest.mark.asyncio
async def test_watch_ends_when_its_view_is_closed() -> None:
    registry = ScriptedRegistry()
    registry.say(snapshot(A))
    view = View(registry, "s", ttl=60)
    async with view.watch() as watch:
        await view.aclose()
        assert await asyncio.wait_for(_all(watch), 5) == []
        assert isinstance(watch.error, Closed)
        assert watch.state == "stale"


async def _all(watch: AsyncIterator[Change]) -> list[Change]:
    return [change async for change in watch]
