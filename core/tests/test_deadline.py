"""Many deadlines, one timer."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest

from micro.deadline import Alarm, Deadlines
from micro.testing import eventually

SLACK = 2.0
#: How late an end may come: two looks, and what the loop needs.
LATE = 0.02


@pytest.fixture
def deadlines() -> Iterator[Deadlines]:
    deadlines = Deadlines()
    yield deadlines
    deadlines.close()


def soon(seconds: float) -> float:
    return time.monotonic() + seconds


# -- one limit ------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.0005, 0.05, 0.2])
async def test_body_ends_at_its_moment_and_never_before(
    deadlines: Deadlines, seconds: float
) -> None:
    when = soon(seconds)
    limit = deadlines.until(when)
    with pytest.raises(TimeoutError):
        with limit:
            await asyncio.sleep(10)
    assert limit.expired
    assert when <= time.monotonic() < max(when, when - seconds) + LATE + SLACK
    assert not deadlines.running


@pytest.mark.asyncio
async def test_body_that_is_done_in_time_goes_on(deadlines: Deadlines) -> None:
    limit = deadlines.until(soon(0.05))
    with limit:
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    assert not limit.expired
    assert not deadlines.running


@pytest.mark.asyncio
async def test_infinity_is_no_end_and_no_timer(deadlines: Deadlines) -> None:
    with deadlines.until(math.inf):
        await asyncio.sleep(0.05)
        assert deadlines.wake == math.inf


@pytest.mark.asyncio
async def test_error_of_the_body_is_its_own(deadlines: Deadlines) -> None:
    with pytest.raises(ZeroDivisionError):
        with deadlines.until(soon(10)):
            raise ZeroDivisionError
    assert not deadlines.running


@pytest.mark.asyncio
async def test_error_that_a_body_makes_of_its_end_is_its_own(deadlines: Deadlines) -> None:
    """And the task is not left cancelled."""
    with pytest.raises(ZeroDivisionError):
        with deadlines.until(soon(0.01)):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                raise ZeroDivisionError from None
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_timeout_of_the_body_is_told_apart(deadlines: Deadlines) -> None:
    limit = deadlines.until(soon(10))
    with pytest.raises(TimeoutError):
        with limit:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
    assert not limit.expired


@pytest.mark.asyncio
async def test_it_is_for_tasks(deadlines: Deadlines) -> None:
    told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def outside() -> None:
        try:
            with deadlines.until(soon(1)):
                pass
        except RuntimeError as exc:
            told.set_result(exc)

    asyncio.get_running_loop().call_soon(outside)
    assert "task" in str(await told)


# -- cancellation ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_cancellation_from_outside_is_no_timeout(deadlines: Deadlines) -> None:
    async def work() -> None:
        with deadlines.until(soon(10)):
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not deadlines.running


@pytest.mark.asyncio
@pytest.mark.parametrize("first", ["deadline", "cancel"])
async def test_cancellation_and_deadline_at_once_is_a_cancellation(
    deadlines: Deadlines, first: str
) -> None:
    limit = deadlines.until(math.inf)

    async def work() -> None:
        with limit:
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    both: list[Callable[[], object]] = [limit.expire, task.cancel]
    for act in both if first == "deadline" else reversed(both):
        act()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.asyncio
async def test_inner_limit_ends_the_inner_body(deadlines: Deadlines) -> None:
    inner = deadlines.until(soon(0.02))
    with deadlines.until(soon(10)) as outer:
        with pytest.raises(TimeoutError):
            with inner:
                await asyncio.sleep(10)
        await asyncio.sleep(0)
    assert (outer.expired, inner.expired) == (False, True)


@pytest.mark.asyncio
async def test_outer_limit_ends_both_bodies(deadlines: Deadlines) -> None:
    outer, inner = deadlines.until(soon(0.02)), deadlines.until(soon(10))
    reached = False
    with pytest.raises(TimeoutError):
        with outer:
            with inner:
                await asyncio.sleep(10)
            reached = True
    assert (outer.expired, inner.expired, reached) == (True, False, False)


@pytest.mark.asyncio
async def test_limits_of_one_moment_end_both_bodies(deadlines: Deadlines) -> None:
    when = soon(0.02)
    with pytest.raises(TimeoutError):
        with deadlines.until(when):
            with deadlines.until(when):
                await asyncio.sleep(10)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.asyncio
async def test_same_as_the_timeout_of_asyncio(deadlines: Deadlines) -> None:
    """Whatever is cancelled when: the same outcome, and the same count of cancellations."""

    async def by_limit(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        with deadlines.until(soon(seconds)):
            await work()

    async def by_asyncio(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        async with asyncio.timeout(seconds):
            await work()

    async def swallow() -> None:
        try:
            await asyncio.sleep(0.8)
        except asyncio.CancelledError:
            await asyncio.sleep(0.8)

    async def plain() -> None:
        await asyncio.sleep(0.8)

    async def outcome(
        bound: Callable[[float, Callable[[], Awaitable[None]]], Awaitable[None]],
        seconds: float,
        work: Callable[[], Awaitable[None]],
        cancel: float,
    ) -> tuple[str, int]:
        async def run() -> None:
            await bound(seconds, work)

        task = asyncio.create_task(run())
        asyncio.get_running_loop().call_later(cancel, task.cancel)
        (result,) = await asyncio.gather(task, return_exceptions=True)
        return type(result).__name__, task.cancelling()

    cases = [
        (seconds, work, cancel)
        for seconds in (0.0, 0.4, 5.0)
        for work in (swallow, plain)
        for cancel in (0.2, 0.6, 3.0)
    ]
    ours = asyncio.gather(*(outcome(by_limit, *case) for case in cases))
    theirs = asyncio.gather(*(outcome(by_asyncio, *case) for case in cases))
    assert await ours == await theirs


# -- many -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_many_end_each_at_its_own_moment(deadlines: Deadlines) -> None:
    chance = random.Random(1)
    early: list[float] = []
    late: list[float] = []

    async def work(seconds: float) -> None:
        when = soon(seconds)
        with pytest.raises(TimeoutError):
            with deadlines.until(when):
                await asyncio.sleep(10)
        (early if time.monotonic() < when else late).append(time.monotonic() - when)

    await asyncio.gather(*(work(chance.random() / 2) for _ in range(500)))
    assert not early
    assert sorted(late)[450] < LATE + SLACK
    assert not deadlines.running


@pytest.mark.asyncio
async def test_earlier_one_that_comes_later_is_not_late(deadlines: Deadlines) -> None:
    async def work(seconds: float) -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            with deadlines.until(began + seconds):
                await asyncio.sleep(10)
        return time.monotonic() - began

    slow = asyncio.create_task(work(1.0))
    await asyncio.sleep(0)
    assert 0.02 <= await work(0.02) < 0.8
    assert await slow >= 1.0


@pytest.mark.asyncio
async def test_one_timer_serves_all_and_none_runs_for_nothing(deadlines: Deadlines) -> None:
    loop = asyncio.get_running_loop()
    made = 0
    call_later = loop.call_later

    def counted(*args: object) -> asyncio.TimerHandle:
        nonlocal made
        made += 1
        return call_later(*args)  # type: ignore[arg-type] # as they came

    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setattr(loop, "call_later", counted)
        except AttributeError:
            pytest.skip("this loop's methods cannot be replaced")
        for _ in range(1000):
            with deadlines.until(soon(5)):
                pass
    assert made <= 1


@pytest.mark.asyncio
async def test_nothing_wakes_an_idle_process(deadlines: Deadlines) -> None:
    with pytest.raises(TimeoutError):
        with deadlines.until(soon(0.01)):
            await asyncio.sleep(10)
    await eventually(lambda: deadlines.wake == math.inf)


@pytest.mark.asyncio
async def test_closed_ones_end_nothing(deadlines: Deadlines) -> None:
    with deadlines.until(soon(0.02)) as limit:
        deadlines.close()
        await asyncio.sleep(0.06)
    assert not limit.expired
    deadlines.close()


# -- alarms ---------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_alarm_is_raised_once_at_its_moment(deadlines: Deadlines) -> None:
    raised: list[float] = []
    when = soon(0.03)
    deadlines.add(Alarm(when, lambda: raised.append(time.monotonic())))
    await eventually(lambda: raised)
    await asyncio.sleep(0.05)
    assert len(raised) == 1
    assert raised[0] >= when


@pytest.mark.asyncio
async def test_alarm_that_was_discarded_is_not_raised(deadlines: Deadlines) -> None:
    raised: list[int] = []
    one, other = [Alarm(soon(0.02), lambda n=n: raised.append(n)) for n in range(2)]  # type: ignore[misc] # n is bound
    for alarm in (one, other):
        deadlines.add(alarm)
    deadlines.discard(one)
    await eventually(lambda: raised)
    assert raised == [1]


@pytest.mark.asyncio
async def test_alarm_may_discard_and_add_others(deadlines: Deadlines) -> None:
    """Both are due at once: the one that is discarded by the other is not raised."""
    raised: list[str] = []
    when = soon(0.02)
    alarms: list[Alarm] = []

    def first(name: str) -> None:
        raised.append(name)
        for alarm in alarms:
            deadlines.discard(alarm)
        deadlines.add(Alarm(when + 0.02, lambda: raised.append("added")))

    alarms += [Alarm(when, lambda: first("one")), Alarm(when, lambda: first("other"))]
    for alarm in alarms:
        deadlines.add(alarm)
    await eventually(lambda: "added" in raised)
    assert raised in (["one", "added"], ["other", "added"])


@pytest.mark.asyncio
async def test_alarm_that_fails_stops_no_other(deadlines: Deadlines) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    raised: list[int] = []
    when = soon(0.02)
    for number in range(5):
        deadlines.add(Alarm(when, lambda number=number: raised.append(1 // (number % 2))))  # type: ignore[misc] # bound
    deadlines.add(Alarm(when + 0.03, lambda: raised.append(7)))
    await eventually(lambda: sorted(raised) == [1, 1, 7])
