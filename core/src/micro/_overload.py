"""What a server takes on: how many calls run, how long one waits, when it is too late to begin."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict

from micro.errors import ResourceExhausted

#: Seconds that a call waits, at most, before it is begun or refused.
PATIENCE = 0.1
#: When rounds of the loop take longer than the second, one after the other for as long as the
#: first, the queue stands: it is no burst.
_INTERVAL = 0.1
_STANDING = 0.05
#: Seconds that a call waits at most while the queue stands, so that those that are taken are quick.
_SHORT = 0.005
#: Seconds of a round after which the next is looked at from its very beginning, and after which
#: fewer calls begin in it while the queue stands.
_LONG = 0.02
#: A queue is over when, in so many seconds, no more than this share of calls was refused.
_CALM = 0.5
_FEW = 0.1
#: Of so many calls (less one, a mask) one looks how late it is, as long as none was late.
_SELDOM = 7


class Turns:
    """Lets ``most`` run at once; who comes then waits for PATIENCE at most, the first come first.

    As many may wait as may run.
    """

    def __init__(self, most: int, what: str) -> None:
        self.most = most
        self.running: int = 0
        self.refused: int = 0
        self._what = what
        self.waiting: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    async def take(self) -> None:
        """Take a turn, as soon as there is one.

        Raises:
            ResourceExhausted: it did not come in time, or too many wait.
        """
        if self.running < self.most:
            self.running += 1
            return
        if len(self.waiting) >= self.most:
            raise self._refusal()
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self.waiting[turn] = None
        timer = loop.call_later(PATIENCE, self._give_up, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.end()
            raise
        finally:
            timer.cancel()
            self.waiting.pop(turn, None)

    def end(self) -> None:
        """Give a turn back; the next who waits has it."""
        self.running -= 1
        self.next()

    def next(self) -> None:
        """Let go on who waits for a turn that is free."""
        while self.waiting and self.running < self.most:
            turn, _ = self.waiting.popitem(last=False)
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            turn.set_exception(self._refusal())

    def _refusal(self) -> ResourceExhausted:
        self.refused += 1
        return too_much(f"{self.most} {self._what} run already")


class Lateness:
    """How far the event loop is behind, and whether a call that begins now is too late.

    A call asks the loop to call back: until then the loop is at one and the same round, and what
    the round takes is what calls wait for the next one. ``too_late`` is when it has taken so long
    that the calls of the round that have not begun are refused. Handlers that compute, instead of
    waiting, are what makes a loop late; to refuse what is late leaves the time to calls that are
    not. A process that had no processor did not compute, and refuses nothing for that.

    Bursts may make rounds of PATIENCE. When one long round follows the other, the queue stands:
    rounds are short then, until few calls are refused for it. Handlers that wait before they
    compute queue up after their begin: so of long rounds, fewer calls begin in the next.

    Source: K. Nichols, V. Jacobson, Controlling Queue Delay, 2012; B. Maurer, Fail at Scale, 2015.
    """

    def __init__(self) -> None:
        #: A moment of ``time.monotonic()``; for a call that begins later, ask ``is_behind``.
        self.too_late: float = math.inf
        #: Calls whose number has none of these bits look how late it is.
        self.seldom: int = _SELDOM
        self.refused: int = 0
        self._stands = False
        #: Seconds of the processor when this round began, and that the last one took; how many
        #: calls of this one have begun, and may.
        self._began = 0.0
        self._before = 0.0
        self._round = 0
        self._room = math.inf
        #: Since when, in seconds of the processor, rounds are long.
        self._since = math.inf
        #: While the queue stands: when to see whether it still does; calls, refused ones, till now.
        self._until = 0.0
        self._calls = 0
        self._shed = 0

    def look(self, now: float) -> None:
        """Have the time of this round taken, unless that is being done."""
        self._round += 1
        if self.too_late == math.inf:
            self._begin_round(now, time.thread_time())
        elif self._round > self._room:
            self.too_late = -math.inf

    def is_behind(self) -> bool:
        """Whether it has computed for so long; or else something kept it from computing."""
        spent = time.thread_time() - self._began
        return self.too_late == -math.inf or spent > self._patience() / 2

    def refuse(self) -> ResourceExhausted:
        """The answer to a call that is too late."""
        self.refused += 1
        self._shed += 1
        return too_much("the server is behind")

    def _patience(self) -> float:
        return _SHORT if self._stands else PATIENCE

    def _begin_round(self, now: float, spent: float) -> None:
        if self._stands and now >= self._until:
            self._look_back(now)
        self._began = spent
        self.too_late = now + self._patience()
        asyncio.get_running_loop().call_soon(self._end_round)

    def _end_round(self) -> None:
        """Judge a round; where it was not short, the next is looked at from its very beginning."""
        now, spent = time.monotonic(), time.thread_time()
        took, before = spent - self._began, self._before
        if took > _STANDING and self._round > 1:
            self._was_long(now, spent)
        elif before <= _STANDING:  # rounds that read calls, and do no more, are short
            self._since = math.inf
        self._make_room(took)
        self._calls += self._round
        self._round = 0
        self._before = took
        if max(took, before) > (_SHORT if self._stands else _LONG):
            self.seldom = 0
            self._begin_round(now, spent)
        else:
            self.seldom = 0 if self._stands else _SELDOM
            self.too_late = math.inf

    def _was_long(self, now: float, spent: float) -> None:
        if self._since == math.inf:
            self._since = self._began
        elif spent - self._since > _INTERVAL and not self._stands:
            self._stands = True
            self._begin_count(now)

    def _make_room(self, took: float) -> None:
        """Let a third less begin after a long round, and one more, or all, after a short one."""
        if self._round > 1 and took > (_LONG if self._stands else _STANDING):
            self._room = max(min(self._room, self._round) * 2 // 3, 1)
        elif self._stands:
            self._room += 1
        elif self._before <= _STANDING:
            self._room = math.inf

    def _look_back(self, now: float) -> None:
        """See whether there still is too much to do; all calls are counted meanwhile."""
        nobody_came = now > self._until + _CALM
        if nobody_came or self._shed <= _FEW * self._calls:
            self._stands = False
        self._begin_count(now)

    def _begin_count(self, now: float) -> None:
        self._until = now + _CALM
        self._calls = self._shed = 0


class Shed(ResourceExhausted):
    """A refusal of this server's own, before the call was begun."""


def too_much(why: str) -> ResourceExhausted:
    return Shed(f"{why}; ask again later", sent=False, retry_after=PATIENCE)
