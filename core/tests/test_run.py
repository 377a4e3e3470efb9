"""``service.run()`` as the program it is: flags, signals, exit codes, and a drain under load."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import micro
from micro.settings import Settings
from micro.testing import eventually

PROGRAM = """
import asyncio, sys, time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
import micro

class Work:
    def __init__(self) -> None:
        self.begun = self.ended = 0

    async def do(self, seconds: float) -> str:
        self.begun += 1
        await asyncio.sleep(seconds)
        self.ended += 1
        return service.name

    async def ticks(self, count: int) -> AsyncIterator[int]:
        self.begun += 1
        for number in range(count):
            yield number
            await asyncio.sleep(0.02)
        self.ended += 1

    def block(self, seconds: float) -> None:
        time.sleep(seconds)

    async def stubborn(self) -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

@asynccontextmanager
async def lifespan(service):
    yield
    pass

work = Work()
service = micro.Service(sys.argv.pop(1), lifespan=lifespan)
service.handle(work)
service.run()
"""


class Program:
    """One running process of the program above, or of another."""

    source = PROGRAM

    def __init__(self, folder: Path, name: str, *flags: str, **environment: str) -> None:
        script = folder / "program.py"
        script.write_text(self.source)
        self.log = folder / f"{uuid.uuid4().hex}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script), name, *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    async def serving(self) -> str:
        """Wait until it serves; its address."""
        await eventually(
            lambda: "serving at" in self.text or self.process.poll() is not None, within=20
        )
        assert self.process.poll() is None, self.text
        return self.text.split("serving at ")[1].split(",")[0]

    async def exited(self, within: float) -> int:
        await eventually(lambda: self.process.poll() is not None, within=within)
        return self.process.returncode


class Counting(Program):
    """It tells at its end how many streams there were."""

    source = PROGRAM + 'print("begun", work.begun, "ended", work.ended)\n'


class Lingering(Program):
    """Its lifespan does not end."""

    source = PROGRAM.replace("    yield\n    pass", "    yield\n    await asyncio.Event().wait()")


class NeverReady(Program):
    """Its check says no."""

    source = PROGRAM.replace("lifespan=lifespan", "ready_check=lambda: False")


Start = Callable[..., Program]


@pytest.fixture
def name() -> str:
    return f"run-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Program] = []

    def launch(
        name: str, *flags: str, kind: type[Program] = Program, **environment: str
    ) -> Program:
        started.append(kind(tmp_path, name, *flags, **environment))
        return started[-1]

    yield launch
    for program in started:
        program.process.kill()
        program.process.wait(10)


@asynccontextmanager
async def client() -> AsyncIterator[micro.Client]:
    async with micro.Service("caller").opened(Settings(environment={})) as service:
        yield service.client


@pytest.mark.asyncio
async def test_another_process_finds_and_calls_it_with_nothing_set(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        assert await caller.call(name, "Work.Do", {"seconds": 0}) == name
    assert "Traceback" not in program.text


@pytest.mark.asyncio
async def test_flags_choose_name_address_and_id(start: Start, name: str) -> None:
    flags = ("--server_name", f"{name}-x", "--server-address=127.0.0.1:0", "--server-id", "one")
    await start(name, *flags, MICRO_SERVER_NAME="weaker").serving()
    async with client() as caller, caller.watch(f"{name}-x") as watch:
        await eventually(lambda: [node.id for node in watch.nodes] == ["one"])


@pytest.mark.asyncio
async def test_sigterm_ends_with_status_0_and_is_seen_at_once(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller, caller.watch(name) as watch:
        assert watch.nodes
        program.process.send_signal(signal.SIGTERM)
        await eventually(lambda: not watch.nodes, within=2.0 + 2.0)
    assert await program.exited(10) == 0
    assert "stopped" in program.text


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_call_in_flight_ends_before_the_process_does(
    start: Start, name: str, number: signal.Signals
) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        calling = asyncio.create_task(caller.call(name, "Work.Do", {"seconds": 3}))
        await caller.call(name, "Work.Do", {"seconds": 0})
        program.process.send_signal(number)
        assert await calling == name
    assert await program.exited(10) == 0


@pytest.mark.asyncio
async def test_second_signal_stops_at_once(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        calling = asyncio.create_task(caller.call(name, "Work.Do", {"seconds": 4}, timeout=8))
        await caller.call(name, "Work.Do", {"seconds": 0})
        program.process.send_signal(signal.SIGTERM)
        await eventually(lambda: "again to force" in program.text)
        program.process.send_signal(signal.SIGTERM)
        assert await program.exited(1 + 2.0) == 128 + signal.SIGTERM
        with pytest.raises(micro.Unavailable):
            await calling


@pytest.mark.asyncio
async def test_handler_that_ignores_its_cancellation_does_not_hold_the_process(
    start: Start, name: str
) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        await caller.call(name, "Work.Do", {"seconds": 0})  # from now on the node is known
        with pytest.raises(micro.DeadlineExceeded):
            await caller.call(name, "Work.Stubborn", timeout=0.5)
        program.process.send_signal(signal.SIGTERM)
        assert await program.exited(10 + 2.0) == 1
    assert "ignore their cancellation" in program.text


@pytest.mark.asyncio
async def test_stop_ends_within_10_seconds_whatever_a_handler_does(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        calling = asyncio.create_task(caller.call(name, "Work.Stubborn", timeout=30))
        await caller.call(name, "Work.Do", {"seconds": 0})
        program.process.send_signal(signal.SIGTERM)
        assert await program.exited(10 + 2.0) == 1
        with pytest.raises(micro.Unavailable):
            await calling


@pytest.mark.asyncio
async def test_function_in_a_thread_does_not_hold_the_process(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        await caller.call(name, "Work.Do", {"seconds": 0})
        with pytest.raises(micro.DeadlineExceeded):
            await caller.call(name, "Work.Block", {"seconds": 40}, timeout=0.5)
        program.process.send_signal(signal.SIGTERM)
        assert await program.exited(3 + 2.0) == 1
    assert "functions that still run in threads" in program.text


@pytest.mark.asyncio
async def test_lifespan_that_does_not_end_does_not_hold_the_process(
    start: Start, name: str
) -> None:
    program = start(name, kind=Lingering)
    await program.serving()
    program.process.send_signal(signal.SIGTERM)
    assert await program.exited(10 + 2.0) == 1
    assert "not stopped after 9.5 s" in program.text


@pytest.mark.asyncio
async def test_stop_of_what_was_never_ready_is_quick_and_in_peace(start: Start, name: str) -> None:
    program = start(name, kind=NeverReady)
    await program.serving()
    program.process.send_signal(signal.SIGTERM)
    assert await program.exited(1 + 2.0) == 0
    assert "registers when it is ready; now ready_check says no" in program.text


@pytest.mark.asyncio
async def test_stream_that_has_no_end_is_told_of_the_stop(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    got = 0
    async with client() as caller:
        began = 0.0
        with pytest.raises(micro.Unavailable, match="the server stopped"):
            async with caller.stream(name, "Work.Ticks", {"count": 10**9}) as replies:
                async for _ in replies:
                    got += 1
                    if got == 5:
                        program.process.send_signal(signal.SIGTERM)
                        began = time.monotonic()
        assert 6 < time.monotonic() - began < 10 + 2.0, "it has the time that calls have"
    assert await program.exited(2 + 2.0) == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", ["tcp", "http"])
async def test_sigterm_under_load_cuts_no_stream_and_new_ones_open_elsewhere(
    start: Start, name: str, transport: str
) -> None:
    flags = ("--transport", transport)
    stays, goes = (start(name, *flags, kind=Counting) for _ in range(2))
    await asyncio.gather(stays.serving(), goes.serving())
    done = 0

    async def load(caller: micro.Client, until: asyncio.Event) -> None:
        nonlocal done
        while not until.is_set():
            async with caller.stream(name, "Work.Ticks", {"count": 20}) as replies:
                assert [number async for number in replies] == list(range(20))
            done += 1

    async with client() as caller, caller.watch(name) as watch:
        await eventually(lambda: len(watch.nodes) == 2, within=10)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(16):
                tasks.create_task(load(caller, stop))
            await eventually(lambda: done > 50, within=20)
            before = done
            goes.process.send_signal(signal.SIGTERM)
            assert await goes.exited(10) == 0
            assert done > before + 20, "too little traffic during the stop to prove anything"
            stop.set()
    stays.process.send_signal(signal.SIGTERM)
    assert await stays.exited(10) == 0
    numbers = [re.findall(r"begun (\d+) ended (\d+)", one.text)[0] for one in (stays, goes)]
    assert all(begun == ended for begun, ended in numbers), numbers
    assert sum(int(ended) for _, ended in numbers) == done, "each was executed once"
    assert int(numbers[1][1]) > 10


@pytest.mark.asyncio
async def test_sigterm_under_load_fails_no_call(start: Start, name: str) -> None:
    """Two nodes, one told to stop while both are called: no call is cut, none fails."""
    stays, goes = start(name), start(name)
    await asyncio.gather(stays.serving(), goes.serving())
    failed: list[BaseException] = []
    done = 0

    async def load(caller: micro.Client, until: asyncio.Event) -> None:
        nonlocal done
        while not until.is_set():
            try:
                await caller.call(name, "Work.Do", {"seconds": 0.01})
            except micro.MicroError as exc:
                failed.append(exc)
            done += 1

    async with client() as caller, caller.watch(name) as watch:
        await eventually(lambda: len(watch.nodes) == 2, within=10)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(16):
                tasks.create_task(load(caller, stop))
            await eventually(lambda: done > 500, within=20)
            before = done
            goes.process.send_signal(signal.SIGTERM)
            assert await goes.exited(10) == 0
            assert done > before + 200, "too little traffic during the stop to prove anything"
            stop.set()
        assert len(watch.nodes) == 1
    assert failed == []


@pytest.mark.asyncio
async def test_restarted_service_is_called_again(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    async with client() as caller:
        assert await caller.call(name, "Work.Do", {"seconds": 0}) == name
        program.process.send_signal(signal.SIGTERM)
        await program.exited(10)
        await start(name).serving()

        async def answered() -> bool:
            try:
                return bool(await caller.call(name, "Work.Do", {"seconds": 0}) == name)
            except (micro.ServiceNotFound, micro.Unavailable):
                return False

        await eventually(answered)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("flags", "status", "text"),
    [
        (["--registri", "memory"], 2, "unknown argument '--registri'; did you mean '--registry'?"),
        (["--registry"], 2, "--registry needs a value"),
        (["--registry", "ectd://x"], 2, "--registry: no registry has the scheme 'ectd'"),
        (["--register_ttl", "soon"], 2, "--register_ttl"),
        (["--log_level", "loud"], 2, "--log_level: log level 'loud'"),
        (["--server_address", "0.0.0.0:0"], 2, "--server_insecure"),
        (["--help"], 0, "--register_interval"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_wrong_flag_ends_with_its_status_and_a_text(
    start: Start, name: str, flags: list[str], status: int, text: str
) -> None:
    program = start(name, *flags)
    assert await program.exited(20) == status
    assert text in program.text
    assert "Traceback" not in program.text


@pytest.mark.asyncio
async def test_port_taken_ends_with_status_2_and_names_the_flag(start: Start, name: str) -> None:
    address = await start(name).serving()
    second = start(name, "--server_address", address)
    assert await second.exited(20) == 2
    assert f"--server_address: server_address: cannot listen at {address}" in second.text


@pytest.mark.asyncio
async def test_log_is_one_clear_line_an_event(start: Start, name: str) -> None:
    program = start(name)
    await program.serving()
    program.process.send_signal(signal.SIGTERM)
    await program.exited(10)
    lines = program.text.splitlines()
    assert len(lines) == 3
    assert all(" INFO " in line and "micro.service" in line for line in lines), lines
    assert "\x1b" not in program.text
