"""Time that moves on when nothing else is left to do, or when a test says that something took it.

Minutes in no time, and the same each time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar
from unittest import mock

P = ParamSpec("P")
T = TypeVar("T")


class _Clock(selectors.SelectSelector):
    """Waits for nothing: where a loop would wait, time moves on to its next timer."""

    now = 0.0
    computed = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and no timer is left"
        self.now += max(timeout, 0.0)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop without sockets, whose time begins at 0."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def thread_time(self) -> float:
        """Seconds of the processor."""
        return self._clock.computed

    def compute(self, seconds: float) -> None:
        self.stand(seconds)
        self._clock.computed += seconds

    def stand(self, seconds: float) -> None:
        """As a process that the kernel, or a signal, has stopped for a while."""
        self._clock.now += seconds


def simulate(main: Callable[[], Coroutine[Any, Any, T]], seed: int) -> T:
    """Run ``main`` in simulated time; all chance of the ``random`` module follows from ``seed``."""
    state, logs = random.getstate(), logging.getLogger("micro")
    level = logs.level
    random.seed(seed)
    logs.setLevel(logging.ERROR)  # what is expected costs more to write down than all the rest
    try:
        with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
            loop = runner.get_loop()
            assert isinstance(loop, SimulatedLoop)
            with mock.patch.multiple("time", monotonic=loop.time, thread_time=loop.thread_time):
                return runner.run(main())
    finally:
        logs.setLevel(level)
        random.setstate(state)


def simulated(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """The test in simulated time, with the same chance each time."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        simulate(lambda: test(*args, **kwargs), seed=1)

    return run


def running() -> SimulatedLoop:
    """The loop in whose time all of this happens."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimulatedLoop)
    return loop
