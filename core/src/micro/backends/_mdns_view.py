"""What a reader of mDNS has heard, what it has yet to ask, and what it has been told."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

from micro.errors import MicroError
from micro.registry import Change, Node, in_order

#: Nobody is thought to answer any more when nothing has come for so long.
_QUIET = 0.1
#: Seconds for which an answer may be older than a goodbye that was read before it.
_JUST_NOW = 0.5
#: A question is repeated after so long, then after twice that, and so on.
_FIRST_PAUSE = 0.25
_LAST_PAUSE = 60.0
#: A node that is not heard of is asked for after this part of its time to live.
_ASK_AT = 0.8
#: One who follows asks for the same service no more than once in so long: less than what is left
#: of the least time to live, 1 s, when a node has to be asked.
_ASK_EVERY = 0.5
#: Who has slept gives a node so long to answer, instead of taking its own silence for the node's.
_GRACE = 0.5
# How many questions are sent before the answers get time to be read.
_BURST = 32
_BURST_PAUSE = 0.005

# What one who listens remembers at most.
_SERVICES = 1024
_NODES = 256
_ALL_NODES = 16 * 1024
_BYTES = 32 * 1024 * 1024


class Heard(NamedTuple):
    """A node, the bytes it came as, and whether only this host can reach it."""

    node: Node
    size: int
    only_here: bool


class _Seen:
    """A node that one who listens knows of."""

    __slots__ = ("ask_at", "heard", "until")

    def __init__(self, heard: Heard, until: float, ask_at: float) -> None:
        self.heard = heard
        self.until = until
        self.ask_at = ask_at


class View:
    """What one reader, of one service or of all (None), has heard since it began to ask.

    All sending is done in the waits of the reader, so a failure of it is raised there.
    """

    def __init__(
        self, service: str | None, ask: Callable[[str | None], None], *, only_names: bool
    ) -> None:
        self.names: dict[str, str] = {}
        self.only_names = only_names
        self._topic = service
        self._service = None if service is None else service.lower()
        self._ask = ask
        self._seen: dict[str, _Seen] = {}
        self._counts: Counter[str] = Counter()
        self._bytes = 0
        self._told: dict[str, Node] = {}
        self._changed: dict[str, None] = {}
        self._left: dict[str, float] = {}
        self._questions: dict[str | None, None] = {}
        self._asked: dict[str, float] = {}
        self._pause = _FIRST_PAUSE
        self._next = self._due = -math.inf
        self._woken = asyncio.Event()
        self._error: MicroError | None = None

    # -- what comes in

    def wants(self, key: str) -> bool:
        return not self.only_names and (self._service is None or key.endswith(f".{self._service}"))

    def take(self, key: str, heard: Heard, *, ttl: float, own: bool = False) -> bool:
        """Know of this node from now on; False when there is no room for it."""
        service = heard.node.service.lower()
        if self._service not in {None, service}:
            return True
        before = self._pop(key)
        if not own and not self._has_room(service, heard.size):
            if before is not None:
                self._note(key)
            return False
        now = time.monotonic()
        ask_at = math.inf if own else now + ttl * _ASK_AT
        self._seen[key] = _Seen(heard, now + ttl, ask_at)
        self._bytes += heard.size
        self._counts[service] += 1
        self._due = min(self._due, ask_at, now + ttl)
        if before is None or before.heard.node != heard.node:
            self._changed[key] = None
        self._woken.set()
        return True

    def forget(self, key: str, *, local: bool = True) -> None:
        """The node is gone; a node of this host only when this host says so."""
        if len(self._left) >= _SERVICES:
            self._left.clear()
        self._left[key] = time.monotonic()
        seen = self._seen.get(key)
        if seen is not None and (local or not seen.heard.only_here):
            self._pop(key)
            self._note(key)

    def has_just_left(self, key: str) -> bool:
        """Whether the node said goodbye a moment ago.

        An answer comes to another socket than a goodbye, so one that was sent before it may be read
        after it. What is announced comes in the order in which it was said.
        """
        return time.monotonic() - self._left.get(key, -math.inf) < _JUST_NOW

    def name(self, service: str) -> bool:
        """A service is listed; False when there is no room for it."""
        if self._service is not None:
            return True
        if not self.only_names:
            return self._want(service)
        key = service.lower()
        if key not in self.names and len(self.names) >= _SERVICES:
            return False
        self.names[key] = min(service, self.names.get(key, service))
        self._woken.set()
        return True

    def ask_soon(self) -> None:
        self._pause = _FIRST_PAUSE
        self._next = self._due = -math.inf
        self._woken.set()

    def end(self, error: MicroError) -> None:
        self._error = error
        self._woken.set()

    # -- what a reader waits for

    async def quiet(self, timeout: float) -> None:
        """Wait for the first answer, then until no more come; ``timeout`` at most."""
        end = time.monotonic() + timeout
        while not self._seen and not self.names and await self._heard(end):
            pass
        while (now := time.monotonic()) < end and await self._heard(min(end, now + _QUIET)):
            pass

    async def answered(self, timeout: float) -> None:
        """Wait for the first node, ``timeout`` at most."""
        end = time.monotonic() + timeout
        while not self._seen and await self._heard(end):
            pass

    def nodes(self) -> tuple[Node, ...]:
        now = time.monotonic()
        return in_order(seen.heard.node for seen in self._seen.values() if seen.until > now)

    def begin(self) -> tuple[Node, ...]:
        """The nodes; from here on, ``changes`` tells what is different."""
        self._told = {key: seen.heard.node for key, seen in self._seen.items()}
        self._changed.clear()
        return in_order(self._told.values())

    async def changes(self) -> list[Change]:
        while not self._changed:
            await self._heard(math.inf)
        keys, self._changed = self._changed, {}
        return [change for key in keys for change in self._difference(key)]

    def _difference(self, key: str) -> Iterator[Change]:
        before = self._told.pop(key, None)
        seen = self._seen.get(key)
        after = seen.heard.node if seen is not None else None
        if after is not None:
            self._told[key] = after
        # Names that differ in case are one for DNS, and two for whoever reads the changes.
        if before and after and (before.service, before.id) == (after.service, after.id):
            if before != after:
                yield Change(kind="update", node=after)
            return
        if before:
            yield Change(kind="delete", node=before)
        if after:
            yield Change(kind="create", node=after)

    async def _heard(self, until: float) -> bool:
        """Wait for something new, and ask what there is to ask; False when ``until`` has come."""
        while True:
            if self._error is not None:
                raise self._error
            now = time.monotonic()
            self._tend(now)
            if self._woken.is_set():
                self._woken.clear()
                return True
            if now >= until:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(min(until, self._due) - now):
                    await self._woken.wait()

    # -- what time brings

    def _tend(self, now: float) -> None:
        if now < self._due:
            return
        for key, seen in tuple(self._seen.items()):
            if seen.ask_at <= now:
                seen.ask_at = math.inf
                seen.until = seen.until if seen.until > now else now + _GRACE
                self._want(seen.heard.node.service)
            elif seen.until <= now:
                self.forget(key)
        if self._next <= now:
            self._questions[self._topic] = None
            self._next = now + self._pause
            self._pause = min(self._pause * 2, _LAST_PAUSE)
        self._send_some(now)
        times = (min(seen.until, seen.ask_at) for seen in self._seen.values())
        self._due = now + _BURST_PAUSE if self._questions else min(times, default=self._next)
        self._due = min(self._due, self._next)

    def _send_some(self, now: float) -> None:
        for service in tuple(islice(self._questions, _BURST)):
            del self._questions[service]
            if service is not None:
                self._asked[service.lower()] = now
            self._ask(service)

    def _want(self, service: str) -> bool:
        """Ask for a service soon, unless that was done just now."""
        now = time.monotonic()
        if now - self._asked.get(service.lower(), -math.inf) < _ASK_EVERY:
            return True
        if len(self._asked) >= _SERVICES:
            self._asked = {key: at for key, at in self._asked.items() if now - at < _ASK_EVERY}
        if len(self._asked) + len(self._questions) >= _SERVICES:
            return False
        self._questions[service] = None
        self._due = now
        self._woken.set()
        return True

    def _note(self, key: str) -> None:
        self._changed[key] = None
        self._woken.set()

    def _has_room(self, service: str, size: int) -> bool:
        count = self._counts[service]
        is_known = count > 0 or len(self._counts) < _SERVICES
        has_place = count < _NODES and len(self._seen) < _ALL_NODES
        return is_known and has_place and self._bytes + size <= _BYTES

    def _pop(self, key: str) -> _Seen | None:
        seen = self._seen.pop(key, None)
        if seen is not None:
            service = seen.heard.node.service.lower()
            self._bytes -= seen.heard.size
            self._counts[service] -= 1
            if not self._counts[service]:
                del self._counts[service]
        return seen
