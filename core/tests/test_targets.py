"""Nodes that fail are taken out, and taken in again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
import pytest_asyncio

import micro
from micro import _targets
from micro._targets import Counts, Peer, Target, Tried
from micro.call import Call
from micro.registry import Node
from micro.retries import Retries
from micro.selector import Selector, version
from micro.settings import Settings
from micro.testing import eventually

from .fleet import Fleet, fleet

SLACK = 2.0

refused = micro.Unavailable("refused", sent=False)
lost = micro.Unavailable("lost")
late = micro.DeadlineExceeded("late")
garbage = micro.DataLoss("garbage")


class View:
    """The nodes, as the registry has them."""

    def __init__(self, count: int) -> None:
        self.nodes = tuple(
            Node(service="s", id=f"n{number}", address=f"h:{number + 1}", version=str(number % 2))
            for number in range(count)
        )


class Watched:
    """A Target, what it asks nodes, and what it lets go."""

    def __init__(self, count: int) -> None:
        self.view = View(count)
        self.counts = Counts()
        self.asked: list[str] = []
        #: Nodes that answer.
        self.alive: set[str] = set()
        self.gone: set[str] = set()
        self.target = Target(
            self.view,
            "s",
            ("http",),
            Selector(),
            Retries(),
            self.counts,
            secure=False,
            answers=self._answers,
            gone=lambda ways: self.gone.update(way[1] for way in ways),
        )

    @property
    def up(self) -> list[str]:
        return [peer.node.id for peer in self.target.peers(self.target.pool)]

    def peer(self, name: str) -> Peer:
        self.target.peers(self.target.pool)
        (peer,) = [peer for peer in self.target._peers if peer.node.id == name]
        return peer

    def fail(self, name: str, error: micro.MicroError = refused, times: int = 1) -> None:
        for _ in range(times):
            self.target.failed(self.peer(name), error)

    def leave(self, *names: str) -> None:
        self.view.nodes = tuple(node for node in self.view.nodes if node.id not in names)

    async def _answers(self, peer: Peer) -> bool:
        self.asked.append(peer.node.id)
        return peer.node.id in self.alive


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are out for a hundredth of the time."""
    monkeypatch.setattr(_targets, "_OUT", 0.01)
    monkeypatch.setattr(_targets, "_MOST_OUT", 0.08)


Make = Callable[[int], Watched]


@pytest_asyncio.fixture
async def watched() -> AsyncIterator[Make]:
    made: list[Watched] = []

    def make(count: int) -> Watched:
        made.append(Watched(count))
        return made[-1]

    yield make
    for each in made:
        await each.target.aclose()


# -- out ------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_node_that_cannot_be_reached_is_out_at_once(watched: Make) -> None:
    service = watched(4)
    service.fail("n0")
    assert service.up == ["n1", "n2", "n3"]
    assert service.counts.ejections == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [lost, late, garbage], ids=repr)
async def test_node_is_out_after_five_failures_in_a_row(
    watched: Make, error: micro.MicroError
) -> None:
    service = watched(4)
    service.fail("n0", error, times=4)
    assert "n0" in service.up
    service.fail("n0", error)
    assert "n0" not in service.up


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "answer",
    [
        micro.InvalidArgument("wrong", remote=True),
        micro.Internal("a bug of the handler", remote=True),
        micro.NotFound("none", remote=True),
    ],
    ids=repr,
)
async def test_answer_ends_a_row_of_failures(watched: Make, answer: micro.MicroError) -> None:
    service = watched(4)
    for _ in range(10):
        service.fail("n0", lost, times=4)
        service.fail("n0", answer)
    for _ in range(10):
        service.fail("n0", lost, times=4)
        service.target.answered(service.peer("n0"))
    assert "n0" in service.up


@pytest.mark.asyncio
async def test_what_a_node_tells_of_another_service_is_an_answer(watched: Make) -> None:
    service = watched(4)
    of_another = micro.Unavailable("it could not reach another", remote=True)
    of_another.final = True
    service.fail("n0", of_another, times=20)
    assert "n0" in service.up


@pytest.mark.asyncio
async def test_what_was_raised_before_a_node_was_asked_says_nothing_of_it(watched: Make) -> None:
    service = watched(4)
    service.fail("n0", lost, times=4)
    service.fail("n0", micro.TooLarge("ours", sent=False))
    service.fail("n0", micro.Closed("ours"))
    service.fail("n0", lost)
    assert "n0" not in service.up


@pytest.mark.asyncio
async def test_overload_ejects_nobody(watched: Make) -> None:
    service = watched(4)
    busy = micro.ResourceExhausted("busy", sent=False, remote=True, retry_after=0.01)
    service.fail("n0", busy, times=100)
    assert "n0" in service.up
    assert (service.counts.ejections, service.counts.overloads) == (0, 100)


@pytest.mark.asyncio
async def test_node_with_too_much_counts_as_busier_until_it_wants_to_be_asked(
    watched: Make,
) -> None:
    service = watched(4)
    busy = micro.ResourceExhausted("busy", sent=False, remote=True, retry_after=0.05)
    service.fail("n0", busy, times=10)
    peer = service.peer("n0")
    assert peer.outstanding == 10
    await eventually(lambda: peer.outstanding == 0)


@pytest.mark.asyncio
async def test_what_is_remembered_of_refusals_is_bounded(watched: Make) -> None:
    service = watched(4)
    for_ever = micro.ResourceExhausted("busy", sent=False, remote=True, retry_after=300)
    service.fail("n0", for_ever, times=5000)
    assert service.peer("n0").outstanding <= 1000


@pytest.mark.asyncio
@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (10, 5), (11, 5)])
async def test_at_most_half_are_out(watched: Make, count: int, most: int) -> None:
    service = watched(count)
    for number in range(count):
        service.fail(f"n{number}", times=10)
    assert len(service.up) == count - most
    assert service.counts.ejections == most


@pytest.mark.asyncio
async def test_when_nodes_leave_so_that_more_than_half_would_be_out_all_are_back(
    watched: Make,
) -> None:
    service = watched(6)
    for name in ("n0", "n1", "n2"):
        service.fail(name)
    assert service.up == ["n3", "n4", "n5"]
    service.leave("n3")
    assert service.up == ["n0", "n1", "n2", "n4", "n5"]
    assert service.counts.readmissions == 3
    assert not service.target._out


@pytest.mark.asyncio
async def test_nodes_that_are_out_are_called_when_a_selector_takes_no_other(watched: Make) -> None:
    service = watched(4)
    odd = service.target.pool_of(Selector(filters=(version("1"),)))
    service.fail("n1")
    assert [peer.node.id for peer in service.target.peers(odd)] == ["n3"]
    service.fail("n3")
    assert [peer.node.id for peer in service.target.peers(odd)] == ["n1", "n3"]
    assert service.up == ["n0", "n2"]


# -- in -------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_node_is_back_when_it_answers(watched: Make, quick: None) -> None:
    service = watched(4)
    service.fail("n0")
    await eventually(lambda: len(service.asked) >= 3)
    assert "n0" not in service.up
    service.alive.add("n0")
    await eventually(lambda: "n0" in service.up)
    assert service.counts.readmissions == 1
    assert set(service.asked) == {"n0"}
    assert not service.target._out


@pytest.mark.asyncio
async def test_node_is_out_for_twice_as_long_each_time(
    watched: Make, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def short(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(_targets, "_OUT", 1.0)
    monkeypatch.setattr(_targets, "_MOST_OUT", 30.0)
    service = watched(4)
    monkeypatch.setattr(asyncio, "sleep", short)
    service.fail("n0")
    while len(waited) < 8:
        await sleep(0)
    monkeypatch.undo()
    wanted = [1, 2, 4, 8, 16, 30, 30, 30]
    for seconds, expected in zip(waited, wanted, strict=False):
        assert 0.9 * expected <= seconds <= 1.1 * expected


@pytest.mark.asyncio
async def test_node_that_fails_again_is_out_for_longer_and_one_that_was_good_is_forgiven(
    watched: Make, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = watched(4)
    service.alive.add("n0")
    peer = service.peer("n0")
    for time_out in range(1, 4):
        service.fail("n0")
        await eventually(lambda: "n0" in service.up)
        assert peer.ejections == time_out
    monkeypatch.setattr(_targets, "_FORGIVEN", 0.0)
    service.fail("n0")
    await eventually(lambda: "n0" in service.up)
    assert peer.ejections == 1


@pytest.mark.asyncio
async def test_node_that_leaves_is_asked_no_more(watched: Make, quick: None) -> None:
    service = watched(4)
    before = asyncio.all_tasks()
    service.fail("n0")
    (task,) = asyncio.all_tasks() - before
    service.leave("n0")
    assert service.up == ["n1", "n2", "n3"]
    assert service.gone == {"h:1"}
    await eventually(task.done)
    assert not service.target._out
    assert not service.target._ending


@pytest.mark.asyncio
async def test_node_with_a_new_address_is_a_new_one(watched: Make) -> None:
    service = watched(3)
    service.fail("n0")
    assert service.up == ["n1", "n2"]
    moved = Node(service="s", id="n0", address="h:99")
    service.view.nodes = (moved, *service.view.nodes[1:])
    assert service.up == ["n0", "n1", "n2"]
    assert service.gone == {"h:1"}


@pytest.mark.asyncio
async def test_node_that_changes_but_stays_where_it_is_keeps_its_health(watched: Make) -> None:
    service = watched(3)
    service.fail("n0")
    same = Node(service="s", id="n0", address="h:1", version="9")
    service.view.nodes = (same, *service.view.nodes[1:])
    assert service.up == ["n1", "n2"]
    assert service.peer("n0").node.version == "9"


@pytest.mark.asyncio
async def test_closing_ends_what_asks_nodes_and_nothing_asks_after_it(
    watched: Make, quick: None
) -> None:
    before = asyncio.all_tasks()
    service = watched(10)
    for number in range(5):
        service.fail(f"n{number}")
    assert len(asyncio.all_tasks() - before) == 5
    await service.target.aclose()
    assert asyncio.all_tasks() == before
    for number in range(10):
        service.fail(f"n{number}")
    assert asyncio.all_tasks() == before
    await service.target.aclose()


@pytest.mark.asyncio
async def test_error_that_other_callers_were_given_too_is_told_to_each_in_its_own_words(
    watched: Make,
) -> None:
    service = watched(3)
    shared = micro.Unavailable("one connection for all of them", sent=False)
    tried = Tried()
    tried.peers, tried.executed = [service.peer("n1"), service.peer("n2")], True
    target, call = service.target, Call(service="s", endpoint="X.Y", idempotent=True)
    with pytest.raises(micro.Unavailable, match="one connection") as caught:
        await target.again(call, target.pool, tried, service.peer("n0"), shared)
    assert (caught.value.final, caught.value.sent) == (True, None)
    assert (shared.final, shared.sent) == (False, False)


# -- with real nodes ------------------------------------------------------------------------------


async def _until_out(works: Fleet, name: str) -> int:
    """Call until a node is out; how many calls failed."""
    failed = 0
    while not works.counts.ejections or name in works.called():
        try:
            await works.call("Work.Change")
        except micro.Unavailable:
            failed += 1
    return failed


@pytest.mark.asyncio
async def test_dead_node_is_out_within_a_second_and_back_when_it_lives(quick: None) -> None:
    async with fleet("1", "1", "1") as works:
        await works.settle()
        dead = works.members[0]
        dead.die()
        began = time.monotonic()
        assert await _until_out(works, "a") <= 1  # the one that the reset met
        assert time.monotonic() - began < 1.0 + SLACK
        for _ in range(50):
            assert await works.call("Work.Change") in ("b", "c")
        dead.revive()
        await eventually(lambda: "a" in works.called())
        assert {await works.call() for _ in range(60)} == {"a", "b", "c"}
        assert works.counts.ejections == works.counts.readmissions == 1


@pytest.mark.asyncio
async def test_node_is_asked_by_its_health_and_by_no_call_of_a_user(quick: None) -> None:
    async with fleet("1", "1", "1") as works:
        bad = works.members[0]
        bad.refusal = lambda: micro.Unavailable("stopping", sent=False)
        await _until_out(works, "a")
        asked, bad.probes = bad.asked, 0
        for _ in range(100):
            await works.call()
        await eventually(lambda: bad.probes >= 2)
        assert bad.asked == asked
        assert "a" not in works.called()
        bad.refusal = None
        await eventually(lambda: "a" in works.called())


@pytest.mark.asyncio
async def test_node_without_health_is_back_when_it_answers_anything(quick: None) -> None:
    async with fleet("1", "1", "1") as works:
        bad = works.members[0]
        bad.refusal = lambda: micro.Unavailable("stopping", sent=False)
        await _until_out(works, "a")
        bad.refusal = lambda: micro.EndpointNotFound("there is no Debug.Health")
        await eventually(lambda: "a" in works.called())


@pytest.mark.asyncio
async def test_user_who_gives_up_says_nothing_of_the_node() -> None:
    async with fleet("1", "1") as works:
        begun = asyncio.Event()

        async def wait() -> None:
            begun.set()
            await asyncio.Event().wait()

        for member in works.members:
            member.work.act = wait
        for _ in range(20):
            begun.clear()
            calling = asyncio.create_task(works.call(timeout=60))
            await begun.wait()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
        assert works.counts.ejections == 0
        assert works.called() == {"a", "b"}
        assert not any(works.peer(member).failures for member in works.members)
        assert not any(works.peer(member).outstanding for member in works.members)


@pytest.mark.asyncio
async def test_deadline_that_comes_is_a_failure_of_the_node() -> None:
    async with fleet("1", "1") as works:
        silent = works.members[0]
        silent.work.act = asyncio.Event().wait
        while silent.work.executed < 5:
            with suppress(micro.DeadlineExceeded):
                await works.call(timeout=0.05)
        assert works.called() == {"b"}


@pytest.mark.asyncio
async def test_overloaded_nodes_stay_and_are_spared() -> None:
    async with fleet("1", "1") as works:
        busy = works.members[0]
        busy.refusal = lambda: micro.ResourceExhausted("busy", sent=False, retry_after=60)
        first = Selector(strategy=lambda: lambda peers, _: peers[0])
        with pytest.raises(micro.ResourceExhausted):
            await works.call(selector=first)
        for _ in range(40):
            assert await works.call() == "b"
        assert busy.asked == 1
        assert works.counts.ejections == 0
        assert works.called() == {"a", "b"}


@pytest.mark.asyncio
async def test_nodes_that_all_fail_are_called_on() -> None:
    async with fleet("1", "1", "1", "1") as works:
        for member in works.members:
            member.work.act = _fail
        for _ in range(100):
            with pytest.raises(micro.Unavailable):
                await works.call()
        assert len(works.called()) == 2
        for member in works.members:
            member.work.act = None
        assert await works.call() in works.called()


def _fail() -> None:
    raise micro.Unavailable("always")


@pytest.mark.asyncio
async def test_decisions_are_told_by_debug_counters() -> None:
    async with fleet("1", "1", "1") as works:
        works.members[0].die()
        while not works.counts.ejections:
            await works.call()
        teller = micro.Service("teller", registry="memory", transport="memory")
        teller._server.counts = works.web.client.counts
        teller.handle(Teller())
        async with teller.opened(Settings(environment={})):
            told = (await teller.call("teller", "Debug.Counters"))["counters"]
        assert told["ejections"] == 1
        assert told["retries"] >= 1
        names = {"over_budget", "readmissions", "overloads", "throttled", "shed_busy"}
        assert names <= told.keys()


class Teller:
    async def ping(self) -> None: ...


@pytest.mark.asyncio
async def test_closing_a_client_with_nodes_out_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = asyncio.all_tasks()
    async with fleet("1", "1", "1", "1") as works:
        for member in works.members[:2]:
            member.die()
        while works.counts.ejections < 2:
            await works.call("Work.Read", idempotent=True)
    await eventually(lambda: asyncio.all_tasks() <= before)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.asyncio
async def test_call_that_waits_to_be_repeated_ends_when_its_client_closes() -> None:
    async with fleet("1", retries=Retries(backoff=0.5)) as works:
        (only,) = works.members
        only.refusal = lambda: micro.Unavailable("stopping", sent=False)
        calling = asyncio.create_task(works.call())
        await eventually(lambda: only.asked)
        before = only.asked
        await works.web.client.aclose()
        with pytest.raises(micro.Unavailable, match="stopping"):
            await calling
        assert only.asked == before
        assert not works.web.client._routes._channels


@pytest.mark.asyncio
async def test_node_that_leaves_while_a_call_waits_is_not_called() -> None:
    async with fleet("1", "1", retries=Retries(backoff=0.3)) as works:
        bad, good = works.members
        bad.refusal = lambda: micro.Unavailable("stopping", sent=False)
        good.refusal = bad.refusal
        calling = asyncio.create_task(works.call())
        await eventually(lambda: works.asked == 1)
        (first,) = [member for member in works.members if member.asked]
        (other,) = [member for member in works.members if not member.asked]
        await works.leave(other)
        first.refusal = None
        assert await calling == first.name
        assert other.asked == 0


@pytest.mark.asyncio
async def test_channel_of_a_node_that_leaves_fails_no_call() -> None:
    """Calls that have chosen it, and find its channel closed, go to another."""
    async with fleet("1", "1") as works:
        await works.settle()

        async def calls() -> None:
            for _ in range(100):
                assert await works.call() in ("a", "b")

        calling = [asyncio.create_task(calls()) for _ in range(5)]
        for _ in range(20):
            await works.leave(works.members[0])
            await asyncio.sleep(0.003)
            await works.join(works.members[0])
            await asyncio.sleep(0.003)
        await asyncio.gather(*calling)


@pytest.mark.asyncio
async def test_closed_channel_of_a_node_is_no_error_of_the_call() -> None:
    async with fleet("1", "1") as works:
        await works.settle()
        closed = works.peer(works.members[0])
        await works.call("Work.Change", address=works.members[0].proxy.address)
        channel = await works.web.client._routes._channel(closed)
        await channel.aclose()
        for _ in range(10):
            assert await works.call() == "b"
        assert works.counts.ejections == 0
