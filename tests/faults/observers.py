"""Those who see what a fault does: callers, followers of the registry, and their journal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import ClassVar

from micro.backend import Connections
from micro.client import Client
from micro.errors import MicroError, Unavailable
from micro.follow import Watch
from micro.registry import Change, Node, Registry, RegistryFeatures, Snapshot

#: 250 calls a second; so many callers that there are enough where a busy machine is slow to answer.
CALLERS = 25
EVERY = 0.1

Key = tuple[str, str]


def by_key(nodes: Iterable[Node]) -> dict[Key, Node]:
    return {(node.service, node.id): node for node in nodes}


class Journal(logging.Handler):
    """What happens, and what of it is wrong. To log at the level ERROR is wrong: nothing here has
    a reason, and asyncio tells so of tasks whose errors nobody has retrieved.
    """

    def __init__(self, title: str) -> None:
        super().__init__(logging.ERROR)
        self._lines = [title]
        self._wrong: list[str] = []
        self._began = time.monotonic()

    @property
    def text(self) -> str:
        """A line each, with the seconds since the beginning and ``time.monotonic()``."""
        return "\n".join(self._lines)

    @property
    def times(self) -> list[str]:
        """The lines without the time since the beginning, which simulated time does not move."""
        return [line.partition("(")[2] for line in self._lines]

    def note(self, text: str) -> None:
        now = time.monotonic()
        self._lines.append(f"{now - self._began:7.3f} ({now:.3f}) {text}")

    def blame(self, text: str) -> None:
        self._wrong.append(text)
        if len(self._wrong) < 20:  # the rest says the same
            self.note(f"WRONG: {text}")

    def emit(self, record: logging.LogRecord) -> None:
        self.blame(f"logged: {self.format(record)}")

    def check(self) -> None:
        assert not self._wrong, f"{len(self._wrong)} wrong, the first: {self._wrong[0]}"


class Callers:
    """Some that call helloworld all the time. ``done`` counts answers; a failure is wrong."""

    def __init__(self, client: Client, journal: Journal) -> None:
        self.done = 0
        self._client = client
        self._journal = journal

    async def run(self) -> None:
        await asyncio.gather(*(self._call_on(f"caller {number}") for number in range(CALLERS)))

    async def _call_on(self, name: str) -> None:
        expected = {"message": f"Hello {name}"}
        while True:
            due = time.monotonic() + EVERY
            try:
                reply = await self._client.call("helloworld", "Helloworld.Call", {"name": name})
            except Exception as exc:  # whatever it is, a call between living nodes has failed
                self._journal.blame(f"a call failed: {exc!r}")
            else:
                self.done += 1
                if reply != expected:
                    self._journal.blame(f"{name} got {reply}")
            await asyncio.sleep(due - time.monotonic())


class Follower:
    """One watch, and the fold of all that it tells.

    With ``lasting`` there are always nodes, whatever becomes of the registry. A ``slow`` one waits
    for so many seconds after each change.
    """

    def __init__(
        self,
        service: str | None,
        watch: Watch,
        journal: Journal,
        *,
        lasting: bool = True,
        slow: float = 0.0,
    ) -> None:
        self.service = service
        self.name = f"the {'slow ' if slow else ''}watch of {service or 'all'}"
        self.watch = watch
        self._journal = journal
        self._lasting = lasting
        self._slow = slow
        self._folded = by_key(watch.nodes)

    async def run(self) -> None:
        async for change in self.watch:
            self._journal.note(f"{self.name}: {change.kind} {change.node.id}")
            self.take(change)
            self.look()
            if self._slow:
                await asyncio.sleep(self._slow)
        self._journal.blame(f"{self.name} ended")

    def take(self, change: Change) -> None:
        key = (change.node.service, change.node.id)
        if (key in self._folded) == (change.kind == "create"):
            self._journal.blame(f"{self.name} told {change.kind} of {key} after {[*self._folded]}")
        self._folded[key] = change.node
        if change.kind == "delete":
            del self._folded[key]

    def look(self) -> None:
        if self._lasting and not self.watch.nodes:
            self._journal.blame(f"{self.name} is empty")

    def differs(self, there: dict[Key, Node]) -> list[str]:
        """How the watch differs from what is there; empty if it is live and right."""
        there = {key: node for key, node in there.items() if self.service in (None, key[0])}
        if self.watch.state != "live":
            return [f"{self.name} is stale"]
        return [
            f"{self.name} {what} {nodes.get(key)}, the registry has {there.get(key)}"
            for what, nodes in (("has", by_key(self.watch.nodes)), ("has told", self._folded))
            if nodes != there
            for key in sorted(nodes.keys() | there.keys())
            if nodes.get(key) != there.get(key)
        ]


class Observed(Registry):
    """The registry that is tested. How each attempt at following begins and ends is noted."""

    schemes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, inside: Registry, journal: Journal) -> None:
        super().__init__(inside.url)
        self.features: RegistryFeatures = inside.features
        self._inside = inside
        self._journal = journal

    async def connect(self, connections: Connections) -> None:
        await self._inside.connect(connections)
        self.features = self._inside.features

    async def aclose(self) -> None:
        await self._inside.aclose()

    async def register(self, node: Node, *, ttl: float) -> None:
        await self._inside.register(node, ttl=ttl)

    async def deregister(self, node: Node) -> None:
        await self._inside.deregister(node)

    async def get(self, service: str) -> tuple[Node, ...]:
        return await self._inside.get(service)

    async def services(self) -> tuple[str, ...]:
        return await self._inside.services()

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        what, begun = f"follow {service or 'all'} from {str(mark)[:200]}", False
        try:
            async with aclosing(self._inside.follow(service, mark)) as items:
                async for at, item in items:
                    if not begun:
                        shown = ""
                        if isinstance(item, Snapshot):
                            ids = [node.id for node in item.nodes]
                            shown = str(ids if len(ids) < 10 else f"{len(ids)} nodes")
                        self._journal.note(f"{what}: {str(at)[:200]} {shown}")
                    begun = True
                    yield at, item
        except MicroError as exc:
            if begun or not isinstance(exc, Unavailable):  # else it says the same many times
                self._journal.note(f"{what}: {exc!r}")
            raise
