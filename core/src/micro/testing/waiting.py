"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any, TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(
    condition: Callable[[], Awaitable[T]], *, within: float = ..., every: float = ...
) -> T: ...


@overload
async def eventually(
    condition: Callable[[], T], *, within: float = ..., every: float = ...
) -> T: ...


async def eventually(
    condition: Callable[[], Any], *, within: float = 5.0, every: float = 0.01
) -> Any:
    """The first true value of ``condition``, asked again and again for ``within`` seconds.

    Raises:
        AssertionError: it was never true; the text has its last value.
    """
    deadline = time.monotonic() + within
    while True:
        asked = condition()
        value = await asked if isawaitable(asked) else asked
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within:g} s: {condition} is {value!r}")
        await asyncio.sleep(every)
