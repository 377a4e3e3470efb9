"""Being a program: flags, signals, the event loop, exit statuses."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Self

from micro.errors import ConfigError, MicroError
from micro.logs import configure
from micro.settings import Place, Settings, taken_place, usage

if TYPE_CHECKING:
    from micro.workers import Alone, Leash

_log = logging.getLogger("micro.service")

#: Seconds that the last cancelled tasks, and functions in threads, have to end.
_LAST_WAIT = 0.3
#: Seconds after the first signal when all that still runs is cancelled, and when the process ends
#: whatever it does: who waits for it kills it soon.
_PATIENCE = 9.5
_MOST = 9.9

Opened = Callable[[Settings], AbstractAsyncContextManager[Any]]


def run(
    name: str,
    opened: Opened,
    args: Sequence[str] | None,
    *,
    check: Callable[[Settings], Alone],
) -> None:
    """Keep what ``opened`` opens with the settings of this process open until a signal.

    ``args`` None means this process's own. See ``Service.run`` for what signals and errors do;
    ``check`` tells what the settings come to, before workers are started.
    """
    try:
        place = taken_place()
        settings = Settings(args)
        if settings.wants_help:
            print(usage())
            return
        process = f"[{place.number}]" if place else ""
        level = settings.text("log_level", None, "info")
        configure(level.text, source=level.source, colour=settings.colour, process=process)
        if place is None and settings.number("workers", 1) != 1:
            from micro.workers import supervise

            supervise(name, settings, check(settings))
            return
        with _Watchdog(name) as watchdog, asyncio.Runner(loop_factory=loop_factory()) as runner:
            stopping = partial(_Stopping, name, place, watchdog)
            status = runner.run(_until_signal(name, opened, settings, stopping))
            if status:
                _exit_now(status)
    except MicroError as exc:
        print(f"{name}: {exc}", file=sys.stderr)
        raise SystemExit(2 if isinstance(exc, ConfigError) else 1) from None


async def _until_signal(
    name: str, opened: Opened, settings: Settings, make: Callable[[], _Stopping]
) -> int:
    """The status to exit with, 0 after a whole drain."""
    stopping = make()
    try:
        async with opened(settings):
            stopping.start()
            if settings.switch("tune_gc", default=True):
                _tune_gc()
            await stopping.asked.wait()
    except asyncio.CancelledError:
        if not stopping.status:
            raise
        _log.warning("%s: stopped at once", name)
        return stopping.status
    finally:
        stopping.close()
    if await _left_running():
        _log.error("%s: stopped without handlers that ignore their cancellation", name)
        return 1
    if _threads_left(name):
        _log.error("%s: stopped without functions that still run in threads", name)
        return 1
    _log.info("%s: stopped", name)
    return 0


def _tune_gc() -> None:
    """Look at what the start has made no more, and at what calls make less often.

    Measured: at 10 kB messages a third more calls a second, and half the p99.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


class _Watchdog:
    """Ends the process when a stop takes too long, whatever holds it: a thread, a lock, a loop."""

    def __init__(self, name: str) -> None:
        self._timer = threading.Timer(_MOST, _end, [name])
        self._timer.daemon = True
        self._started = False

    def start(self) -> None:
        if not self._started:
            self._started = True
            self._timer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._timer.cancel()


def _end(name: str) -> NoReturn:
    """End the process at once; logging may be what holds it."""
    os.write(2, f"{name}: not stopped after {_MOST:g} s; ended\n".encode())
    os._exit(1)


class _Stopping:
    """What signals ask for: the first to drain, the next, or one during the start, to end.

    The supervisor of a worker asks for the same. A drain that takes too long is ended.
    """

    def __init__(self, name: str, place: Place | None, watchdog: _Watchdog) -> None:
        self.asked = asyncio.Event()
        #: What to exit with when it was forced.
        self.status = 0
        self._name = name
        self._watchdog = watchdog
        self._started = False
        self._signalled = False
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._leash: Leash | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):  # no signal handlers in the loop of Windows
                self._loop.add_signal_handler(number, self._on_signal, number)
        if place is not None:
            from micro.workers import Leash

            self._leash = Leash(name, place, drain=self._drain, force=self._force)

    def start(self) -> None:
        """The start is over: from now on there is something to drain."""
        self._started = True
        if self._leash is not None:
            self._leash.serves()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._leash is not None:
            self._leash.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):
                self._loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        # The first, also when the supervisor was sooner: both were told by whoever stops the group.
        (self._force if self._signalled else self._drain)(number)
        self._signalled = True

    def _drain(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.asked.is_set():
            return
        self.asked.set()
        self._watchdog.start()
        if self._started:
            self._timer = self._loop.call_later(_PATIENCE, self._give_up)
        else:
            self._force(number)

    def _force(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._cancel(128 + number)

    def _give_up(self) -> None:
        _log.error("%s: not stopped after %g s; what still runs is cut off", self._name, _PATIENCE)
        self._cancel(1)

    def _cancel(self, status: int) -> None:
        self.asked.set()
        self._watchdog.start()
        self.status = self.status or status
        if self._task is not None:
            self._task.cancel()


async def _left_running() -> bool:
    """Whether tasks remain that do not end although they are cancelled."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    return bool(left) and bool((await asyncio.wait(left, timeout=_LAST_WAIT))[1])


def _threads_left(name: str) -> bool:
    """Whether plain functions remain that do not end; Python would wait for them."""
    until = time.monotonic() + _LAST_WAIT
    ours = [one for one in threading.enumerate() if one.name.startswith(f"micro-{name}_")]
    for thread in ours:
        thread.join(max(until - time.monotonic(), 0.0))
    return any(thread.is_alive() for thread in ours)


def _exit_now(status: int) -> NoReturn:
    """End the process without waiting for what does not end by itself."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop that services run on; None for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
