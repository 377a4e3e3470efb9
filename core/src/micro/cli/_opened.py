"""What every command runs in: an open service with the command's options, and a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import click

from micro.cli import _arguments
from micro.errors import DeadlineExceeded
from micro.logs import configure
from micro.retries import Retries
from micro.service import Service
from micro.settings import Settings

T = TypeVar("T")
#: What a command does with an open service; the timer ends it unless it is put off.
Body: TypeAlias = Callable[[Service, asyncio.Timeout], Awaitable[T]]

#: Seconds beyond the time-out of calls, so that a call's own error, which says more, comes first.
_GRACE = 0.5


def run(
    ctx: click.Context,
    body: Body[T],
    *,
    timeout: float | None = None,
    retries: Retries | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """What ``body`` makes of a service that is open for it, with the options of ``ctx``.

    It has ``timeout`` seconds, or the time-out of calls; it may reschedule what watches over that.

    Raises:
        MicroError: from ``body``; DeadlineExceeded when the time is over before it.
    """
    settings = Settings(_arguments.given(ctx))
    level = settings.text("log_level", None, _arguments.LOG_LEVEL)
    configure(level.text, source=level.source, colour=settings.colour)
    caller = _arguments.Caller("micro", retries=retries)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_run(caller, settings, body, timeout))


async def _run(caller: Service, settings: Settings, body: Body[T], timeout: float | None) -> T:
    seconds = (timeout or settings.duration("client_request_timeout", None, 5.0)) + _GRACE
    async with caller.opened(settings) as service:
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                return await body(service, timer)
        except TimeoutError:
            if not timer.expired():
                raise
            raise DeadlineExceeded(f"the registry gave no answer in {seconds:g} s") from None
