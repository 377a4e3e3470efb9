"""A fleet that works on while its registry fails, and what must hold of it all the time."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from tests.faults.backends import SLACK, Backend
from tests.faults.faults import Fault, Where
from tests.faults.nodes import Helloworld, Member, Process
from tests.faults.observers import Callers, Follower, Journal, Key, Observed, by_key

import micro
from micro.backend import Connections
from micro.client import Client
from micro.errors import ServiceNotFound, Unavailable
from micro.registry import Node, Registry
from micro.testing import FaultProxy, Server, eventually, serving

#: Seconds after an outage in which all has to be right again.
RETURN = 5.0
#: The least calls a second, before an outage and in it: with fewer, that none failed says nothing.
RATE = 100


class Fleet:
    """A server; three nodes of helloworld on it, two of them processes; callers; watches; a guest.

    The nodes and the callers each have a link of their own to the server, a fault proxy.
    ``through`` is one outage: one guest leaves in it and another comes, and all is checked. A
    failure has a note that says what happened. Nodes live for the backend's ``ttl``, guests for its
    ``guest_ttl``: so long one that stops in an outage is there after it.
    """

    def __init__(
        self,
        backend: Backend,
        server: Server,
        folder: Path,
        seed: int,
        observed: Callable[[Registry, Journal], Observed],
    ) -> None:
        self.journal = Journal(f"repeat it by: --seed {seed}")
        self.backend = backend
        self.server = server
        self.processes: list[Process] = []
        #: What came of it, once all has held to the end.
        self.figures = ""
        self._outages = 0
        self._slowest = 0.0
        self._folder = folder
        self._seed = seed
        self._observed = observed
        self._stack = AsyncExitStack()
        self._links: dict[Where, FaultProxy] = {}
        self._members: list[Member] = []
        self._guests: list[Member] = []
        self._expected: set[Key] = set()
        self._client: Client
        self._callers: Callers
        self._followers: list[Follower] = []

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException as exc:
            await self._end(exc)
            raise
        return self

    async def __aexit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        await self._end(exc)

    async def _start(self) -> None:
        logging.getLogger().addHandler(self.journal)
        self._stack.callback(logging.getLogger().removeHandler, self.journal)
        self._stack.callback(self.server.kill)
        await asyncio.to_thread(self.server.start)
        for where in ("nodes", "callers"):
            link = FaultProxy(self.server.address, seed=self._seed)
            self._links[where] = await self._stack.enter_async_context(link)
        await self._start_nodes()
        await eventually(self._are_registered, within=20)
        await self._start_callers()

    async def _start_nodes(self) -> None:
        self._stack.push_async_callback(self._stop_nodes)
        for number in (1, 2):
            process = Process.start(
                f"node-{number}",
                self._folder,
                registry=self.backend.url(self._links["nodes"].address),
                ttl=self.backend.ttl,
            )
            self.processes.append(process)
        self._members.append(Member(self._service("helloworld", "node-3", self.backend.ttl)))
        self._expected = {("helloworld", f"node-{number}") for number in (1, 2, 3)}
        self._change_guests()

    async def _stop_nodes(self) -> None:
        members = [*self._members, *self._guests]
        for member in members:
            member.leave()
        await asyncio.gather(
            *(member.left() for member in members),
            *(asyncio.to_thread(process.stop) for process in self.processes),
        )

    async def _start_callers(self) -> None:
        registry = self._registry("callers")
        app = micro.Service("app", registry=registry, register_ttl=self.backend.ttl)
        self._client = await self._stack.enter_async_context(serving(app, {}))
        for service in (None, "helloworld", "guest"):
            watch = await self._stack.enter_async_context(self._client.watch(service))
            lasting = service == "helloworld"
            follower = Follower(service, watch, self.journal, lasting=lasting)
            self._followers.append(follower)
            self._keep_running(follower.run())
        self._callers = Callers(self._client, self.journal)
        self._keep_running(self._callers.run())
        self._keep_running(self._look_on())

    def _registry(self, where: Where) -> Observed:
        return self._observed(self.backend.registry(self._links[where].address), self.journal)

    def _service(self, name: str, id: str, ttl: float) -> micro.Service:
        registry = self._registry("nodes")
        service = micro.Service(name, id=id, registry=registry, register_ttl=ttl)
        service.handle(Helloworld())
        return service

    def _keep_running(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

        self._stack.push_async_callback(end)

    async def _look_on(self) -> None:
        while True:
            for follower in self._followers:
                follower.look()
            await asyncio.sleep(0.005)

    async def through(self, *faults: Fault) -> None:
        """All of these at once, while one guest leaves and another comes.

        Where a busy machine lets through too few calls to tell, it is done again, twice at most.

        Raises:
            AssertionError: a call failed, a watch was empty, or not all was right again in time
                after the last fault was over; or there were too few calls each time.
        """
        text = ""
        for _ in range(3):
            before = await self._calls_a_second(asyncio.sleep(0.5))
            during = await self._calls_a_second(self._befall(faults))
            await self._right_again(time.monotonic())
            text = f"{before:.0f} calls a second before the faults, {during:.0f} in them"
            self.journal.note(text)
            if min(before, during) >= RATE:
                return
        raise AssertionError(f"too little traffic: {text}")

    async def _befall(self, faults: Iterable[Fault]) -> None:
        self._check()
        self._outages += 1
        self.journal.note(f"outage {self._outages}: {'; '.join(map(str, faults)) or 'none'}")
        self._change_guests()
        await asyncio.gather(*(fault.befall(self.server, self._links) for fault in faults))
        self.journal.note("over")

    async def _calls_a_second(self, work: Awaitable[None]) -> float:
        began, before = time.monotonic(), self._callers.done
        await work
        return (self._callers.done - before) / (time.monotonic() - began)

    async def _right_again(self, over: float) -> None:
        while wrong := await self._wrong():
            took = time.monotonic() - over
            assert took < RETURN + SLACK, f"not right {took:.2f} s after its end: {wrong}"
            await asyncio.sleep(0.05)
        took = time.monotonic() - over
        self.journal.note(f"right again after {took:.2f} s")
        self._slowest = max(took, self._slowest)
        await self._client.call("guest", "Helloworld.Call", {"name": "Bob"})
        self._check()

    def _check(self) -> None:
        self.journal.check()
        for process in self.processes:
            process.check()

    async def _wrong(self) -> str:
        """What is not as it should be after an outage; empty if all is."""
        try:
            there = by_key(await self._nodes())
        except Unavailable as exc:
            return repr(exc)
        if (ours := _ours(there)) != self._expected:
            return f"registered are {sorted(ours)}, not {sorted(self._expected)}"
        return next((text for one in self._followers for text in one.differs(there)), "")

    async def _are_registered(self) -> bool:
        return _ours(by_key(await self._nodes())) == self._expected

    async def _nodes(self) -> list[Node]:
        """All that there is, by a registry that was not there before, and past the links."""
        connections = Connections()
        registry = self.backend.registry(self.server.address)
        try:
            await registry.connect(connections)
            there = [await registry.get(service) for service in await registry.services()]
            return [node for nodes in there for node in nodes]
        except ServiceNotFound:  # it went in between
            return []
        finally:
            await registry.aclose()
            await connections.aclose()

    def _change_guests(self) -> None:
        for guest in self._guests:
            guest.leave()
        key = ("guest", f"guest-{len(self._guests) + 1}")
        self._guests.append(Member(self._service(*key, self.backend.guest_ttl)))
        self._expected = {key, *(other for other in self._expected if other[0] != "guest")}

    async def _end(self, exc: BaseException | None) -> None:
        try:
            await self._stack.aclose()
            gc.collect()  # what nobody has awaited says so now
            self.journal.check()
        except Exception as late:  # what came first tells more, and must not be hidden by it
            if exc is None:
                late.add_note(self._report())
                raise
            self.journal.note(f"then: {late!r}")
        if exc is not None:
            exc.add_note(self._report())
        elif self._outages:
            name = self.backend.scheme
            done = f"{name}: {self._outages:3} outages, {self._callers.done:6} calls, 0 failed"
            self.figures = f"{done}, right again within {self._slowest:.2f} s"

    def _report(self) -> str:
        logs = [process.log.read_text() for process in self.processes]
        return "\n\n".join([self.journal.text, *(link.log for link in self._links.values()), *logs])


def _ours(there: Iterable[Key]) -> set[Key]:
    """Without those of others: Consul, too, is a node of its own."""
    return {key for key in there if key[0] in ("helloworld", "guest")}
