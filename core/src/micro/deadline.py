"""Ends what has run for too long: many deadlines, one timer."""

from __future__ import annotations

import asyncio
import math
import time
from asyncio import current_task
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

#: Least seconds between two looks at what runs; what is due waits for so long at most.
_STEP = 0.01


class Limited(Protocol):
    """Something with an end: ``when`` is a moment of ``time.monotonic()``."""

    when: float

    def expire(self) -> None:
        """Called once, at ``when`` or a moment later."""
        ...


class Deadlines:
    """Watches what runs in one event loop, and ends what is still there when its time has come.

    One timer serves all, and only while there is something: a call costs no timer of its own, and
    an idle process wakes up for none. Nothing ends early.
    """

    def __init__(self) -> None:
        #: What is watched, and the moment of the next look.
        self.running: set[Limited] = set()
        self.wake: float = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def until(self, when: float) -> Limit:
        """``with deadlines.until(when):`` ends its body with TimeoutError at ``when``.

        Infinity is no end.
        """
        return Limit(self, when)

    def add(self, limited: Limited) -> None:
        self.running.add(limited)
        if limited.when < self.wake:
            self.schedule(limited.when)

    def discard(self, limited: Limited) -> None:
        self.running.discard(limited)

    def close(self) -> None:
        """End the timer; what still runs is watched no more."""
        self.running.clear()
        self.wake = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def schedule(self, when: float) -> None:
        """Look at ``when`` at the latest."""
        if self._timer is not None:
            self._timer.cancel()
        self.wake = when
        self._timer = asyncio.get_running_loop().call_later(
            max(when - time.monotonic(), 0.0), self._look
        )

    def _look(self) -> None:
        now = time.monotonic()
        self.wake = math.inf
        self._timer = None
        due = [limited for limited in self.running if limited.when <= now]
        try:
            for limited in due:
                if limited in self.running:  # else the end of another one discarded it
                    self.running.discard(limited)
                    limited.expire()
        finally:  # who fails stops no other: what is left is still due at the next look
            earliest = min((limited.when for limited in self.running), default=math.inf)
            if earliest < math.inf:
                self.schedule(max(earliest, now + _STEP))


class Limit(msgspec.Struct, eq=False):  # a Struct, since it is made twice in every call
    """The body of one ``with``, in one task; what ``asyncio.timeout`` does at a tenth of the cost.

    Entered and left once.
    """

    deadlines: Deadlines
    when: float
    expired: bool = False
    task: asyncio.Task[Any] | None = None
    #: How often the task was asked to end before.
    asked: int = 0

    def __enter__(self) -> Self:
        # What Deadlines.add does stands here itself, as it is on the path of every call.
        self.task = task = current_task()
        if task is None:
            raise RuntimeError("a deadline is for code of a task")
        self.asked = task.cancelling()
        deadlines = self.deadlines
        deadlines.running.add(self)
        if self.when < deadlines.wake:
            deadlines.schedule(self.when)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.deadlines.running.discard(self)
        if not self.expired or self.task is None:
            return
        if self.task.uncancel() <= self.asked and kind is asyncio.CancelledError:
            raise TimeoutError from exc

    def expire(self) -> None:
        if self.task is not None:
            self.expired = True
            self.task.cancel()


class Alarm:
    """Calls something at ``when``, unless it was discarded before."""

    def __init__(self, when: float, expire: Callable[[], None]) -> None:
        self.when = when
        self.expire = expire
