"""A service in a process of its own, those who call it, and what has to hold of each call."""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.faults.observers import Journal
from tests.faults.served import Said, Work

import micro
from micro.errors import DeadlineExceeded, MicroError
from micro.testing import FaultProxy, Server, eventually, serving

TRANSPORTS = ["tcp", "http"]
MIB = 1024 * 1024
#: Seconds that a busy machine may add to any bound of time.
SLACK = 2.0

_PAGE = 4096


class Served(Server):
    """The service, on one port for all its transports, registered with nobody else."""

    scheme = "tcp"

    def __init__(self, folder: Path, *limits: float) -> None:
        super().__init__(folder)
        self._limits = limits

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        program = Path(__file__).with_name("served.py")
        return [sys.executable, program, *map(str, (ports[0], *self._limits))]

    def answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True

    def check(self) -> None:
        """It runs, and says nothing but lines of the levels INFO and WARNING."""
        assert self.running
        for line in self.log.read_text().splitlines():
            assert line.split()[1:2] in (["INFO"], ["WARNING"]), f"the service says: {line}"


def memory(pid: int | str = "self") -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def most_memory(pid: int) -> int:
    """The most bytes of a process that ever were in memory."""
    (line,) = (
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return int(line.split()[1]) * 1024


def files(pid: int | str = "self") -> int:
    """How many files a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@asynccontextmanager
async def calling(address: str, transport: str, *, timeout: float = 5.0) -> AsyncIterator[Work]:
    """A client of the service at ``address``, by one transport alone."""
    environment = {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": transport}
    async with serving(micro.Service("caller"), environment) as client:
        yield micro.using(client("faults", Work), address=address, timeout=timeout)


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have ``work`` run, and cancel it at the end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def shown(failed: Counter[str]) -> str:
    """The names of errors, and how many there were."""
    return ", ".join(f"{count} {name}" for name, count in sorted(failed.items())) or "0 failed"


class Stage:
    """A service, its callers, the links between them, and what chance does.

    ``figures`` is what the end of the run tells of it.
    """

    def __init__(
        self, served: Served, journal: Journal, chance: random.Random, *, full: bool
    ) -> None:
        self.served = served
        self.journal = journal
        self.chance = chance
        self.full = full
        self.figures = ""

    def calling(self, transport: str, *, timeout: float = 5.0) -> AbstractAsyncContextManager[Work]:
        """A client of the service, by one transport alone."""
        return calling(self.served.address, transport, timeout=timeout)

    def link(self) -> FaultProxy:
        """A way to the service that may be bad; enter it."""
        return FaultProxy(self.served.address, seed=self.chance.randrange(10**6))

    @asynccontextmanager
    async def linked(
        self, transport: str, *, timeout: float = 5.0
    ) -> AsyncIterator[tuple[FaultProxy, Work]]:
        """A link, and a client that reaches the service by it."""
        async with self.link() as link, calling(link.address, transport, timeout=timeout) as work:
            yield link, work


class Callers:
    """Those who call the service at once by one client, and what came of it.

    Each call has a text of its own, which has to come back; or it fails with one of the errors that
    are ``expected``. It ends within its ``timeout`` and what is slack, and its deadline, if it is
    told to have passed, has.
    """

    def __init__(
        self,
        stage: Stage,
        work: Work,
        *,
        timeout: tuple[float, float] = (5.0, 5.0),
        expected: tuple[type[MicroError], ...] = (),
    ) -> None:
        self.done = 0
        self.failed: Counter[str] = Counter()
        #: Texts of the calls that were provably not executed, as their errors say.
        self.unsent: list[str] = []
        self.texts: list[str] = []
        self._work = work
        self._journal = stage.journal
        self._chance = stage.chance
        self._timeout = timeout
        self._expected = expected

    def __str__(self) -> str:
        return f"{self.done:7} calls, {shown(self.failed)}"

    async def make(self, calls: int, *, at_once: int) -> None:
        """So many calls."""
        left = iter(range(calls))

        async def call_on() -> None:
            for _ in left:
                await self.call()

        await asyncio.gather(*(call_on() for _ in range(at_once)))

    async def run(self, at_once: int) -> None:
        """Call until cancelled."""

        async def call_on() -> None:
            while True:
                await self.call()
                await asyncio.sleep(0)  # a call that fails at once lets nobody else run

        await asyncio.gather(*(call_on() for _ in range(at_once)))

    async def succeed(self, calls: int) -> None:
        """Wait until so many more were answered; too little traffic is a failure of the test."""
        enough = self.done + calls
        await eventually(lambda: self.done >= enough, within=10, every=0.001)

    async def fail(self, calls: int) -> None:
        """Wait until so many more failed."""
        enough = self.failed.total() + calls
        await eventually(lambda: self.failed.total() >= enough, within=10, every=0.001)

    async def call(self) -> None:
        text = f"{self._chance.getrandbits(64):016x}"
        timeout = self._chance.uniform(*self._timeout)
        work = micro.using(self._work, timeout=timeout)
        self.texts.append(text)
        began = time.monotonic()
        try:
            said = await work.record(Said(text))
        except self._expected as exc:
            self._failed(text, exc, time.monotonic() - began < timeout)
        except Exception as exc:  # whatever else it is, is wrong
            self._journal.blame(f"a call failed: {exc!r}")
        else:
            self.done += 1
            self.compare(text, said.text)
        took = time.monotonic() - began
        if took > timeout + SLACK:
            self._journal.blame(f"a call of {timeout:.2f} s took {took:.2f} s")

    def compare(self, sent: str, got: str) -> None:
        if got != sent:
            self._journal.blame(f"{sent} got the reply {got}")

    def _failed(self, text: str, error: MicroError, early: bool) -> None:
        self.failed[type(error).__name__] += 1
        if early and isinstance(error, DeadlineExceeded):
            self._journal.blame(f"before its time: {error!r}")
        if error.sent is False:
            self.unsent.append(text)
