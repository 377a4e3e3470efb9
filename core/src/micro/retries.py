"""Whether a call that failed is sent again, when, and how often in all.

A call is repeated when it provably reached no handler, or when its endpoint or its caller says that
it is idempotent and the node is unavailable; never past its deadline, and on another node: on the
same one only where there is no other, and nothing was sent. What one client has given up is not
repeated by those who called its service. A budget bounds what all of that adds to the traffic.
"""

from __future__ import annotations

import time
from collections import deque

import msgspec

from micro.call import Call
from micro.errors import Closed, MicroError, ResourceExhausted, TooLarge, Unavailable

#: Seconds of which a budget remembers the calls, and after which a throttle forgets half of them.
_WINDOW = 10.0
_HALF = 0.5
#: Seconds between two times that a throttle forgets, or that a budget remembers.
_STEP = 0.1
#: Calls that a throttle imagines to have been taken: a few refusals are no overload.
_BENEFIT = 20.0
#: Refusals that it remembers when it is over.
_OVER = 0.1


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often a client repeats a call, and all calls of a service together.

    ``attempts`` of one call, the first included; 1 repeats nothing. Before the n-th repetition it
    waits for a random time up to ``backoff * 2 ** (n - 1)`` seconds, and before that for as long as
    the server asked. Of the calls of ten seconds the share ``budget`` is repeated at most, or
    ``least`` a second where that is more.

    Source: Finagle's RetryBudget; M. Brooker, Exponential Backoff And Jitter, 2015.
    """

    attempts: int = 3
    backoff: float = 0.025
    budget: float = 0.2
    least: float = 10.0


def repeatable(call: Call, error: MicroError) -> bool:
    """Whether repeating ``call`` after ``error`` may help, and executing it twice does no harm."""
    if error.final:
        return False
    if is_unsent(error):
        return isinstance(error, Unavailable | Closed) or is_overload(error)
    return call.idempotent and isinstance(error, Unavailable)


def is_unsent(error: MicroError) -> bool:
    """Whether the call provably reached no handler; a channel is Closed when its node has left."""
    return error.sent is False or isinstance(error, Closed)


def is_overload(error: MicroError) -> bool:
    """Whether a server says that it has too much to do now, and has not begun the call."""
    return (
        error.sent is False
        and isinstance(error, ResourceExhausted)
        and not isinstance(error, TooLarge)
    )


def pause(retries: Retries, attempt: int, error: MicroError) -> float:
    """Seconds to wait after the ``attempt``-th attempt."""
    from random import random

    longest: float = retries.backoff * 2 ** (attempt - 1)
    return (error.retry_after or 0.0) + random() * longest


class Budget:
    """What repetitions may add to the calls of one service."""

    def __init__(self, retries: Retries) -> None:
        self._share = retries.budget
        self._least = retries.least * _WINDOW
        self._spent: deque[float] = deque()
        #: How many calls there were at some moments of the last window.
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._taken = 0

    def take(self, attempts: int) -> bool:
        """Whether one more repetition is in the budget, after so many attempts in all."""
        now = time.monotonic()
        calls = attempts - self._taken
        while self._spent and self._spent[0] < now - _WINDOW:
            self._spent.popleft()
        if len(self._spent) + 1 > max(self._least, self._share * self._recent(now, calls)):
            return False
        self._spent.append(now)
        self._taken += 1
        return True

    def _recent(self, now: float, calls: int) -> float:
        """Calls of the last window; as if they had come evenly, where there was no look in it."""
        marks = self._marks
        while len(marks) > 1 and marks[0][0] < now - _WINDOW:
            marks.popleft()
        (since, before), (last, _) = marks[0], marks[-1]
        if now - last >= _STEP:
            marks.append((now, calls))
        return (calls - before) * min(1.0, _WINDOW / max(now - since, 1e-9))


class Throttle:
    """Holds calls back while a service refuses more than half of them.

    Then it costs the servers less to refuse what is left, and a caller that is refused here knows
    it at once. What it counts is forgotten by half each half second; some calls always go out, so
    that it ends.

    Source: Site Reliability Engineering, 2016, chapter 21, Client-Side Throttling.
    """

    def __init__(self) -> None:
        from random import random

        self._random = random
        self._asked = 0.0
        #: Those of them that were refused, by a server or here.
        self._refused = 0.0
        self._since = time.monotonic()

    def holds_back(self) -> bool:
        """Whether the next call is not to be sent; it counts as one that was asked for."""
        self._forget()
        self._asked += 1
        excess = 2 * self._refused - self._asked - _BENEFIT
        held = excess > 0 and self._random() < excess / (self._asked + 1)
        self._refused += held
        return held

    def refused(self) -> None:
        """Count a call that a server refused, unless it was asked for before this was there.

        Those who waited when a server began to refuse are all refused at once: to count them would
        hold back everything, and then nothing would tell that the server takes calls.
        """
        self._refused = min(self._refused + 1, max(self._asked, 1.0))

    def is_over(self) -> bool:
        """Whether it has nothing left to remember."""
        self._forget()
        return self._refused < _OVER

    def _forget(self) -> None:
        now = time.monotonic()
        if now - self._since >= _STEP:
            share = 0.5 ** ((now - self._since) / _HALF)
            self._asked *= share
            self._refused *= share
            self._since = now
