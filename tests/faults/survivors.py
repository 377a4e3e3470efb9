"""Three nodes that are killed, stopped and replaced, and steady calls whose fate is counted.

How often a call was executed is what the nodes say: each has a ledger that outlives it.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.calls import SLACK, shown
from tests.faults.survivor import SERVICE

import micro
from micro.call import Call
from micro.client import Client
from micro.errors import DeadlineExceeded
from micro.retries import Retries
from micro.selector import Candidate, Selector, Strategy, least_busy_of_two
from micro.testing import eventually, serving

#: Calls a second, and the least share of them that has to be answered before a fault: with fewer,
#: that none failed says nothing.
RATE = 500
ENOUGH = 0.8
#: Seconds that each call takes, at least and at most.
SHORT = (0.0, 0.1)
#: Seconds that the registry keeps a dead node: longer than any test looks at it.
TTL = 20.0

#: Seconds between two looks at which calls are due.
_TICK = 0.004
_PROGRAM = Path(__file__).with_name("survivor.py")
_PLANTED = Path(__file__).with_name("planted.py")


class Node:
    """One node, from one process to the next; ``bug`` is one of those that planted.py has."""

    def __init__(self, name: str, folder: Path, registry: str, *flags: str, bug: str = "") -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._ledger = folder / f"{name}.ledger"
        self._program = [_PLANTED, bug, _PROGRAM] if bug else [_PROGRAM]
        self._flags = [
            f"--registry={registry}",
            f"--server_id={name}",
            f"--register_ttl={TTL:g}s",
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, apart: bool = False) -> None:
        """Start it; ``apart``: in a session of its own, which the kernel may put first."""
        command = [sys.executable, *self._program, self._ledger, *self._flags]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=apart
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self, within: float) -> int:
        """Its status, once it has ended, which has to be soon."""
        process = self._process
        assert process is not None
        await eventually(lambda: process.poll() is not None, within=within)
        assert process.returncode is not None
        return process.returncode

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def executions(self) -> Counter[str]:
        """How often each call was begun; and under its text with a mark, how often ended so."""
        if not self._ledger.exists():
            return Counter()
        lines = self._ledger.read_text().splitlines()
        return Counter(line.removeprefix("+") for line in lines)

    def check(self) -> None:
        """It says nothing but lines of the levels INFO and WARNING."""
        for line in self.log.read_text().splitlines():
            assert line.split()[1:2] in (["INFO"], ["WARNING"]), f"{self.name} says: {line}"


@dataclass
class Fate:
    """What became of a call."""

    text: str
    timeout: float
    idempotent: bool = False
    is_long: bool = False
    is_stream: bool = False
    began: float = field(default_factory=time.monotonic)
    took: float = 0.0
    #: Once it has ended: None, an error, or what else it raised.
    ended: bool = False
    error: Exception | None = None
    #: The nodes that were chosen for it, and when.
    chosen: list[tuple[str, float]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.ended and self.error is None

    @property
    def first(self) -> str:
        return self.chosen[0][0] if self.chosen else ""


class Survivors:
    """The nodes, a client of them, and all calls that it made."""

    def __init__(self, folder: Path, registry: str, chance: Random) -> None:
        self.nodes: list[Node] = []
        self.fates: list[Fate] = []
        #: More of what came of it.
        self.told: str = ""
        #: What is wrong with the nodes that are started from now on.
        self.bug: str = ""
        self._folder = folder
        self._registry = registry
        self._chance = chance
        self._by_text: dict[str, Fate] = {}
        self._client: Client
        self._calls: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(
        self, nodes: int = 3, *, transport: str = "tcp,http", retries: Retries | None = None
    ) -> AsyncIterator[None]:
        """So many nodes, all of them registered, and connected by a call or more."""
        selector = Selector(strategy=self._noted)
        caller = micro.Service("caller", selector=selector, retries=retries)
        environment = {"MICRO_REGISTRY": self._registry, "MICRO_TRANSPORT": transport}
        async with AsyncExitStack() as stack:
            for number in range(1, nodes + 1):
                node = Node(f"node-{number}", self._folder, self._registry, bug=self.bug)
                stack.callback(node.end)
                self.nodes.append(node)
                node.start()
            self._client = await stack.enter_async_context(serving(caller, environment))
            await self.registered(nodes)
            stack.push_async_callback(self._end)
            yield
            await self.calm()
        for node in self.nodes:
            node.check()

    async def registered(self, count: int) -> None:
        """Wait until the client sees so many."""
        async with self._client.watch(SERVICE) as watch:
            await eventually(lambda: len(watch.nodes) == count, within=20)

    async def calm(self) -> None:
        """Wait until no call runs."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=20)
        assert not self._calls, f"{len(self._calls)} calls hang"

    async def ended(self, *, since: float) -> None:
        """Wait until what began before that has ended."""
        old = [fate for fate in self.fates if fate.began <= since]
        await eventually(lambda: all(fate.ended for fate in old), within=20)

    async def call(
        self,
        endpoint: str = "Change",
        *,
        seconds: float | None = None,
        timeout: float = 5.0,
        idempotent: bool = False,
        address: str = "",
    ) -> Fate:
        """One call; its errors are its fate."""
        fate = self._fate(timeout)
        fate.idempotent, fate.is_long = idempotent, seconds is not None
        seconds = self._chance.uniform(*SHORT) if seconds is None else seconds
        try:
            reply = await self._client.call(
                SERVICE,
                f"Work.{endpoint}",
                {"text": fate.text, "seconds": seconds},
                returns=str,
                timeout=timeout,
                metadata={"call": fate.text},
                idempotent=idempotent,
                address=address,
            )
            assert reply == fate.text
        except Exception as exc:  # whatever it is, it is told
            fate.error = exc
        fate.took, fate.ended = time.monotonic() - fate.began, True
        return fate

    async def listen(self, messages: int, seconds: float) -> Fate:
        """Read a stream to its end; a message that is missing is an error."""
        fate = self._fate(60.0)
        fate.is_long = fate.is_stream = True
        request = {"text": fate.text, "seconds": seconds, "messages": messages}
        try:
            async with self._client.stream(
                SERVICE, "Work.Tell", request, returns=int, metadata={"call": fate.text}
            ) as replies:
                got = [number async for number in replies]
            assert got == list(range(messages)), f"{len(got)} of {messages} messages"
        except Exception as exc:  # as in call
            fate.error = exc
        fate.took, fate.ended = time.monotonic() - fate.began, True
        return fate

    async def addresses(self) -> list[str]:
        registry = await self._client.registered()
        return [node.address for node in await registry.get(SERVICE)]

    @asynccontextmanager
    async def traffic(
        self,
        rate: float = RATE,
        *,
        endpoint: str = "Change",
        timeout: float = 5.0,
        idempotent: Callable[[int], bool] = lambda _: False,
    ) -> AsyncIterator[None]:
        """Calls at a steady rate, each at its time however others do; a second of them before.

        Raises:
            AssertionError: there was too little traffic before, or in, the block.
        """

        async def run() -> None:
            began, number = time.monotonic(), 0
            while True:
                due = int((time.monotonic() - began) * rate)
                while number < due:
                    number += 1
                    self._start(endpoint, timeout=timeout, idempotent=idempotent(number))
                await asyncio.sleep(_TICK)

        task = asyncio.create_task(run())
        try:
            await self.enough(rate)
            before, began = len(self.fates), time.monotonic()
            yield
            made = (len(self.fates) - before) / (time.monotonic() - began)
            assert made > ENOUGH * rate, f"too little traffic: {made:.0f} calls a second"
        finally:
            task.cancel()
            await asyncio.wait([task])
        await self.calm()

    async def enough(self, rate: float) -> None:
        """See that, in one second, about as many calls are answered as are due.

        On a busy machine it is looked thrice.
        """
        answered = 0.0
        for _ in range(3):
            before, began = self._ended(), time.monotonic()
            await asyncio.sleep(1.0)
            answered = (self._ended() - before) / (time.monotonic() - began)
            if answered > ENOUGH * rate:
                return
        raise AssertionError(f"too little traffic: {answered:.0f} answers a second before")

    # what came of it

    def executions(self) -> Counter[str]:
        """How often each call was begun, and ended, on all nodes together."""
        return sum((node.executions() for node in self.nodes), Counter[str]())

    def running_now(self) -> int:
        """How many calls are being executed that take longer than most."""
        return sum(sum(self.on(node)) for node in self.nodes)

    def on(self, node: Node) -> tuple[int, int]:
        """How many calls that take long, and streams, are being executed on a node."""
        there = node.executions()
        now = [
            fate
            for fate in self.fates
            if fate.is_long and there[fate.text] and not there[f"-{fate.text}"]
        ]
        streams = sum(fate.is_stream for fate in now)
        return len(now) - streams, streams

    def marked(self, mark: str, fate: Fate) -> bool:
        """Whether an execution of it was ended so: ``-`` when it was done, ``!`` when cancelled."""
        return self.executions()[f"{mark}{fate.text}"] > 0

    def twice(self) -> list[str]:
        """The calls that were executed twice, and were not to be."""
        executions = self.executions()
        return [
            fate.text for fate in self.fates if executions[fate.text] > 1 and not fate.idempotent
        ]

    def unanswered(self) -> list[str]:
        """Those that were answered without having been executed."""
        executions = self.executions()
        return [
            fate.text for fate in self.fates if fate.error is None and not executions[fate.text]
        ]

    def failed(self) -> list[Fate]:
        return [fate for fate in self.fates if fate.error is not None]

    def last_chosen(self, node: str) -> float:
        """When a call was last sent to it, or meant to be."""
        moments = (at for fate in self.fates for name, at in fate.chosen if name == node)
        return max(moments, default=0.0)

    def check_times(self) -> None:
        """No call outlives its deadline, and none is told too early that it has come."""
        for fate in self.fates:
            text = f"of {fate.timeout} s, ended after {fate.took:.3f} s: {fate.error!r}"
            assert fate.took < fate.timeout + SLACK, text
            early = isinstance(fate.error, DeadlineExceeded) and fate.took < fate.timeout
            assert not early, text

    def check_none_failed(self) -> None:
        failed = self.failed()
        assert not failed, f"{len(failed)} calls failed, the first: {failed[0]!r}"

    def check_executions(self) -> None:
        """What was answered was executed, and once if it had to be."""
        twice = self.twice()
        assert not twice, f"{len(twice)} calls were executed twice"
        assert not self.unanswered()

    def __str__(self) -> str:
        failed = Counter(type(fate.error).__name__ for fate in self.failed())
        took = sorted(fate.took for fate in self.fates)
        p99 = took[int(0.99 * len(took))] * 1000 if took else 0.0
        counts = self._client.counts
        return (
            f"{len(took):6} calls, {shown(failed)}, {len(self.twice())} twice, p99 {p99:.0f} ms, "
            f"{counts.retries} repeated, {counts.ejections} ejected"
            f"{'; ' if self.told else ''}{self.told}"
        )

    def _start(self, endpoint: str, *, timeout: float, idempotent: bool) -> None:
        task = asyncio.create_task(self._fire(endpoint, timeout=timeout, idempotent=idempotent))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _fire(self, endpoint: str, *, timeout: float, idempotent: bool) -> None:
        await self.call(endpoint, timeout=timeout, idempotent=idempotent)

    def _fate(self, timeout: float) -> Fate:
        fate = Fate(f"call-{len(self.fates)}", timeout)
        self.fates.append(fate)
        self._by_text[fate.text] = fate
        return fate

    def _noted(self) -> Strategy:
        """What is used without a word, and what it chooses."""
        inner = least_busy_of_two()

        def choose(candidates: Sequence[Candidate], call: Call) -> Candidate:
            chosen = inner(candidates, call)
            fate = self._by_text[call.metadata["call"]]
            fate.chosen.append((chosen.node.id, time.monotonic()))
            return chosen

        return choose

    def _ended(self) -> int:
        return sum(fate.ended for fate in self.fates)

    async def _end(self) -> None:
        for task in tuple(self._calls):
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)
