"""Nodes are replaced, killed and stopped under steady calls: none fails that need not."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from tests.faults.calls import SLACK
from tests.faults.survivors import Fate, Node, Survivors

from micro.errors import DeadlineExceeded, Unavailable
from micro.testing import eventually

#: Seconds in which a node ends that was asked to, and in which a dead one gets no more calls.
DRAINED = 10.0
EJECTED = 1.0
#: Seconds for which a dead node is watched: longer than EJECTED and what a busy machine adds.
WATCHED = 2.0
#: Seconds that calls have while a node is stopped; and without a call, after which it was left: the
#: calls that run on it keep others away only until their time is over.
HASTY = 0.8
LEFT = 2 * HASTY


@pytest.mark.asyncio
@pytest.mark.timeout(180)
async def test_rolling_restart_fails_no_call(survivors: Survivors, full: bool) -> None:
    async with survivors.running():
        async with survivors.traffic():
            for _ in range(3 if full else 1):
                for node in survivors.nodes:
                    await replace(survivors, node)
    survivors.check_none_failed()
    survivors.check_executions()
    survivors.check_times()


@pytest.mark.asyncio
@pytest.mark.timeout(120)
async def test_node_that_is_killed_fails_only_what_may_have_been_executed_on_it(
    survivors: Survivors, full: bool
) -> None:
    deaths: list[Death] = []
    async with survivors.running():
        async with survivors.traffic(idempotent=lambda number: number % 2 == 0):
            for node in survivors.nodes if full else survivors.nodes[:1]:
                deaths.append(await kill(survivors, node))
                await revive(survivors, node)
    for fate in survivors.failed():
        assert not fate.idempotent, f"it could have been repeated: {fate!r}"
        assert isinstance(fate.error, Unavailable), repr(fate)
    assert len(survivors.failed()) == sum(len(death.failed()) for death in deaths)
    survivors.check_executions()
    survivors.check_times()


@pytest.mark.asyncio
@pytest.mark.timeout(120)
async def test_node_that_is_stopped_is_left_and_found_again(
    survivors: Survivors, full: bool
) -> None:
    async with survivors.running():
        async with survivors.traffic(timeout=HASTY):
            for node in survivors.nodes if full else survivors.nodes[:1]:
                await pause(survivors, node)
    assert survivors.failed(), "the node was not stopped"
    survivors.check_executions()
    survivors.check_times()


async def replace(survivors: Survivors, node: Node) -> None:
    """As a rollout does: end it, and start another in its place."""
    node.signal(signal.SIGTERM)
    assert await node.ended(within=DRAINED + SLACK) == 0
    await revive(survivors, node)


async def revive(survivors: Survivors, node: Node) -> None:
    node.start()
    await answers(survivors, node, within=20)


async def answers(survivors: Survivors, node: Node, within: float) -> None:
    """Wait until it answers calls that are made from now on."""
    first = len(survivors.fates)

    def answered() -> bool:
        return any(fate.first == node.name and fate.ok for fate in survivors.fates[first:])

    await eventually(answered, within=within, every=0.05)


class Death:
    """A node that was killed, and the calls that were, or went, to it."""

    def __init__(self, survivors: Survivors, node: Node) -> None:
        self.at = time.monotonic()
        self._survivors = survivors
        self._node = node
        self._in_flight = [fate for fate in survivors.fates if self._was_there(fate)]
        self._first = len(survivors.fates)
        self._last = 0

    def over(self) -> None:
        """What comes now does not suffer from it."""
        self._last = len(self._survivors.fates)

    def failed(self) -> list[Fate]:
        """Those that failed of it: not more than were in flight, or came before it was noticed."""
        sent = self._survivors.fates[self._first : self._last]
        exposed = [*self._in_flight, *(fate for fate in sent if fate.first == self._node.name)]
        assert len(self._in_flight) > 3, "too little traffic on the node that was killed"
        return [fate for fate in exposed if fate.error is not None]

    def _was_there(self, fate: Fate) -> bool:
        return not fate.ended and fate.first == self._node.name


async def kill(survivors: Survivors, node: Node) -> Death:
    death = Death(survivors, node)
    node.signal(signal.SIGKILL)
    await node.ended(within=SLACK)
    await asyncio.sleep(WATCHED)
    took = survivors.last_chosen(node.name) - death.at
    assert took < EJECTED, f"it got calls for {took:.2f} s"
    death.over()
    return death


async def pause(survivors: Survivors, node: Node) -> None:
    failed = len(survivors.failed())
    node.signal(signal.SIGSTOP)
    stopped = time.monotonic()

    def is_left() -> bool:
        return time.monotonic() - max(survivors.last_chosen(node.name), stopped) > LEFT

    await eventually(is_left, within=HASTY + EJECTED + LEFT + SLACK, every=0.05)
    left = survivors.last_chosen(node.name)
    node.signal(signal.SIGCONT)
    await answers(survivors, node, within=10)
    await survivors.ended(since=left)
    for fate in survivors.failed()[failed:]:
        assert isinstance(fate.error, DeadlineExceeded), repr(fate)
        assert fate.first == node.name, f"of another node: {fate!r}"
        assert fate.began <= left, f"after it was left: {fate!r}"
