"""Those who see what a fault does: callers, followers of the registry, and their journal."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from micro.client import Client
from micro.errors import MicroError, Unavailable
from micro.follow import Watch
from micro.registry import Change, Node, Snapshot
from micro.url import URL
from micro_plugin_etcd import EtcdRegistry

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
    """One watch, and the fold of all that it tells."""

    def __init__(self, service: str | None, watch: Watch, journal: Journal) -> None:
        self._service = service
        self._name = f"the watch of {service or 'all'}"
        self._watch = watch
        self._journal = journal
        self._folded = by_key(watch.nodes)

    async def run(self) -> None:
        async for change in self._watch:
            key = (change.node.service, change.node.id)
            self._journal.note(f"{self._name}: {change.kind} {key[1]}")
            if (key in self._folded) == (change.kind == "create"):
                self._journal.blame(f"{change.kind} of {key}, after {[*self._folded]} were told")
            self._folded[key] = change.node
            if change.kind == "delete":
                del self._folded[key]
            self.look()
        self._journal.blame(f"{self._name} ended")

    def look(self) -> None:
        """helloworld always has nodes, whatever becomes of etcd; guests come and go."""
        if self._service == "helloworld" and not self._watch.nodes:
            self._journal.blame(f"{self._name} is empty")

    def differs(self, there: dict[Key, Node]) -> str:
        """How the watch differs from what is there; empty if it is live and right."""
        there = {key: node for key, node in there.items() if self._service in (None, key[0])}
        if self._watch.state != "live":
            return f"{self._name} is stale: {self._watch.error!r}"
        for what, nodes in (("has", by_key(self._watch.nodes)), ("has told", self._folded)):
            if nodes.keys() != there.keys():
                return f"{self._name} {what} {sorted(nodes)}, etcd has {sorted(there)}"
            if nodes != there:
                return f"{self._name} {what} {nodes}, etcd has {there}"
        return ""


class WatchedRegistry(EtcdRegistry):
    """The registry that is tested. How each attempt at following begins and ends is noted."""

    def __init__(self, url: URL, journal: Journal) -> None:
        super().__init__(url)
        self._journal = journal

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        what, begun = f"follow {service or 'all'} from {mark}", False
        try:
            async with aclosing(super().follow(service, mark)) as items:
                async for at, item in items:
                    if not begun:
                        ids = [node.id for node in item.nodes] if isinstance(item, Snapshot) else ""
                        self._journal.note(f"{what}: {at} {ids}")
                    begun = True
                    yield at, item
        except MicroError as exc:
            if begun or not isinstance(exc, Unavailable):  # else it says the same many times
                self._journal.note(f"{what}: {exc!r}")
            raise
