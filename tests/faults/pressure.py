"""A node that computes, on a core of its own as far as there is one, and what calls do to it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.callers import Calls, Job
from tests.faults.calls import MIB, memory
from tests.faults.survivor import SERVICE
from tests.faults.survivors import Node

import micro
from micro.client import Client
from micro.testing import eventually, serving
from micro.testing.ports import unused_ports

_CORES = sorted(os.sched_getaffinity(0))
_SERVER, _CALLERS = _CORES[0], _CORES[-1]
#: Above all other processes, where that is allowed.
_NICE = -19
#: A share of the time that others may have the node's core.
_SHARED = 0.05


@dataclass
class Phase:
    """What came of the calls of one job, and how the node was meanwhile.

    ``waited`` is the share of the time for which another process had the node's core, or another
    machine the node's or the callers'; ``slowest`` are the seconds that it took to tell its health,
    ``grown`` the bytes that it needed more.
    """

    calls: Calls
    seconds: float
    waited: float
    slowest: float
    asked: int
    grown: int

    def answered(self, since: float = 0.0) -> list[float]:
        """What those took that were answered, in order; of calls sent after so many seconds."""
        calls = zip(self.calls.sent, self.calls.took, self.calls.ended, strict=True)
        return sorted(took for sent, took, ended in calls if not ended and sent >= since)

    def goodput(self, since: float = 0.0) -> float:
        """Answers a second."""
        return len(self.answered(since)) / (self.seconds - since)

    def p99(self, since: float = 0.0) -> float:
        answered = self.answered(since)
        assert len(answered) > 100, f"too little traffic: {self.ended(since)}"
        return answered[int(0.99 * len(answered))]

    def ended(self, since: float = 0.0) -> Counter[str]:
        calls = zip(self.calls.sent, self.calls.ended, strict=True)
        return Counter(ended or "answered" for sent, ended in calls if sent >= since)

    @property
    def shared(self) -> bool:
        """Whether others had so much of the cores that it tells little of the node."""
        return self.waited > _SHARED

    def __str__(self) -> str:
        ended = ", ".join(f"{count} {how}" for how, count in sorted(self.ended().items()))
        return (
            f"{self.goodput():.0f}/s, p99 {self.p99() * 1000:.1f} ms, {ended}, "
            f"health in {self.slowest * 1000:.0f} ms, +{self.grown / MIB:.1f} MiB, "
            f"cores shared {self.waited:.0%}"
        )


class Pressure:
    """The node, and callers in other processes."""

    def __init__(self, folder: Path, seed: str, bug: str = "") -> None:
        (port,) = unused_ports(1)
        self._address = f"127.0.0.1:{port}"
        flag = f"--server_address={self._address}"
        self._node = Node("busy", folder, "memory", flag, bug=bug)
        self._seed = seed
        self._client: Client

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        caller = micro.Service("asker")
        environment = {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": "tcp"}
        try:
            self._node.start(apart=True)
            _place(self._node.pid, _SERVER)
            async with serving(caller, environment) as self._client:
                await eventually(self._answers, within=20)
                yield
            self._node.check()
        finally:
            self._node.end()

    async def phase(
        self, seconds: float, *, rate: float = 0.0, callers: int = 0, patient: bool = False
    ) -> Phase:
        """Have it called for so many seconds; its health is asked for all the time."""
        job = Job(self._address, seconds, self._seed, rate, callers, patient)
        before, waited, began = memory(self._node.pid), self._waited(), time.monotonic()
        asking = asyncio.create_task(self._ask())
        try:
            calls = await _call(job)
        finally:
            asking.cancel()
            await asyncio.wait([asking])
        slowest, asked, most = asking.result()
        share = (self._waited() - waited) / (time.monotonic() - began)
        return Phase(calls, seconds, share, slowest, asked, most - before)

    async def _ask(self) -> tuple[float, int, int]:
        """How slow the slowest answer was, how many there were, and the most memory."""
        slowest, asked, most = 0.0, 0, 0
        with suppress(asyncio.CancelledError):
            while True:
                began = time.monotonic()
                with suppress(micro.DeadlineExceeded):  # it shows in how slow the slowest was
                    await self._health()
                slowest, asked = max(slowest, time.monotonic() - began), asked + 1
                most = max(most, memory(self._node.pid))
                await asyncio.sleep(0.05)
        return slowest, asked, most

    async def _health(self) -> None:
        told = await self._client.call(SERVICE, "Debug.Health", address=self._address)
        assert told == {"status": "ok"}

    async def _answers(self) -> bool:
        try:
            await self._health()
        except micro.Unavailable:
            return False
        return True

    def _waited(self) -> float:
        """Seconds for which the node could have run and had no core, or another machine had that or
        the callers'. Source: sched-stats(7), proc_stat(5).
        """
        waited = int(Path(f"/proc/{self._node.pid}/schedstat").read_text().split()[1]) / 1e9
        return waited + sum(map(_stolen, {_SERVER, _CALLERS}))


async def _call(job: Job) -> Calls:
    program = Path(__file__).with_name("callers.py")
    root = str(Path(__file__).parents[2])
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(program),
        json.dumps(asdict(job)),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, *_path()]))},
    )
    _place(process.pid, _CALLERS)
    try:
        printed, _ = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0
    return Calls(*json.loads(printed))


def _stolen(core: int) -> float:
    """Seconds for which the machine was another's, since it was started."""
    lines = Path("/proc/stat").read_text().splitlines()
    (times,) = (line.split() for line in lines if line.startswith(f"cpu{core} "))
    return int(times[8]) / os.sysconf("SC_CLK_TCK")


def _path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def _place(pid: int, core: int) -> None:
    """Have a process keep to a core, before others there. Source: sched(7), autogroups."""
    os.sched_setaffinity(pid, {core})
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICE)
        Path(f"/proc/{pid}/autogroup").write_text(str(_NICE))
