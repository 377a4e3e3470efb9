"""Many nodes that come, change and go while their registry fails, and those who watch them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tests.faults.faults import Fault, Where
from tests.faults.observers import Follower, Journal, Key, by_key

from micro.errors import Unavailable
from micro.follow import View
from micro.registration import Registration
from micro.registry import Node, Registry

#: The services that the nodes are of, and those of them that are watched; None is all.
SERVICES = tuple(f"service-{number}" for number in range(8))
WATCHED = (None, *SERVICES[:3])
#: Seconds between two looks at whether all is right, and that a slow reader takes for a change.
_LOOK = 0.1
_SLOW = 0.02


class World(Protocol):
    """A server of a registry, and the links of its clients."""

    def registry(self, where: Where) -> Registry:
        """A client's, connected; one of ``server`` has a link without faults."""
        ...

    async def nodes(self) -> list[Node]:
        """All that there is, by a way of its own."""
        ...

    async def befall(self, fault: Fault) -> None:
        """It is over when this returns."""
        ...


@dataclass(frozen=True)
class Bounds:
    """Seconds: until watches and reads agree; until who lives is registered; until a watch that
    hears nothing knows; and what a busy machine may add to each.
    """

    agree: float = 2.0
    back: float = 5.0
    silence: float = 4.0
    slack: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What happens; all that is chance in it follows from ``seed``.

    Each outage is some faults at once, after ``calm`` seconds. ``rate`` nodes come, change or go in
    a second, also in outages. ``ttl`` is their time to live.
    """

    seed: int
    nodes: int
    rate: float
    ttl: float
    calm: float
    outages: tuple[tuple[Fault, ...], ...]

    def __str__(self) -> str:
        outages = "".join(f"\n  {'; '.join(map(str, faults))}" for faults in self.outages)
        return (
            f"seed {self.seed}: {self.nodes} nodes with a time to live of {self.ttl:g} s, "
            f"{self.rate:g} changes a second, {self.calm:.2f} s of calm before each of{outages}"
        )

    def smaller(self) -> Iterator[Plan]:
        """Plans with less in them, those with the least first."""
        if self.outages:
            yield replace(self, outages=())
        for outage in self.outages if len(self.outages) > 1 else ():
            yield replace(self, outages=(outage,))
        for at, outage in enumerate(self.outages):
            if len(self.outages) > 2:
                yield replace(self, outages=(*self.outages[:at], *self.outages[at + 1 :]))
            for fault in outage if len(outage) > 1 else ():
                less = tuple(other for other in outage if other is not fault)
                yield replace(self, outages=(*self.outages[:at], less, *self.outages[at + 1 :]))
        if self.rate:
            yield replace(self, rate=0.0)
        if self.nodes > 2 * len(SERVICES):
            yield replace(self, nodes=self.nodes // 2)


class Resident:
    """A node that is kept registered; started anew while its registry cannot be reached."""

    def __init__(self, registry: Registry, node: Node, ttl: float) -> None:
        self.node = node
        self.registry = registry
        self._registration = Registration(registry, node, ttl, ttl / 3)
        self._task = asyncio.create_task(self._start())

    async def leave(self) -> None:
        await self._end_start()
        await self._registration.stop()

    async def die(self) -> None:
        """Be gone, and tell nobody."""
        await self._end_start()
        self._registration.registered = False
        await self._registration.stop()

    async def _start(self) -> None:
        while True:
            with suppress(Unavailable):
                return await self._registration.start()
            await asyncio.sleep(0.2)

    async def _end_start(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()


class Churn:
    """Runs a plan in a world, and checks all the time what must hold.

    The first node of each service stays, on a link without faults: a service that is watched is
    never empty. ``run`` raises AssertionError as soon as something does not hold.
    """

    def __init__(self, world: World, plan: Plan, bounds: Bounds, journal: Journal) -> None:
        self.changes = 0
        self.slowest = 0.0
        self._world = world
        self._plan = plan
        self._bounds = bounds
        self._journal = journal
        self._chance = random.Random(plan.seed)
        self._made = 0
        self._residents: dict[Key, Resident] = {}
        self._ever: set[Key] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._views: list[View] = []
        self._followers: list[Follower] = []
        self._reading: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        self._journal.note(str(self._plan))
        try:
            for number in range(self._plan.nodes):
                self._join(SERVICES[number % len(SERVICES)])
            await self._right_again("the start", back=self._bounds.back)
            await self._watch()
            for faults in self._plan.outages:
                await self._through(faults)
            await self._forgets()
        finally:
            await self._end()

    # -- those who come and go

    def _join(self, service: str) -> None:
        self._made += 1
        stays = self._made <= len(SERVICES)
        where: Where = "nodes" if self._chance.random() < 0.7 and not stays else "server"
        id_ = f"{'stays' if stays else 'node'}-{self._made}"
        self._start((service, id_), self._world.registry(where))

    def _start(self, key: Key, registry: Registry) -> None:
        service, id_ = key
        address = f"127.0.0.1:{self._made + 1024}"
        node = Node(service=service, id=id_, address=address, metadata={"made": str(self._made)})
        self._residents[key] = Resident(registry, node, self._plan.ttl)
        self._ever.add(key)

    def _change(self) -> None:
        """One leaves, dies or comes back as another, and in its place comes one."""
        self.changes += 1
        service = self._chance.choice(SERVICES)
        mortal = [key for key in self._residents if key[0] == service and "node" in key[1]]
        if len(mortal) > 1:
            key = self._chance.choice(mortal)
            resident = self._residents.pop(key)
            how = self._chance.choice(["leaves", "dies", "is replaced"])
            self._journal.note(f"{key[1]} {how}")
            if how == "is replaced":
                self._spawn(self._replace(key, resident))
                return
            self._spawn(resident.leave() if how == "leaves" else resident.die())
        self._join(service)

    async def _replace(self, key: Key, resident: Resident) -> None:
        """By the same client: what knows a node by asking its client would find it twice."""
        await resident.die()
        self._made += 1
        self._start(key, resident.registry)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            self._journal.blame(f"a node ended badly: {exc!r}")

    async def _go_on(self) -> None:
        while self._plan.rate:
            await asyncio.sleep(self._chance.expovariate(self._plan.rate))
            self._change()

    async def _beside(self, work: Awaitable[object]) -> None:
        """Do ``work`` while nodes come and go."""
        churn = asyncio.create_task(self._go_on())
        try:
            await work
        finally:
            churn.cancel()
            await asyncio.wait([churn])
        if not churn.cancelled():
            churn.result()

    # -- those who watch

    async def _watch(self) -> None:
        for service in WATCHED:
            view = View(self._world.registry("callers"), service, ttl=self._plan.ttl)
            self._views.append(view)
            for slow in (0.0, _SLOW) if service == SERVICES[0] else (0.0,):
                watch = await view.watch().__aenter__()
                follower = Follower(service, watch, self._journal, slow=slow)
                self._followers.append(follower)
                self._reading.append(asyncio.create_task(follower.run()))

    # -- what must hold

    async def _through(self, faults: tuple[Fault, ...]) -> None:
        await self._beside(asyncio.sleep(self._plan.calm))
        await self._right_again("the calm")
        self._journal.note(f"outage: {'; '.join(map(str, faults))}")
        befalls = (self._befall(fault) for fault in faults)
        await self._beside(asyncio.gather(*befalls))
        interval = self._plan.ttl / 3 * 1.1
        unnoticed = any(
            fault.kind == "go back" or (fault.kind == "lose data" and fault.seconds < interval)
            for fault in faults
        )
        back = self._bounds.back + (interval if unnoticed else 0.0)
        await self._right_again("the outage", back=back)
        self._journal.check()

    async def _befall(self, fault: Fault) -> None:
        task = asyncio.create_task(self._world.befall(fault))
        try:
            if self._hides(fault):
                await asyncio.sleep(self._bounds.silence + self._bounds.slack + _LOOK)
                if not task.done():
                    self._check_stale()
            await task
        finally:
            task.cancel()

    def _hides(self, fault: Fault) -> bool:
        """Whether watches have to know of it: so long do they hear nothing."""
        hidden = fault.kind in ("kill", "lose data", "pause", "refuse", "blackhole")
        long = fault.seconds > self._bounds.silence + self._bounds.slack + _LOOK
        return hidden and long and fault.where != "nodes"

    def _check_stale(self) -> None:
        for follower in self._followers:
            if follower.watch.state != "stale":
                self._journal.blame(f"{follower.name} is live, with nobody to hear from")

    async def _right_again(self, what: str, back: float = 0.0) -> None:
        """Watches say what reads say, and soon all who live are there."""
        over = time.monotonic()
        back = back or self._bounds.back + self._plan.ttl
        await self._agree(over, what)
        await self._until(self._absent, over, back, f"after {what}")
        await self._agree(over, what)

    async def _agree(self, over: float, what: str) -> None:
        """Wait until nothing differs. While nodes come back there may always be something: no
        difference may be there for long.
        """
        known: dict[str, float] = {}
        seen = time.monotonic()  # not when it was over: who comes back later differs since then
        while found := await self._differences(over):
            self._journal.check()
            known = {text: known.get(text, seen) for text in found}
            seen = time.monotonic()
            text, since = min(known.items(), key=lambda item: item[1])
            self.slowest = max(self.slowest, seen - since)
            assert seen - since <= self._bounds.agree + self._bounds.slack, (
                f"{seen - over:.2f} s after {what}, for {seen - since:.2f} s: {text}"
            )
            await asyncio.sleep(_LOOK)

    async def _differences(self, over: float) -> list[str]:
        try:
            there = by_key(await self._world.nodes())
        except Unavailable as exc:
            return [f"reads fail: {type(exc).__name__}"]
        doubted = time.monotonic() - over < self._plan.ttl + self._bounds.agree
        return [
            text
            for follower in self._followers
            # That there are none is not believed at once.
            if not doubted or any(follower.service in (None, key[0]) for key in there)
            for text in follower.differs(there)
        ]

    async def _until(
        self, wrong: Callable[[], Awaitable[str]], since: float, within: float, when: str
    ) -> None:
        while text := await wrong():
            self._journal.check()
            took = time.monotonic() - since
            assert took <= within + self._bounds.slack, f"{took:.2f} s {when}: {text}"
            await asyncio.sleep(_LOOK)

    async def _absent(self) -> str:
        """Who lives and is not registered as it is; or the other way round, in part."""
        if self._ending:
            return f"{len(self._ending)} are still leaving"
        there = await self._there()
        if unknown := there.keys() - self._ever:
            return f"nobody ever was {sorted(unknown)}"
        for key, resident in self._residents.items():
            if there.get(key) != resident.node:
                return f"{key[1]} is registered as {there.get(key)}"
        return ""

    async def _there(self) -> dict[Key, Node]:
        """Our nodes; Consul, too, is a node of its own."""
        nodes = by_key(await self._world.nodes())
        return {key: node for key, node in nodes.items() if key[0] in SERVICES}

    async def _forgets(self) -> None:
        """In the end exactly those are left who live."""
        within = 2 * self._plan.ttl + self._bounds.agree

        async def ghosts() -> str:
            gone = (await self._there()).keys() - self._residents.keys()
            return f"still there are {sorted(gone)[:3]}" if gone else ""

        await self._until(ghosts, time.monotonic(), within, "after all")
        await self._right_again("all was over")
        self._journal.check()

    async def _end(self) -> None:
        for view in self._views:
            await view.aclose()
        for task in self._reading:
            task.cancel()
        if self._reading or self._ending:
            await asyncio.wait([*self._reading, *self._ending])
        await asyncio.gather(*(resident.die() for resident in self._residents.values()))
