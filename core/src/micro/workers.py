"""Several processes of one program, and the one that starts, replaces and stops them.

Each worker is a node of its own, with a port of its own; callers balance. The supervisor serves
nothing. The two talk over a pair of sockets: a byte from the worker says that it serves, one from
the supervisor asks it to drain or to end at once, and the end of the pair that the other has died.
Signals would not do: a terminal, and systemd, send them to the whole group, and two of them force.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from random import uniform
from typing import Protocol

from micro.errors import ConfigError
from micro.settings import Given, Place, Settings, with_place

_log = logging.getLogger("micro.service")

_SERVES = b"s"
_DRAIN = b"d"
_FORCE = b"f"
#: More are a mistake.
_MOST_WORKERS = 512
#: The status of a process whose settings are wrong.
_WRONG_SETTING = 2
#: Seconds until a worker that died is replaced: the first time, doubled each time, at most.
_FIRST = 0.1
_LONGEST = 30.0
#: Seconds after which a worker that dies is the first again.
_LIVED = 10.0
#: Seconds that workers have to stop, and to stop at once, before they are killed.
_GRACE = 10.0
_LAST_WAIT = 1.0


class Alone(Protocol):
    """The settings of a service of which several workers cannot have the same."""

    id: Given
    address: Given
    advertise: Given


def supervise(name: str, settings: Settings, alone: Alone) -> None:
    """Be the supervisor of as many workers as the settings say, until a signal.

    It ends as they do: with status 0 after a drain, with the status of a worker when that finds its
    settings wrong, or when none of them can start.

    Raises:
        ConfigError: they cannot be several.
        SystemExit: the status is not 0.
    """
    count = settings.number("workers", 1)
    source = settings.text("workers", None).source
    if not 1 <= count <= _MOST_WORKERS:
        raise ConfigError(f"{source}: workers: {count} is not one of 1 to {_MOST_WORKERS}")
    _check_apart(count, alone)
    command = _command(source)
    with asyncio.Runner() as runner:
        status = runner.run(_Supervisor(name, command, count).run())
    if status:
        raise SystemExit(status)


def _check_apart(count: int, alone: Alone) -> None:
    """Refuse what only one process can have."""
    without = "or start single processes, without --workers"
    if alone.id.source != "default":
        raise ConfigError(
            f"{alone.id.source}: server_id {alone.id.text}: {count} workers are {count} nodes, and "
            f"each needs an id of its own; leave it out, {without}"
        )
    if not alone.address.text.endswith(":0"):
        raise ConfigError(
            f"{alone.address.source}: server_address {alone.address.text}: {count} workers need "
            f"{count} ports; write port 0, so that each takes a free one, {without}"
        )
    if alone.advertise.text:
        raise ConfigError(
            f"{alone.advertise.source}: server_advertise {alone.advertise.text}: {count} workers "
            f"are reached at {count} ports; leave it out, {without}"
        )


def _command(source: str) -> list[str]:
    """What starts this program once more."""
    if sys.platform == "win32":
        raise ConfigError(f"{source}: workers need a system that has Unix sockets")
    arguments = sys.orig_argv[1:]
    if not sys.executable or not arguments or arguments[0] == "-":
        raise ConfigError(f"{source}: workers are started from a file, as: python service.py")
    return [sys.executable, *arguments]


class Leash:
    """A worker's end: it hears what the supervisor asks for, and of its death."""

    def __init__(
        self, name: str, place: Place, *, drain: Callable[[], None], force: Callable[[], None]
    ) -> None:
        try:
            self._line = socket.socket(fileno=place.line)
        except OSError as exc:
            raise ConfigError(f"worker {place.number}: no supervisor: {exc}") from exc
        self._line.setblocking(False)  # noqa: FBT003 - it has no name
        self._line.set_inheritable(False)
        self._name = name
        self._drain = drain
        self._force = force
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._line.fileno(), self._read)

    def serves(self) -> None:
        """Tell that the start is over."""
        with suppress(OSError):
            self._line.send(_SERVES)

    def close(self) -> None:
        self._loop.remove_reader(self._line.fileno())
        self._line.close()

    def _read(self) -> None:
        told = _received(self._line)
        if told is None:
            return
        if not told:
            self._loop.remove_reader(self._line.fileno())
            _log.warning("%s: the supervisor has died", self._name)
        (self._force if _FORCE in told else self._drain)()


class _Worker:
    """One process, and the supervisor's end of the pair."""

    def __init__(
        self, process: asyncio.subprocess.Process, line: socket.socket, serves: Callable[[], None]
    ) -> None:
        self.process = process
        self.began = time.monotonic()
        self._line = line
        self._serves = serves
        line.setblocking(False)  # noqa: FBT003 - it has no name
        asyncio.get_running_loop().add_reader(line.fileno(), self._read)

    def ask(self, what: bytes) -> None:
        with suppress(OSError):  # it has ended
            self._line.send(what)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    async def ended(self) -> int:
        """Wait for its end; its status, as a shell tells it."""
        try:
            status = await self.process.wait()
        finally:
            asyncio.get_running_loop().remove_reader(self._line.fileno())
            self._line.close()
        return status if status >= 0 else 128 - status

    def _read(self) -> None:
        told = _received(self._line)
        if told:
            self._serves()
        elif told is not None:
            asyncio.get_running_loop().remove_reader(self._line.fileno())


class _Supervisor:
    """Keeps its workers running, each by a task of its own."""

    def __init__(self, name: str, command: list[str], count: int) -> None:
        self._name = name
        self._command = command
        self._count = count
        self._workers: dict[int, _Worker] = {}
        #: Workers that ended while none had ever served.
        self._failed = 0
        self._any_served = asyncio.Event()
        self._ending = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """The status to exit with."""
        loop = asyncio.get_running_loop()
        for asked in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(asked, self._on_signal, asked)
        _log.info("%s: starting %d workers", self._name, self._count)
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(1, self._count + 1):
                    tasks.create_task(self._keep(number))
        finally:
            self._kill()
        _log.info("%s: stopped", self._name)
        return self._status

    async def _keep(self, number: int) -> None:
        """Keep one worker running, however often it dies."""
        deaths = 0
        while not self._ending.is_set():
            began = time.monotonic()
            status, who = await self._live(number)
            if self._ending.is_set():
                self._status = self._status or status
                return
            _log.warning("%s: worker %s %s", self._name, who, _how(status))
            if not self._any_served.is_set():
                await self._wait_for_another(status)
            deaths = 1 if time.monotonic() - began > _LIVED else deaths + 1
            await self._pause(min(_FIRST * 2 ** (deaths - 1), _LONGEST) * uniform(0.9, 1.1))

    async def _live(self, number: int) -> tuple[int, str]:
        """Start a worker and wait for its end; its status, and how it is called."""
        try:
            worker = await self._start(number)
        except OSError as exc:  # the machine has no more processes, or files, for now
            _log.error("%s: worker %d cannot be started: %s", self._name, number, exc)
            return 1, str(number)
        self._workers[number] = worker
        if self._ending.is_set():  # a signal came while it was started
            worker.ask(_DRAIN)
        try:
            return await worker.ended(), f"{number} (process {worker.process.pid})"
        finally:
            del self._workers[number]

    async def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=with_place(Place(number, theirs.fileno())),
                )
        except BaseException:
            ours.close()
            raise
        return _Worker(process, ours, self._any_served.set)

    async def _wait_for_another(self, status: int) -> None:
        """Before another try, see one serve: if none can, the fault is not the worker's own."""
        self._failed += 1
        if status == _WRONG_SETTING or self._failed == self._count:
            self._end(status)
        await self._any_served.wait()
        self._failed -= 1

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ending.wait()

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._ending.is_set():
            _log.info("%s: stopping %d workers (again to force)", self._name, self._count)
            self._end(0)
            return
        self._status = 128 + number
        for worker in self._workers.values():
            worker.ask(_FORCE)
        asyncio.get_running_loop().call_later(_LAST_WAIT, self._kill)

    def _end(self, status: int) -> None:
        """Ask all to drain, and who does not come back is killed."""
        self._status = self._status or status
        self._ending.set()
        self._any_served.set()  # nobody is to wait for that any more
        for worker in self._workers.values():
            worker.ask(_DRAIN)
        asyncio.get_running_loop().call_later(_GRACE, self._kill)

    def _kill(self) -> None:
        for worker in self._workers.values():
            _log.error("%s: process %d does not end; killed", self._name, worker.process.pid)
            worker.kill()


def _received(line: socket.socket) -> bytes | None:
    """What the other side says: b"" is its death, None nothing yet."""
    try:
        return line.recv(64)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _how(status: int) -> str:
    """How a worker ended, for people."""
    if status <= 128:
        return f"ended with status {status}, unasked"
    with suppress(ValueError):
        return f"died of {signal.Signals(status - 128).name}"
    return f"ended with status {status}, unasked"
