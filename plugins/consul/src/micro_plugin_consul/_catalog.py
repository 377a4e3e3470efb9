"""Which of all services may have changed: two queries that wait, for however many want to know."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TypeAlias, TypeVar

from micro_plugin_consul._api import Check, Consul
from micro_plugin_consul._entry import Namespace

T = TypeVar("T")

#: Seconds between two answers: each has all checks, and much may happen to others.
_PAUSE = 0.1

#: What differs once a check of an agent does.
_OfAgent: TypeAlias = frozenset[tuple[str, int]]
#: What differs once a check of a service, or of an agent that it is registered at, does.
_Signs: TypeAlias = dict[str, frozenset[tuple[str, str, int, _OfAgent]]]


class Seat:
    """One who is told of changes to a service, or to all; first of what there is."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._names: set[str] = set()
        self._wake = asyncio.Event()
        self._error: BaseException | None = None

    async def changed(self) -> set[str]:
        """The names of services that may have changed since this was last asked.

        Raises:
            Unavailable: no server answers any more. Others are what it answers.
        """
        await self._wake.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)  # it is raised for each who has a seat
        self._wake.clear()
        names, self._names = self._names, set()
        return names

    def begin(self, names: Iterable[str]) -> None:
        """Tell of what there is, though it may be nothing."""
        self._names.update(names if self._name is None else {self._name})
        self._wake.set()

    def tell(self, names: set[str]) -> None:
        mine = names if self._name is None else names & {self._name}
        if mine:
            self._names |= mine
            self._wake.set()

    def end(self, error: BaseException) -> None:
        self._error = error
        self._wake.set()


class Catalog:
    """It asks while somebody has a seat; the answers have all services, and all checks.

    Whatever changes of an entry of ours changes its check. An entry of others may have changed
    whenever any service has.
    """

    def __init__(self, consul: Consul, namespace: Namespace) -> None:
        self._consul = consul
        self._namespace = namespace
        self._asking: _Asking | None = None

    @asynccontextmanager
    async def seat(self, name: str | None) -> AsyncIterator[Seat]:
        """``name`` is that of a service in Consul; None are all of the namespace."""
        asking = self._asking
        if asking is None or asking.over:
            asking = self._asking = _Asking(self._consul, self._namespace)
        seat = asking.add(Seat(name))
        try:
            yield seat
        finally:
            await asking.remove(seat)


class _Asking:
    """From the first seat to the last, or to the first error."""

    def __init__(self, consul: Consul, namespace: Namespace) -> None:
        self.over: bool = False
        self._consul = consul
        self._namespace = namespace
        self._seats: set[Seat] = set()
        self._begun = False
        self._listed: dict[str, tuple[str, ...]] = {}
        self._signs: _Signs = {}
        self._known: set[str] = set()
        self._strange: set[str] = set()
        self._task = asyncio.create_task(self._run(), name="micro.consul catalog")

    def add(self, seat: Seat) -> Seat:
        self._seats.add(seat)
        if self._begun:
            seat.begin(self._ours())
        return seat

    async def remove(self, seat: Seat) -> None:
        self._seats.discard(seat)
        if not self._seats:
            self.over = True
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._follow()
        except BaseExceptionGroup as group:
            self._end(group.exceptions[0])
        except Exception as exc:  # whatever it is, those who follow must be told
            self._end(exc)

    def _end(self, error: BaseException) -> None:
        self.over = True
        for seat in self._seats:
            seat.end(error)

    async def _follow(self) -> None:
        consul, part = self._consul, self._namespace.prefix
        checked, checks = await consul.checks(0, part)
        listed, self._listed = await consul.names(0)
        self._take_checks(checks)
        self._begun = True
        for seat in self._seats:
            seat.begin(self._ours())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_checks(checked, part))
            tasks.create_task(self._follow_names(listed))

    async def _follow_checks(self, index: int, part: str) -> None:
        while True:
            before = index
            index, checks = await self._consul.checks(index, part)
            if index != before:
                self._tell(self._take_checks(checks))
                await asyncio.sleep(_PAUSE)

    async def _follow_names(self, index: int) -> None:
        while True:
            before = index
            index, listed = await self._consul.names(index)
            if index != before:
                changed = _differing(self._listed, listed)
                self._listed = listed
                self._tell(changed | self._foreign())
                await asyncio.sleep(_PAUSE)

    def _take_checks(self, checks: tuple[Check, ...]) -> set[str]:
        """The services of which something is not as it was."""
        signs = _signs(checks)
        changed = _differing(self._signs, signs)
        self._known = {c.service_name for c in checks if _is_ours(c)}
        self._strange = {c.service_name for c in checks if c.service_id and not _is_ours(c)}
        self._signs = signs
        return changed

    def _foreign(self) -> set[str]:
        """The services that are listed, and of which not all is ours, as far as checks tell."""
        return (self._listed.keys() - self._known) | (self._strange & self._listed.keys())

    def _tell(self, names: set[str]) -> None:
        told = {name for name in names if self._namespace.service(name) is not None}
        for seat in self._seats:
            seat.tell(told)

    def _ours(self) -> Iterable[str]:
        return (name for name in self._listed if self._namespace.service(name) is not None)


def _signs(checks: tuple[Check, ...]) -> _Signs:
    of_agents: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for check in checks:
        if not check.service_id:
            of_agents[check.node].add((check.check_id, check.modify_index))
    agents = {node: frozenset(said) for node, said in of_agents.items()}
    found: dict[str, set[tuple[str, str, int, _OfAgent]]] = defaultdict(set)
    for check in checks:
        if check.service_id:
            agent = agents.get(check.node, frozenset())
            found[check.service_name].add((check.node, check.check_id, check.modify_index, agent))
    return {name: frozenset(said) for name, said in found.items()}


def _differing(before: dict[str, T], after: dict[str, T]) -> set[str]:
    names = before.keys() | after.keys()
    return {name for name in names if before.get(name) != after.get(name)}


def _is_ours(check: Check) -> bool:
    return bool(check.notes) and check.service_id.startswith(f"{check.service_name}/")


def alive(checks: tuple[Check, ...]) -> set[str]:
    """The names of services with an instance that has a check, and nothing critical."""
    dead = {(check.node, check.service_id) for check in checks if check.status == "critical"}
    return {
        check.service_name
        for check in checks
        if check.service_id and not dead & {(check.node, ""), (check.node, check.service_id)}
    }
