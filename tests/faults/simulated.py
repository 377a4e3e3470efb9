"""Time that moves on when nothing else is left to do: minutes in no time, the same each time."""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


class _Clock(selectors.SelectSelector):
    """Waits for nothing: where a loop would wait, time moves on to its next timer."""

    now = 0.0

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


def simulate(main: Callable[[], Coroutine[Any, Any, T]], seed: int) -> T:
    """Run ``main`` in simulated time; all chance of the ``random`` module follows from ``seed``."""
    state, logs = random.getstate(), logging.getLogger("micro")
    level = logs.level
    random.seed(seed)
    logs.setLevel(logging.ERROR)  # what is expected costs more to write down than all the rest
    try:
        with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
            with mock.patch("time.monotonic", runner.get_loop().time):
                return runner.run(main())
    finally:
        logs.setLevel(level)
        random.setstate(state)
