"""Whether a call that failed is sent again: counted where it is executed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import micro
from micro import retries
from micro.call import Call
from micro.retries import Budget, Retries, Throttle, is_overload, is_unsent, pause, repeatable
from micro.settings import Settings
from micro.testing import eventually
from micro.transport import Limits

from .fleet import SERVICE, Fleet, Member, Work, fleet

SLACK = 2.0

refused = micro.Unavailable("refused", sent=False)
lost = micro.Unavailable("lost")
overloaded = micro.ResourceExhausted("too much", sent=False)


def final(error: micro.MicroError) -> micro.MicroError:
    error.final = True
    return error


# -- which ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "plain", "idempotent"),
    [
        (refused, True, True),
        (overloaded, True, True),
        (micro.Closed("the channel of a node that left"), True, True),
        (lost, False, True),
        (micro.DeadlineExceeded("late"), False, False),
        (micro.DeadlineExceeded("late", sent=False), False, False),
        (micro.ResourceExhausted("a handler's own"), False, False),
        (micro.TooLarge("large", sent=False), False, False),
        (micro.InvalidArgument("wrong", sent=False), False, False),
        (micro.Unauthenticated("who", sent=False), False, False),
        (micro.Internal("bug"), False, False),
        (micro.DataLoss("garbage"), False, False),
        (final(micro.Unavailable("given up by another", remote=True)), False, False),
        (final(micro.Unavailable("not sent by another", sent=False)), False, False),
    ],
    ids=str,
)
def test_what_is_repeated(error: micro.MicroError, plain: bool, idempotent: bool) -> None:
    assert repeatable(Call(service="s", endpoint="X.Y"), error) is plain
    assert repeatable(Call(service="s", endpoint="X.Y", idempotent=True), error) is idempotent


def test_unsent_is_what_reached_no_handler() -> None:
    assert is_unsent(refused)
    assert is_unsent(micro.Closed("closed"))
    assert not is_unsent(lost)


def test_overload_is_a_refusal_before_the_call_and_no_size() -> None:
    assert is_overload(overloaded)
    assert not is_overload(micro.ResourceExhausted("after it"))
    assert not is_overload(micro.TooLarge("size", sent=False))


# -- when ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attempt", "longest"), [(1, 0.025), (2, 0.05), (3, 0.1)])
def test_pause_is_any_time_up_to_a_longest_that_doubles(attempt: int, longest: float) -> None:
    pauses = [pause(Retries(), attempt, refused) for _ in range(2000)]
    assert 0 <= min(pauses) < 0.05 * longest
    assert 0.95 * longest < max(pauses) < longest
    assert 0.45 * longest < sum(pauses) / 2000 < 0.55 * longest


def test_pause_is_after_what_the_server_asked_for() -> None:
    asked = micro.ResourceExhausted("too much", sent=False, retry_after=0.5)
    pauses = [pause(Retries(), 1, asked) for _ in range(2000)]
    assert 0.5 <= min(pauses) < 0.502
    assert 0.52 < max(pauses) < 0.525


# -- how often: the budget -----------------------------------------------------------------------


class Clock:
    """Stands for the time module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def _repeated(
    clock: Clock, budget: Budget, *, rate: float, seconds: float, before: int = 0
) -> tuple[int, int]:
    """Of calls that all fail, at a steady rate: attempts and repetitions."""
    attempts, repeated = before, 0
    for _ in range(int(rate * seconds)):
        clock.now += 1 / rate
        attempts += 1
        for _ in range(2):
            if not budget.take(attempts):
                break
            attempts += 1
            repeated += 1
    return attempts, repeated


def test_budget_is_a_fifth_of_the_calls(clock: Clock) -> None:
    budget = Budget(Retries())
    attempts, _ = _repeated(clock, budget, rate=1000, seconds=20)
    _, repeated = _repeated(clock, budget, rate=1000, seconds=60, before=attempts)
    assert 0.19 < repeated / 60_000 <= 0.201


def test_budget_of_few_calls_is_ten_a_second(clock: Clock) -> None:
    budget = Budget(Retries())
    assert _repeated(clock, budget, rate=4, seconds=60) == (4 * 60 * 3, 4 * 60 * 2)
    budget = Budget(Retries())
    _, repeated = _repeated(clock, budget, rate=20, seconds=100)
    assert 10 * 100 * 0.99 <= repeated <= 10 * 110


def test_budget_is_the_larger_of_both_and_not_the_sum(clock: Clock) -> None:
    budget = Budget(Retries())
    _, repeated = _repeated(clock, budget, rate=50, seconds=100)
    assert repeated <= 10 * 110


def test_budget_after_a_long_silence_is_that_of_a_new_one(clock: Clock) -> None:
    budget = Budget(Retries())
    attempts, _ = _repeated(clock, budget, rate=100, seconds=30)
    clock.now += 3600
    taken = sum(budget.take(attempts + number) for number in range(200))
    assert taken == 100


def test_budget_of_nothing_repeats_nothing(clock: Clock) -> None:
    budget = Budget(Retries(budget=0, least=0))
    assert _repeated(clock, budget, rate=100, seconds=10) == (1000, 0)


# -- how often: the throttle ---------------------------------------------------------------------


def _held(clock: Clock, throttle: Throttle, *, rate: float, seconds: float, share: float) -> float:
    """The share of calls held back, when the server refuses ``share`` of those that it gets."""
    calls = int(rate * seconds)
    held = sent = lost = 0
    for _ in range(calls):
        clock.now += 1 / rate
        if throttle.holds_back():
            held += 1
            continue
        sent += 1
        if lost < share * sent:
            lost += 1
            throttle.refused()
    return held / calls


def test_throttle_holds_nothing_back_for_a_few_refusals(clock: Clock) -> None:
    throttle = Throttle()
    for _ in range(5):
        throttle.refused()
    assert not any(throttle.holds_back() for _ in range(1000))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_throttle_holds_nothing_back_while_half_is_taken(clock: Clock, share: float) -> None:
    assert _held(clock, Throttle(), rate=1000, seconds=10, share=share) == 0


def test_throttle_holds_nearly_all_back_when_all_is_refused(clock: Clock) -> None:
    throttle = Throttle()
    _held(clock, throttle, rate=1000, seconds=5, share=1)
    assert 0.95 < _held(clock, throttle, rate=1000, seconds=5, share=1) < 1


def test_throttle_ends_when_nothing_is_refused_any_more(clock: Clock) -> None:
    throttle = Throttle()
    _held(clock, throttle, rate=1000, seconds=5, share=1)
    assert not throttle.is_over()
    _held(clock, throttle, rate=1000, seconds=5, share=0)
    assert _held(clock, throttle, rate=1000, seconds=5, share=0) == 0
    assert throttle.is_over()


def test_throttle_of_a_quiet_client_ends_too(clock: Clock) -> None:
    """It holds back no call of one that makes one a second, and does not stay for ever."""
    throttle = Throttle()
    throttle.refused()
    assert _held(clock, throttle, rate=1, seconds=5, share=0) == 0
    assert throttle.is_over()


# -- on which node -------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_idempotent_call_that_was_lost_is_repeated_on_another_node() -> None:
    async with fleet("1", "1", "1") as works:
        await works.settle()
        for member in works.members[:2]:
            member.work.act = _hangs_up(member)
        for _ in range(10):
            assert await works.call("Work.Read", idempotent=True) == "c"
        assert works.counts.retries == works.executed - 10 > 0


def _hangs_up(member: Member) -> Callable[[], Any]:
    """The connection is lost while the call is executed."""

    async def hang_up() -> None:
        member.proxy.cut()
        await asyncio.Event().wait()

    return hang_up


@pytest.mark.asyncio
async def test_each_attempt_is_on_a_node_of_its_own() -> None:
    async with fleet("1", "1", "1", retries=Retries(attempts=10)) as works:
        await works.settle()
        for member in works.members:
            member.work.act = _hangs_up(member)
        with pytest.raises(micro.Unavailable):
            await works.call("Work.Read", idempotent=True)
        assert [member.work.executed for member in works.members] == [1, 1, 1]


@pytest.mark.asyncio
async def test_endpoint_that_is_declared_idempotent_is_repeated_by_typed_clients() -> None:
    async with fleet("1", "1") as works:
        await works.settle()
        bad, good = works.members
        bad.work.act = _hangs_up(bad)
        work = works.web.client(SERVICE, Work)
        for _ in range(8):
            assert await work.read() == "b"
        assert good.work.executed == 8


@pytest.mark.asyncio
async def test_call_that_is_not_idempotent_and_may_have_been_executed_is_not_repeated() -> None:
    async with fleet("1", "1", "1") as works:
        await works.settle()
        for member in works.members:
            member.work.act = _hangs_up(member)
        for number in range(1, 10):
            with pytest.raises(micro.Unavailable) as caught:
                await works.call("Work.Change")
            assert caught.value.sent is None
            assert works.executed == number
        assert works.counts.retries == 0


@pytest.mark.asyncio
async def test_refused_connection_is_repeated_though_not_idempotent() -> None:
    async with fleet("1", "1", "1") as works:
        works.members[0].die()
        for _ in range(30):
            assert await works.call("Work.Change") in ("b", "c")
        assert (works.executed, works.members[0].asked) == (30, 0)


@pytest.mark.asyncio
async def test_call_that_a_server_refused_before_its_handler_is_repeated() -> None:
    async with fleet("1", "1") as works:
        await works.settle()
        bad, good = works.members
        bad.refusal = lambda: micro.Unavailable("stopping", sent=False)
        for number in range(1, 20):
            assert await works.call("Work.Change") == "b"
            assert (bad.work.executed, good.work.executed) == (0, number)


@pytest.mark.asyncio
async def test_only_node_is_asked_again_when_nothing_was_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.9)  # else the pause may be none
    async with fleet("1", retries=Retries(backoff=0.3)) as works:
        (only,) = works.members
        only.die()
        calling = asyncio.create_task(works.call("Work.Change"))
        await eventually(lambda: works.counts.retries or calling.done())
        only.revive()
        assert await calling == "a"
        assert only.work.executed == 1


@pytest.mark.asyncio
async def test_only_node_is_not_asked_again_when_the_call_may_have_been_executed() -> None:
    async with fleet("1") as works:
        (only,) = works.members
        await works.settle()
        only.work.act = _hangs_up(only)
        with pytest.raises(micro.Unavailable):
            await works.call("Work.Read", idempotent=True)
        assert only.work.executed == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("attempts", [1, 2, 3])
async def test_attempts_are_bounded(attempts: int) -> None:
    async with fleet(*["1"] * 5, retries=Retries(attempts=attempts)) as works:
        for member in works.members:
            member.refusal = lambda: micro.Unavailable("stopping", sent=False)
        with pytest.raises(micro.Unavailable, match="stopping") as caught:
            await works.call("Work.Change")
        assert works.asked == attempts
        assert caught.value.sent is False
        assert works.counts.retries == attempts - 1


@pytest.mark.asyncio
async def test_setting_client_retries_bounds_attempts() -> None:
    async with fleet("1", "1", "1", "1") as works:
        for member in works.members:
            member.refusal = lambda: micro.Unavailable("stopping", sent=False)
        plugins = works.web._plugins
        web = micro.Service("other", registry="memory://fleet", transport="tcp", plugins=plugins)
        settings = Settings(environment={"MICRO_CLIENT_RETRIES": "1"})
        async with web.opened(settings):
            with pytest.raises(micro.Unavailable, match="stopping"):
                await web.call(SERVICE, "Work.Change")
        assert works.asked == 2


@pytest.mark.asyncio
async def test_handlers_own_errors_are_not_repeated() -> None:
    async with fleet("1", "1") as works:

        def fail() -> None:
            raise micro.FailedPrecondition("no")

        for member in works.members:
            member.work.act = fail
        with pytest.raises(micro.FailedPrecondition):
            await works.call("Work.Read", idempotent=True)
        assert works.executed == 1


@pytest.mark.asyncio
async def test_error_of_a_call_that_may_have_been_executed_once_never_says_not_sent() -> None:
    """The last attempt was refused, but the first was executed."""
    async with fleet("1", "1", retries=Retries(attempts=2)) as works:
        await works.settle()
        first, second = works.members

        async def hang_up() -> None:
            second.die()
            await _hangs_up(first)()

        first.work.act = hang_up
        selector = micro.Selector(strategy=lambda: lambda peers, _: peers[0])
        with pytest.raises(micro.Unavailable) as caught:
            await works.call("Work.Read", idempotent=True, selector=selector)
        assert first.work.executed == 1
        assert works.counts.retries == 1
        assert caught.value.sent is None


@pytest.mark.asyncio
async def test_calls_that_share_a_failed_connection_each_have_attempts_of_their_own() -> None:
    """They are given one and the same error, and one must not end the others."""
    async with fleet("1", "1", "1") as works:
        works.members[0].die()
        assert set(await asyncio.gather(*(works.call() for _ in range(50)))) == {"b", "c"}
        assert works.executed == 50


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_stream_of_which_nothing_was_sent_is_opened_on_another_node() -> None:
    async with fleet("1", "1") as works:
        works.members[0].die()
        for _ in range(10):
            async with works.web.client.stream(SERVICE, "Work.Pour", {"count": 2}) as replies:
                assert [reply async for reply in replies] == ["b", "b"]
        assert works.counts.retries > 0


@pytest.mark.asyncio
async def test_stream_that_was_lost_is_not_repeated_though_it_is_idempotent() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    async with fleet("1", "1") as works:
        await works.settle()
        for member in works.members:
            member.work.act = _hangs_up(member)
        with pytest.raises(micro.Unavailable):
            await works.call("Work.Gather", numbers())
        assert works.executed == 1


# -- how long ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_push_back_of_the_server_is_honoured() -> None:
    async with fleet("1") as works:
        (only,) = works.members
        times: list[float] = []

        def refuse() -> micro.MicroError:
            times.append(time.monotonic())
            return micro.ResourceExhausted("too much", sent=False, retry_after=0.2)

        only.refusal = refuse
        with pytest.raises(micro.ResourceExhausted) as caught:
            await works.call("Work.Change")
        assert len(times) == 3
        assert min(times[1] - times[0], times[2] - times[1]) >= 0.2
        assert caught.value.retry_after == 0.2


@pytest.mark.asyncio
async def test_nothing_is_sent_past_the_deadline() -> None:
    """A pause that would end after it is not begun: the caller knows at once."""
    async with fleet("1", "1") as works:
        await works.settle()
        for member in works.members:
            member.refusal = lambda: micro.ResourceExhausted("busy", sent=False, retry_after=30)
        began = time.monotonic()
        with pytest.raises(micro.ResourceExhausted, match="busy"):
            await works.call("Work.Change", timeout=20)
        assert time.monotonic() - began < SLACK
        assert works.asked == 1
        assert works.counts.over_budget == 1


@pytest.mark.asyncio
async def test_all_attempts_together_have_the_one_deadline() -> None:
    async with fleet("1", "1") as works:
        await works.settle()
        bad, good = works.members
        bad.work.act = _hangs_up(bad)
        good.work.act = asyncio.Event().wait
        bad_first = micro.Selector(strategy=lambda: lambda peers, _: peers[0])
        began = time.monotonic()
        with pytest.raises(micro.DeadlineExceeded):
            await works.call("Work.Read", idempotent=True, timeout=0.4, selector=bad_first)
        assert 0.4 <= time.monotonic() - began < 0.4 + SLACK
        assert (bad.work.executed, good.work.executed) == (1, 1)


@pytest.mark.asyncio
async def test_repetition_tells_the_server_what_is_left_of_the_deadline() -> None:
    async with fleet("1", "1") as works:
        await works.settle()
        bad, good = works.members
        left: list[float] = []

        async def hang_up() -> None:
            await asyncio.sleep(0.3)
            await _hangs_up(bad)()

        def look() -> None:
            left.append((micro.context().deadline or math.inf) - time.monotonic())

        bad.work.act, good.work.act = hang_up, look
        first = micro.Selector(strategy=lambda: lambda peers, _: peers[0])
        await works.call("Work.Read", idempotent=True, timeout=5, selector=first)
        assert 5 - 0.3 - SLACK < left[0] <= 4.75


@pytest.mark.asyncio
async def test_caller_who_gives_up_in_the_pause_ends_the_call() -> None:
    async with fleet("1", retries=Retries(backoff=60)) as works:
        (only,) = works.members
        only.refusal = lambda: micro.Unavailable("stopping", sent=False)
        calling = asyncio.create_task(works.call("Work.Change", timeout=600))
        await eventually(lambda: only.asked)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert (only.asked, works.counts.retries) == (1, 0)


# -- one layer only ------------------------------------------------------------------------------


class Relay:
    """Calls the fleet from inside a handler."""

    def __init__(self, service: micro.Service) -> None:
        self._work = service.client(SERVICE, Work)
        self.executed = 0

    @micro.endpoint(idempotent=True)
    async def read(self) -> str:
        self.executed += 1
        return await self._work.read()

    @micro.endpoint(idempotent=True)
    async def own(self) -> str:
        self.executed += 1
        raise micro.Unavailable("its own")


async def _relayed(works: Fleet, endpoint: str, relays: int = 3) -> tuple[micro.MicroError, int]:
    """What the caller of relays gets, and how often they were executed."""
    from contextlib import AsyncExitStack

    plugins = works.web._plugins
    async with AsyncExitStack() as stack:
        handlers = []
        for _ in range(relays):
            service = micro.Service(
                "relay", registry="memory://fleet", transport="tcp", plugins=plugins
            )
            handlers.append(Relay(service))
            service.handle(handlers[-1])
            await stack.enter_async_context(service.opened(Settings(environment={})))
        with pytest.raises(micro.MicroError) as caught:
            await works.web.call("relay", endpoint, idempotent=True)
        return caught.value, sum(handler.executed for handler in handlers)


@pytest.mark.asyncio
async def test_what_a_handlers_own_client_gave_up_is_not_repeated_by_its_caller() -> None:
    async with fleet("1", "1", "1") as works:
        for member in works.members:
            member.work.act = _hangs_up(member)
        error, executed = await _relayed(works, "Relay.Read")
        assert isinstance(error, micro.Unavailable)
        assert (executed, works.executed) == (1, 3)


@pytest.mark.asyncio
async def test_what_a_handlers_own_client_could_not_send_says_nothing_of_its_callers_call() -> None:
    async with fleet("1", "1", "1") as works:
        for member in works.members:
            member.die()
        error, executed = await _relayed(works, "Relay.Read")
        assert isinstance(error, micro.Unavailable)
        assert error.sent is None
        assert executed == 1


@pytest.mark.asyncio
async def test_unavailable_of_a_handler_itself_is_repeated_if_idempotent() -> None:
    async with fleet() as works:
        _, executed = await _relayed(works, "Relay.Own")
        assert executed == 3


# -- all together --------------------------------------------------------------------------------


async def _flood(works: Fleet, calls: int, at_once: int = 50, **options: Any) -> int:
    """Call so often; how many calls failed."""
    failed = 0

    async def caller() -> None:
        nonlocal failed, calls
        while calls > 0:
            calls -= 1
            try:
                await works.call("Work.Read", **options)
            except micro.MicroError:
                failed += 1

    await asyncio.gather(*(caller() for _ in range(at_once)))
    return failed


@pytest.mark.asyncio
async def test_service_that_always_fails_gets_a_fifth_more_traffic_at_most() -> None:
    async with fleet("1", "1", "1") as works:

        def fail() -> None:
            raise micro.Unavailable("always")

        for member in works.members:
            member.work.act = fail
        assert await _flood(works, 3000, idempotent=True) == 3000
        assert 3000 < works.executed <= 1.2 * 3000
        assert works.counts.retries == works.executed - 3000
        assert works.counts.over_budget > 0


@pytest.mark.asyncio
async def test_client_with_few_calls_repeats_them_all() -> None:
    async with fleet("1", "1", "1") as works:
        for member in works.members:
            member.refusal = lambda: micro.Unavailable("stopping", sent=False)
        assert await _flood(works, 50, at_once=5) == 50
        assert works.asked == 150
        assert works.counts.over_budget == 0


@pytest.mark.asyncio
async def test_service_that_refuses_all_is_asked_less_until_it_takes_calls_again() -> None:
    async with fleet("1", "1") as works:
        await works.settle()
        for member in works.members:
            member.refusal = lambda: micro.ResourceExhausted("busy", sent=False, retry_after=0.001)
        assert await _flood(works, 4000) == 4000
        assert works.asked < 0.5 * 4000
        assert works.counts.throttled > 0.5 * 4000
        assert works.counts.overloads == works.asked
        assert works.counts.ejections == 0
        with pytest.raises(micro.ResourceExhausted) as caught:
            while True:
                await works.call("Work.Read")
        assert caught.value.sent is False
        for member in works.members:
            member.refusal = None
        for _ in range(50):  # what a server answers at all times is not held back
            await works.call("Debug.Health")

        async def all_taken() -> bool:
            return await _flood(works, 100, at_once=5) == 0

        await eventually(all_taken, within=20)
        works.target.throttle._refused = 0.0
        await works.call("Work.Read")
        assert works.target.throttle is None


@pytest.mark.asyncio
async def test_limit_of_one_connection_does_not_slow_down_the_service() -> None:
    """What the client itself refuses, for a connection's limit, is no overload of the servers."""
    async with fleet("1", limits=Limits()) as works:
        await works.settle()
        peer = works.peer(works.members[0])
        works.target.failed(peer, micro.ResourceExhausted("100 streams run", sent=False))
        assert works.target.throttle is None
        assert works.counts.overloads == 0
        assert peer.outstanding == 0
