"""Choosing a node: by chance, in turn, by load, by key; and which may be chosen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import micro
from micro import selector
from micro.call import Call
from micro.registry import Node
from micro.selector import (
    Candidate,
    Selector,
    Strategy,
    at_random,
    consistent_hash,
    endpoint,
    label,
    least_busy_of_two,
    round_robin,
    version,
)
from micro.testing import eventually

from .fleet import SERVICE, Work, fleet


def nodes(count: int) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(Node(service="s", id=f"node-{number}", address=f"10.0.0.1:{number + 1}"))
        for number in range(count)
    )


def call(tenant: str = "") -> Call:
    return Call(service="s", endpoint="X.Y", metadata={"tenant": tenant})


def picks(strategy: Strategy, candidates: Sequence[Candidate], count: int) -> Counter[str]:
    return Counter(strategy(candidates, call()).node.id for _ in range(count))


ONE_FOR_ALL: dict[str, Callable[[], Strategy]] = {
    "at_random": at_random,
    "round_robin": round_robin,
    "least_busy_of_two": least_busy_of_two,
    "consistent_hash": consistent_hash(lambda call: call.metadata["tenant"]),
}


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_one_candidate_is_chosen(name: str) -> None:
    (only,) = candidates = nodes(1)
    strategy = ONE_FOR_ALL[name]()
    assert all(strategy(candidates, call(str(turn))) is only for turn in range(50))


# -- by chance, in turn ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["at_random", "least_busy_of_two"])
def test_idle_nodes_are_chosen_alike(name: str) -> None:
    """40,000 picks of 10 nodes: 4,000 each, within five standard deviations."""
    counted = picks(ONE_FOR_ALL[name](), nodes(10), 40_000)
    assert len(counted) == 10
    assert max(abs(count - 4000) for count in counted.values()) < 5 * 60


def test_round_robin_takes_one_after_the_other() -> None:
    strategy, candidates = round_robin(), nodes(7)
    turns = [strategy(candidates, call()) for _ in range(70)]
    assert len(set(turns[:7])) == 7
    assert turns == turns[:7] * 10


def test_round_robin_begins_anywhere() -> None:
    candidates = nodes(10)
    assert len({round_robin()(candidates, call()).node.id for _ in range(300)}) == 10


@pytest.mark.asyncio
async def test_round_robin_goes_on_across_calls_and_endpoints() -> None:
    async with fleet("1", "1", "1", selector=Selector(strategy=round_robin)) as works:
        work = works.web.client(SERVICE, Work)
        for _ in range(10):
            await work.read()
            await works.call("Work.Change")
            await works.call("Work.Read")
        assert [member.work.executed for member in works.members] == [10, 10, 10]


# -- by load --------------------------------------------------------------------------------------


def test_of_two_nodes_the_busier_is_never_chosen() -> None:
    candidates = nodes(2)
    candidates[0].outstanding = 1
    assert picks(least_busy_of_two(), candidates, 1000) == {"node-1": 1000}


def test_busiest_node_of_many_is_never_chosen() -> None:
    candidates = nodes(10)
    candidates[3].outstanding = 5
    assert "node-3" not in picks(least_busy_of_two(), candidates, 10_000)


def test_load_is_as_even_as_two_choices_make_it() -> None:
    """Of 10,000 calls that all go on, 100 each on 100 nodes: by chance the most has 125 or so."""
    strategy, candidates = least_busy_of_two(), nodes(100)
    for _ in range(10_000):
        strategy(candidates, call()).outstanding += 1
    assert max(one.outstanding for one in candidates) <= 106


# -- by key ---------------------------------------------------------------------------------------

by_tenant = ONE_FOR_ALL["consistent_hash"]
TENANTS = [f"tenant-{number}" for number in range(20_000)]


def placed(candidates: Sequence[Candidate]) -> dict[str, str]:
    strategy = by_tenant()
    return {tenant: strategy(candidates, call(tenant)).node.id for tenant in TENANTS}


def test_same_key_is_on_the_same_node_for_every_client_in_every_order() -> None:
    candidates = list(nodes(10))
    here = placed(tuple(candidates))
    random.Random(1).shuffle(candidates)
    assert placed(tuple(candidates)) == here


def test_only_keys_of_a_node_that_goes_move() -> None:
    candidates = nodes(10)
    before, after = placed(candidates), placed(candidates[:4] + candidates[5:])
    moved = {tenant for tenant in TENANTS if before[tenant] != after[tenant]}
    assert moved == {tenant for tenant in TENANTS if before[tenant] == "node-4"}
    assert len(Counter(after[tenant] for tenant in moved)) == 9  # to all of the others


def test_node_that_comes_takes_its_share_and_nothing_else_moves() -> None:
    candidates = nodes(11)
    before, after = placed(candidates[:10]), placed(candidates)
    moved = [tenant for tenant in TENANTS if before[tenant] != after[tenant]]
    assert {after[tenant] for tenant in moved} == {"node-10"}
    assert 0.5 / 11 < len(moved) / len(TENANTS) < 1.5 / 11


@pytest.mark.parametrize("count", [2, 3, 10, 100])
def test_each_node_has_a_half_to_one_and_a_half_of_its_share_of_keys(count: int) -> None:
    counted = Counter(placed(nodes(count)).values())
    assert len(counted) == count
    assert min(counted.values()) >= 0.5 * len(TENANTS) / count
    assert max(counted.values()) <= 1.5 * len(TENANTS) / count


@pytest.mark.asyncio
async def test_calls_with_the_same_key_go_to_one_node_while_it_is_there_and_up() -> None:
    async with fleet("1", "1", "1", selector=Selector(strategy=by_tenant)) as works:
        before = {name: await works.call(metadata={"tenant": name}) for name in TENANTS[:40]}
        assert set(before.values()) == {"a", "b", "c"}
        for name in TENANTS[:40]:
            assert await works.call(metadata={"tenant": name}) == before[name]
        await works.leave(works.members[0])
        await eventually(lambda: "a" not in works.called())
        for name in TENANTS[:40]:
            now = await works.call(metadata={"tenant": name})
            assert now == before[name] or before[name] == "a"


# -- what it costs --------------------------------------------------------------------------------


class Watched(Sequence[Candidate]):
    """Candidates that count how many of them are looked at."""

    def __init__(self, count: int) -> None:
        self._candidates = nodes(count)
        self.looked = 0

    def __len__(self) -> int:
        return len(self._candidates)

    def __getitem__(self, index: Any) -> Any:
        self.looked += 1
        return self._candidates[index]

    def __iter__(self) -> Iterator[Candidate]:
        self.looked += len(self)
        return iter(self._candidates)


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_pick_looks_at_two_nodes_at_most_however_many_there_are(name: str) -> None:
    strategy, candidates = ONE_FOR_ALL[name](), Watched(10_000)
    strategy(candidates, call())  # the first one of a hash makes its ring
    candidates.looked = 0
    for turn in range(100):
        strategy(candidates, call(str(turn)))
    assert candidates.looked <= 2 * 100 + 10  # where both are the same one, it takes another


@pytest.mark.asyncio
async def test_nodes_are_filtered_when_they_change_and_not_by_call() -> None:
    asked: list[str] = []

    def remember(node: Node) -> bool:
        asked.append(node.id)
        return True

    async with fleet("1", "1", "1", selector=Selector(filters=(remember,))) as works:
        for _ in range(20):
            await works.call()
        assert sorted(asked) == ["a", "b", "c"]
        await works.leave(works.members[2])
        await eventually(lambda: "c" not in works.called())
        for _ in range(20):
            await works.call()
        assert sorted(asked) == ["a", "a", "b", "b", "c"]


# -- filters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (version("2"), True),
        (version("1"), False),
        (label("zone", "eu"), True),
        (label("zone", "us"), False),
        (label("rack", "eu"), False),
        (endpoint("Greeter.Hello"), True),
        (endpoint("Greeter.Bye"), False),
    ],
)
def test_filter_takes_nodes_that_say_so(allowed: selector.Filter, expected: bool) -> None:
    node = Node(
        service="s",
        id="a",
        address="h:1",
        version="2",
        metadata={"zone": "eu"},
        endpoints=(micro.Endpoint(name="Greeter.Hello"),),
    )
    assert allowed(node) is expected


def test_all_filters_have_to_take_a_node() -> None:
    node = Node(service="s", id="a", address="h:1", version="2", metadata={"zone": "eu"})
    assert Selector().allows(node)
    assert Selector(filters=(version("2"), label("zone", "eu"))).allows(node)
    assert not Selector(filters=(version("2"), label("zone", "us"))).allows(node)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((version("2"),), {"b", "c"}),
        ((label("zone", "c"),), {"c"}),
        ((endpoint("Work.Read"),), {"a", "b", "c"}),
        ((version("2"), label("zone", "b")), {"b"}),
    ],
)
async def test_only_nodes_that_the_filters_take_are_called(
    filters: tuple[selector.Filter, ...], expected: set[str]
) -> None:
    async with fleet("1", "2", "2", selector=Selector(filters=filters)) as works:
        assert {await works.call() for _ in range(60)} == expected


@pytest.mark.asyncio
async def test_filters_that_take_no_node_are_told() -> None:
    async with fleet("1", "2", selector=Selector(filters=(version("3"),))) as works:
        text = "of 2 nodes of 'work' the selector's filters take none"
        with pytest.raises(micro.Unavailable, match=text) as caught:
            await works.call()
        assert caught.value.sent is False


@pytest.mark.asyncio
async def test_node_that_changes_is_filtered_anew() -> None:
    async with fleet("1", "1", selector=Selector(filters=(version("2"),))) as works:
        with pytest.raises(micro.Unavailable, match="take none"):
            await works.call()
        works.members[1].version = "2"
        await works.join(works.members[1])
        await eventually(works.called)
        assert {await works.call() for _ in range(20)} == {"b"}


@pytest.mark.asyncio
async def test_address_is_called_whatever_the_selector() -> None:
    nowhere = Selector(filters=(version("3"),))
    async with fleet("1", "2", selector=nowhere) as works:
        for member in works.members:
            where = member.proxy.address
            assert await works.call(address=where) == member.name
            assert await works.call(address=where, selector=nowhere) == member.name


# -- a selector of one's own ----------------------------------------------------------------------


def first_in_zone(zone: str) -> Strategy:
    def choose(candidates: Sequence[Candidate], _: Call) -> Candidate:
        near = [one for one in candidates if one.node.metadata["zone"] == zone]
        return random.choice(near or candidates)

    return choose


@pytest.mark.asyncio
async def test_strategy_of_the_program_chooses() -> None:
    async with fleet(
        "1", "1", "1", selector=Selector(strategy=lambda: first_in_zone("b"))
    ) as works:
        assert {await works.call() for _ in range(20)} == {"b"}
        await works.leave(works.members[1])
        await eventually(lambda: "b" not in works.called())
        assert {await works.call() for _ in range(50)} == {"a", "c"}


@pytest.mark.asyncio
async def test_each_call_may_have_a_selector_of_its_own() -> None:
    newest = Selector(filters=(version("2"),))
    async with fleet("1", "1", "2") as works:
        assert {await works.call(selector=newest) for _ in range(20)} == {"c"}
        near = micro.using(works.web.client(SERVICE, Work), selector=newest)
        assert {await near.read() for _ in range(20)} == {"c"}
        streaming = works.web.client.stream(
            SERVICE, "Work.Pour", {"count": 1}, returns=str, selector=newest
        )
        async with streaming as replies:
            assert [reply async for reply in replies] == ["c"]
        assert {await works.call() for _ in range(60)} == {"a", "b", "c"}


@pytest.mark.asyncio
async def test_strategy_is_made_once_for_all_calls_of_a_service_with_equal_selectors() -> None:
    made: list[Strategy] = []

    def make() -> Strategy:
        made.append(round_robin())
        return made[-1]

    async with fleet("1", "1") as works:
        for _ in range(10):
            await works.call(selector=Selector(strategy=make))
        assert len(made) == 1
        assert [member.work.executed for member in works.members] == [5, 5]


@pytest.mark.asyncio
async def test_selectors_made_for_each_call_are_not_kept_for_ever() -> None:
    async with fleet("1", "1") as works:
        for _ in range(500):
            await works.call(selector=Selector(filters=(version("1"),)))
        assert len(works.target._pools) < 100
        await works.call()


@pytest.mark.asyncio
async def test_selectors_share_what_is_known_of_a_node() -> None:
    everyone = Selector(filters=(version("1"),), strategy=at_random)
    async with fleet("1", "1", "1") as works:
        await works.call(selector=everyone)
        works.members[0].die()
        while works.counts.ejections == 0:
            await works.call("Work.Read", idempotent=True)
        before = works.members[0].proxy._accepted
        assert {await works.call(selector=everyone) for _ in range(60)} == {"b", "c"}
        assert works.members[0].proxy._accepted == before
        pool = works.target.pool_of(everyone)
        assert set(works.target.peers(pool)) == set(works.target.peers(works.target.pool))


@pytest.mark.asyncio
async def test_filter_that_fails_fails_the_calls_that_have_it_alone() -> None:
    def broken(node: Node) -> bool:
        raise KeyError("zone")

    async with fleet("1", "1") as works:
        faulty = Selector(filters=(broken,))
        for _ in range(3):
            with pytest.raises(KeyError):
                await works.call(selector=faulty)
            await works.leave(works.members[0])
            await eventually(lambda: works.called() == {"b"})
            assert await works.call() == "b"
