"""Keeps a program that is none of ours registered, for as long as it is well."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec

from micro.cli._probe import Ill, Probe
from micro.errors import (
    ConfigError,
    InvalidArgument,
    MicroError,
    PermissionDenied,
    TooLarge,
    Unauthenticated,
    Unsupported,
)
from micro.registration import Registration
from micro.registry import Node, Registry

#: What is told of a node, and what it means.
EVENTS = {
    "registered": "it is registered; again, where it says why",
    "waiting": "it is not registered yet, as the check fails",
    "deregistered": "it was taken out of the registry",
    "outage": "the registry cannot be told, and is tried on and on",
    "orphaned": "it goes, and the registry cannot be told: it forgets the node after the ttl",
}
#: Seconds between two questions while the program starts.
_STARTING = 0.25
#: Seconds that registering may take, and between two attempts.
_REGISTERING = 10.0
_AGAIN = 1.0
#: What no waiting mends, unless the node has been registered before.
_FINAL = (
    ConfigError,
    InvalidArgument,
    Unsupported,
    TooLarge,
    PermissionDenied,
    Unauthenticated,
)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often a program is asked, in seconds, and what its answers come to.

    ``rise`` answers in a row make a program that was ill well, ``fall`` one that was well ill.
    """

    interval: float
    timeout: float
    rise: int
    fall: int


class Health:
    """Whether a program is well, by what it answers.

    Until it has been well for the first time it is asked more often, and one answer is enough.
    """

    def __init__(self, probe: Probe | None, pace: Pace) -> None:
        self._probe = probe
        self._pace = pace
        self._against = 0
        self._starts = True
        #: Why the program is ill; "" if it is well, None before its first answer.
        self.why: str | None = None if probe else ""
        #: Set when that changes.
        self.changed: asyncio.Event = asyncio.Event()

    async def run(self) -> None:
        """Ask on and on, never twice at once. Without a probe the program is well."""
        clock = asyncio.get_running_loop().time
        while self._probe is not None:
            began = clock()
            self.count(await self._asked(self._probe))
            pause = min(self._pace.interval, _STARTING if self._starts else math.inf)
            await asyncio.sleep(max(0.0, began + pause - clock()))
        await asyncio.Event().wait()

    async def _asked(self, probe: Probe) -> str:
        try:
            async with asyncio.timeout(self._pace.timeout):
                await probe()
        except TimeoutError:
            return f"no answer in {self._pace.timeout:g} s"
        except Ill as exc:
            return str(exc)
        except OSError as exc:
            return _told(exc)
        return ""

    def count(self, why: str) -> None:
        """One answer: why the program is ill, "" if it is well."""
        if self.why is not None and bool(why) == bool(self.why):
            self._against = 0
            return
        self._against += 1
        needed = self._pace.fall if why else self._pace.rise
        if self._starts or self._against >= needed:
            self.why, self._against = why, 0
            self.changed.set()
        self._starts = self._starts and bool(why)


def _told(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nobody listens there"
    return error.strerror or str(error) or type(error).__name__


class Upkeep:
    """Has a node registered while its program is well, whatever becomes of the registry.

    ``connect`` gives the registry; ``tell`` hears what happens to the node, a word of EVENTS, and
    why.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Registry]],
        node: Node,
        health: Health,
        tell: Callable[[str, str], None],
        *,
        ttl: float,
        interval: float,
    ) -> None:
        self._connect = connect
        self._node = node
        self._health = health
        self._tell = tell
        self._ttl = ttl
        self._interval = interval
        self._registration: Registration | None = None
        self._is_in = False
        self._was_in = False
        self._is_told_ill = False
        self._is_away = False
        #: Seconds that it takes until all others know of a change.
        self.converge: float = 0.0

    @property
    def is_in(self) -> bool:
        """Whether the node is registered, as far as is known."""
        return self._is_in

    async def run(self) -> None:
        """Go on until it is cancelled; ``leave`` is then to be called.

        Raises:
            MicroError: the node cannot be registered, and no waiting helps.
        """
        registry = await self._connected()
        self.converge = registry.features.converge
        self._registration = Registration(
            registry, self._node, self._ttl, self._interval, tell=self._note
        )
        while True:
            self._health.changed.clear()
            pause = await self._settle(self._registration)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._health.changed.wait()

    async def leave(self, why: str) -> None:
        """Take the node out of the registry, where it may be in it; bounded."""
        registration = self._registration
        if registration is None:
            return
        before = registration.left
        await registration.stop()
        if self._is_in:
            self._tell("deregistered" if registration.left > before else "orphaned", why)
        self._is_in, self._is_told_ill = False, True

    async def _connected(self) -> Registry:
        while True:
            try:
                return await self._connect()
            except MicroError as exc:
                if isinstance(exc, _FINAL):
                    raise
                self._note(exc)
            await asyncio.sleep(_AGAIN)

    async def _settle(self, registration: Registration) -> float | None:
        """Do what health asks for; the seconds after which to try again, None if that is done."""
        why = self._health.why
        if why == "" and not self._is_in:
            return None if await self._enter(registration) else _AGAIN
        if why and self._is_in:
            await self.leave(f"unhealthy: {why}")
        elif why and not self._is_told_ill:
            self._is_told_ill = True
            self._tell("waiting", why)
        return None

    async def _enter(self, registration: Registration) -> bool:
        try:
            async with asyncio.timeout(_REGISTERING):
                await registration.start()
        except Exception as exc:  # whatever a backend raises, the node must come back
            if isinstance(exc, _FINAL) and not self._was_in:
                raise
            self._note(exc)
            return False
        why = "healthy again" if self._was_in and self._is_told_ill else ""
        self._is_in = self._was_in = True
        self._is_told_ill = self._is_away = False
        self._tell("registered", why)
        return True

    def _note(self, error: Exception | None) -> None:
        """The registry could not be told, or, None, could again."""
        if error is None:
            self._tell("registered", "the registry answers again")
        elif not self._is_away:
            self._tell("outage", str(error) or f"no answer in {_REGISTERING:g} s")
        self._is_away = error is not None
