"""A program that a command starts, and that lives no longer than it does."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from micro.errors import ConfigError

#: Seconds that a program has to end when the command cannot go on.
_LAST_WAIT = 10.0


class Child:
    """A program in a process group of its own, so that ^C in a terminal comes to us alone."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        #: Its exit status, when it has ended; 128 and the number of the signal that ended it.
        self.ended: asyncio.Task[int] = asyncio.create_task(self._wait(), name="micro.child")

    async def _wait(self) -> int:
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to what it has started; quiet when it has ended."""
        if not self.ended.done():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    async def aclose(self) -> None:
        """End it, by force if it takes too long."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.send(number)
            await asyncio.wait({self.ended}, timeout=_LAST_WAIT)


@asynccontextmanager
async def running(command: Sequence[str]) -> AsyncIterator[Child]:
    """``command``, started here, and ended here if it has not ended before.

    Raises:
        ConfigError: it cannot be started.
    """
    try:
        process = await asyncio.create_subprocess_exec(*command, process_group=0)
    except OSError as exc:
        raise ConfigError(f"cannot run {command[0]!r}: {exc.strerror}") from exc
    child = Child(process)
    try:
        yield child
    finally:
        await child.aclose()


class Signals:
    """The signals that ask this process to end, one after another, instead of their effect.

    One that was ignored when the process began, as with nohup, is ignored.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[signal.Signals] = asyncio.Queue()
        names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
        found = [number for name in names if (number := getattr(signal, name, None))]
        self._taken = [one for one in found if signal.getsignal(one) is not signal.SIG_IGN]
        for number in self._taken:
            self._loop.add_signal_handler(number, self._came.put_nowait, number)

    async def next(self) -> signal.Signals:
        return await self._came.get()

    def close(self) -> None:
        """Signals have their usual effect again."""
        for number in self._taken:
            self._loop.remove_signal_handler(number)
