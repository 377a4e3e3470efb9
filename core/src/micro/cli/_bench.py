"""``micro bench``: what it is told, the load, and the line that moves while it runs."""

from __future__ import annotations

import asyncio
import gc
import math
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import msgspec

from micro.cli._load import Load
from micro.cli._report import time_text
from micro.errors import (
    ConfigError,
    DecodeError,
    EndpointNotFound,
    InvalidArgument,
    MicroError,
    ServiceNotFound,
)
from micro.url import seconds

F = TypeVar("F", bound=Callable[..., Any])

#: The warm-up: so much of the time that is measured, and so many seconds at most.
_WARM_UP = 0.1
_LONGEST_WARM_UP = 1.0
#: Seconds between two looks at a load that runs.
_EVERY = 0.5
EPILOG = """\b
Examples:
  micro bench helloworld Helloworld.Call '{"name": "Alice"}'
  micro bench helloworld Helloworld.Call '{"name": "Alice"}' -c 256 -d 1m --rate 2000

Exit status: 0 when all calls succeeded, 1 when one failed or none was made, 130 when it was
interrupted; otherwise as with the other commands."""


# -- what it is told ------------------------------------------------------------------------------


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The load to make: ``seconds`` are those that are measured."""

    callers: int
    seconds: float
    rate: float | None

    @property
    def warm_up(self) -> float:
        return min(self.seconds * _WARM_UP, _LONGEST_WARM_UP)


def _duration(_: click.Context, __: click.Parameter, value: str) -> float:
    found = seconds(value, "--duration")
    if not 0 < found < math.inf:
        raise ConfigError(f"--duration: {value!r} is not more than 0")
    return found


def _rate(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0.001 <= value <= 1_000_000:  # not a number is neither
        raise click.UsageError(f"--rate: {value:g} is not from 0.001 to 1,000,000")
    return value


_OPTIONS = (
    click.option(
        "--rate",
        metavar="NUMBER",
        type=float,
        callback=_rate,
        help="make so many calls each second, whether or not the service keeps up; latencies count "
        "from when a call should have begun (correction for coordinated omission)",
    ),
    click.option(
        "--duration",
        "-d",
        metavar="TIME",
        default="10s",
        callback=_duration,
        help="how long to measure, as 10s or 1m; before that a tenth, 1s at most, warms up",
    ),
    click.option(
        "--callers",
        "-c",
        metavar="NUMBER",
        default=64,
        type=click.IntRange(1, 10_000),
        help="how many calls run at once at most; default 64",
    ),
)


def options(function: F) -> F:
    """The options that make a Plan."""
    for option in _OPTIONS:
        function = option(function)
    return function


# -- the load -------------------------------------------------------------------------------------


async def drive(
    plan: Plan,
    call: Callable[[], Awaitable[object]],
    timer: asyncio.Timeout,
    *,
    shows_progress: bool = False,
) -> Load:
    """Make one call, which ``timer`` watches over, then those of ``plan``; an interrupt ends them.

    Raises:
        MicroError: no call can succeed: there is no such service or endpoint, or it is no request.
    """
    load = Load(
        call, callers=plan.callers, seconds=plan.seconds, warm_up=plan.warm_up, rate=plan.rate
    )
    error = await load.once()
    if error is not None and _is_final(error):
        raise error
    timer.reschedule(None)
    loop = asyncio.get_running_loop()
    progress = asyncio.create_task(_show_progress(load, plan)) if shows_progress else None
    loop.add_signal_handler(signal.SIGINT, load.stop)
    try:
        with _rare_collections():
            await load.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if progress is not None:
            progress.cancel()
            await asyncio.gather(progress, return_exceptions=True)
    return load


def _is_final(error: MicroError) -> bool:
    """Whether every other call would get this error too."""
    if isinstance(error, InvalidArgument):
        return not error.remote and not isinstance(error, DecodeError)
    return isinstance(error, ServiceNotFound | EndpointNotFound | ConfigError)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage less often: our own pauses would be told as those of the service."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _show_progress(load: Load, plan: Plan) -> None:
    """Keep a line of the terminal up to date, and leave it empty."""
    clock = asyncio.get_running_loop().time
    shown, count, looked = 0, 0, clock()
    try:
        while True:
            await asyncio.sleep(_EVERY)
            before, since = count, looked
            count, looked = load.measured.latencies.count, clock()
            line = _progress(load, plan, (count - before) / (looked - since))
            line = line[: shutil.get_terminal_size().columns - 1]
            click.echo(f"\r{line:<{shown}}", nl=False)
            shown = len(line)
    finally:
        click.echo(f"\r{'':<{shown}}\r", nl=False)


def _progress(load: Load, plan: Plan, rate: float) -> str:
    latencies = load.measured.latencies
    if not load.seconds:
        return f"warming up  {load.warm_up.succeeded:,} calls"
    words = [f"{load.seconds:.1f} s of {plan.seconds:g} s", f"{latencies.count:,} calls"]
    if load.seconds < plan.seconds:
        words.append(f"{rate:,.0f}/s")
    else:
        words.append(f"waiting for {load.measured.unfinished} more")
    if latencies.count:
        p50, p99 = latencies.percentiles(0.5, 0.99)
        words.append(f"p50 {time_text(p50)}  p99 {time_text(p99)}")
    return "  ".join([*words, f"{load.measured.failed:,} failed"])
