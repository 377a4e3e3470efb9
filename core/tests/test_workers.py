"""``--workers N``: real processes, told apart by what they answer, and ended by their ids."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import micro
from micro.settings import Given, Place, Settings, taken_place, with_place
from micro.testing import eventually
from micro.workers import supervise

from .test_run import Program, client

_SOURCE = """
import asyncio, os, subprocess, sys
from contextlib import asynccontextmanager
import micro

class Work:
    async def do(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    async def stubborn(self) -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    async def exit(self, status: int) -> None:
        os._exit(status)

    async def variables(self) -> list[str]:
        code = "import os; print(*os.environ)"
        return subprocess.check_output([sys.executable, "-c", code], text=True).split()

@asynccontextmanager
async def lifespan(service):
    {lifespan}
    yield

service = micro.Service(sys.argv.pop(1), lifespan=lifespan)
service.handle(Work())
service.run()
"""

_STATUS = re.compile(r"\[(\d+)\]  \S+ serving at (\S+),")


class Workers(Program):
    """A supervisor and its workers."""

    source = _SOURCE.replace("{lifespan}", "pass")

    def serving_lines(self) -> list[tuple[str, str]]:
        """The number and the address of each worker that has served."""
        return _STATUS.findall(self.text)

    async def all_serving(self, count: int = 2) -> None:
        await eventually(
            lambda: len(self.serving_lines()) >= count or self.process.poll() is not None,
            within=30,
        )
        assert self.process.poll() is None, self.text


class FailingAtStart(Workers):
    """Its workers end before they serve."""

    source = _SOURCE.replace("{lifespan}", "sys.exit(7)")


class Slow(Workers):
    """Its workers need long to start."""

    source = _SOURCE.replace("{lifespan}", "print('begun', flush=True); await asyncio.sleep(60)")


class OneFails(Workers):
    """Of its workers the first process that starts dies; who comes later serves."""

    source = _SOURCE.replace(
        "{lifespan}",
        """
    try:
        os.mkdir(os.environ["FIRST"])
    except FileExistsError:
        pass
    else:
        sys.exit(7)""".strip(),
    )


class OnlyTheFirst(Workers):
    """The worker that starts first serves, all others die."""

    source = _SOURCE.replace(
        "{lifespan}",
        """
    try:
        os.mkdir(os.environ["FIRST"])
    except FileExistsError:
        sys.exit(7)""".strip(),
    )


class OneIsWrong(Workers):
    """The worker that starts first finds its settings wrong, the other needs long to start."""

    source = _SOURCE.replace(
        "{lifespan}",
        """
    try:
        os.mkdir(os.environ["FIRST"])
    except FileExistsError:
        await asyncio.sleep(60)
    else:
        raise micro.ConfigError("the wrong planet")""".strip(),
    )


Start = Callable[..., Workers]


@pytest.fixture
def name() -> str:
    return f"workers-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Workers] = []

    def launch(name: str, *flags: str, kind: type[Workers] = Workers, **variables: str) -> Workers:
        started.append(kind(tmp_path, name, *flags, **variables))
        return started[-1]

    yield launch
    for program in started:
        left = children(program.process.pid)
        program.process.kill()
        program.process.wait(10)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def lives(pid: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def pids(caller: micro.Client, name: str, count: int) -> set[int]:
    """The processes that answer, once there are so many."""
    found: set[int] = set()

    async def more() -> bool:
        with suppress(micro.Unavailable, micro.ServiceNotFound):
            found.add(await caller.call(name, "Work.Do", {"seconds": 0.0}, returns=int))
        return len(found) >= count

    await eventually(more, within=15)
    return found


@pytest.mark.asyncio
async def test_each_worker_is_a_process_and_a_node_with_its_own_port_and_id(
    start: Start, name: str
) -> None:
    program = start(name, "--workers", "3")
    await program.all_serving(3)
    async with client() as caller, caller.watch(name) as watch:
        await eventually(lambda: len(watch.nodes) == 3, within=10)
        assert len({node.id for node in watch.nodes}) == 3
        assert len({node.address for node in watch.nodes}) == 3
        found = await pids(caller, name, 3)
    assert found == set(children(program.process.pid)), "the supervisor serves nothing"


@pytest.mark.asyncio
async def test_variable_does_as_the_flag_and_the_log_tells_the_workers_apart(
    start: Start, name: str
) -> None:
    program = start(name, MICRO_WORKERS="2")
    await program.all_serving()
    assert {number for number, _ in program.serving_lines()} == {"1", "2"}
    assert f"micro.service  {name}: starting 2 workers" in program.text


@pytest.mark.asyncio
async def test_one_worker_is_the_program_itself(start: Start, name: str) -> None:
    program = start(name, "--workers=1")
    await program.serving()
    assert children(program.process.pid) == []


@pytest.mark.asyncio
async def test_what_a_worker_starts_is_no_worker(start: Start, name: str) -> None:
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        variables = await caller.call(name, "Work.Variables", returns=list[str])
    assert "PATH" in variables
    assert "MICRO_WORKER" not in variables


# -- the stop ----------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains_all_workers_and_ends_with_status_0(
    start: Start, name: str, number: signal.Signals
) -> None:
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        await pids(caller, name, 2)
        calls = [
            asyncio.create_task(caller.call(name, "Work.Do", {"seconds": 3.0}, returns=int))
            for _ in range(8)
        ]
        await asyncio.sleep(0.5)
        program.process.send_signal(number)
        assert len({await call for call in calls}) == 2
    assert await program.exited(10) == 0, program.text
    assert program.text.count(": stopped\n") == 3


@pytest.mark.asyncio
async def test_signal_to_the_whole_group_is_one_and_cuts_no_call(start: Start, name: str) -> None:
    """As systemd and a terminal send it: to the supervisor and to each worker."""
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        workers = await pids(caller, name, 2)
        calling = asyncio.create_task(caller.call(name, "Work.Do", {"seconds": 3.0}, returns=int))
        await asyncio.sleep(0.5)
        program.process.send_signal(signal.SIGTERM)
        await eventually(lambda: program.text.count("serving 2 s more") == 2)
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        assert await calling in workers
    assert await program.exited(10) == 0, program.text


@pytest.mark.asyncio
async def test_second_signal_ends_all_at_once(start: Start, name: str) -> None:
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        workers = await pids(caller, name, 2)
        calling = asyncio.create_task(caller.call(name, "Work.Do", {"seconds": 9.0}, timeout=12))
        await asyncio.sleep(0.5)
        program.process.send_signal(signal.SIGTERM)
        await eventually(lambda: program.text.count("again to force") == 3)
        program.process.send_signal(signal.SIGTERM)
        assert await program.exited(2 + 2.0) == 128 + signal.SIGTERM
        with pytest.raises(micro.Unavailable, match="the server stopped"):
            await calling
    assert not any(map(lives, workers))


@pytest.mark.asyncio
async def test_signal_while_workers_start_ends_them(start: Start, name: str) -> None:
    program = start(name, "--workers", "2", kind=Slow)
    await eventually(lambda: program.text.count("begun") == 2, within=20)
    workers = children(program.process.pid)
    program.process.send_signal(signal.SIGTERM)
    assert await program.exited(1 + 2.0) == 128 + signal.SIGTERM
    assert len(workers) == 2
    assert not any(map(lives, workers))


@pytest.mark.asyncio
async def test_stop_ends_within_10_seconds_whatever_a_worker_does(start: Start, name: str) -> None:
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        workers = await pids(caller, name, 2)
        calling = asyncio.create_task(caller.call(name, "Work.Stubborn", timeout=30))
        await asyncio.sleep(0.5)
        frozen = min(workers)
        os.kill(frozen, signal.SIGSTOP)  # which of the two had the call does not matter
        program.process.send_signal(signal.SIGTERM)
        assert await program.exited(10 + 2.0) != 0
        with pytest.raises((micro.Unavailable, micro.DataLoss)):
            await calling
    assert not any(map(lives, workers))
    assert f"process {frozen} does not end; killed" in program.text


@pytest.mark.asyncio
async def test_workers_end_when_their_supervisor_is_killed(start: Start, name: str) -> None:
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        workers = await pids(caller, name, 2)
        calling = asyncio.create_task(caller.call(name, "Work.Do", {"seconds": 2.0}, returns=int))
        await asyncio.sleep(0.5)
        program.process.kill()
        assert await calling in workers, "they drain"
    try:
        await eventually(lambda: not any(map(lives, workers)), within=10 + 2.0)
    finally:
        for pid in filter(lives, workers):
            os.kill(pid, signal.SIGKILL)
    assert program.text.count("the supervisor has died") == 2


# -- workers that die --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_worker_that_dies_is_replaced_and_the_log_says_how_it_died(
    start: Start, name: str
) -> None:
    program = start(name, "--workers", "2")
    await program.all_serving()
    async with client() as caller:
        workers = await pids(caller, name, 2)
        gone = min(workers)
        os.kill(gone, signal.SIGKILL)
        await program.all_serving(3)
        assert f"(process {gone}) died of SIGKILL" in program.text
        await eventually(lambda: len(children(program.process.pid)) == 2)
        now = set(children(program.process.pid))
        assert now - workers
        assert max(workers) in now, "the other one goes on"
        with suppress(micro.Unavailable):
            await caller.call(name, "Work.Exit", {"status": 3})
        await program.all_serving(4)
    assert "ended with status 3, unasked" in program.text


@pytest.mark.asyncio
async def test_worker_that_keeps_dying_is_replaced_less_and_less_often(
    start: Start, name: str, tmp_path: Path
) -> None:
    program = start(name, "--workers", "2", kind=OnlyTheFirst, FIRST=str(tmp_path / "first"))
    died = re.compile(r"^(\d+):(\d+):([\d.]+) .* ended with status 7", re.MULTILINE)
    await eventually(lambda: len(died.findall(program.text)) >= 6, within=30)
    at = [3600 * int(h) + 60 * int(m) + float(s) for h, m, s in died.findall(program.text)]
    assert (at[5] - at[4]) % 86400 >= 0.1 * 2**4 * 0.9
    assert len(program.serving_lines()) == 1


@pytest.mark.asyncio
async def test_replacement_that_fails_at_its_start_is_replaced_too(
    start: Start, name: str, tmp_path: Path
) -> None:
    program = start(name, "--workers", "2", kind=OneFails, FIRST=str(tmp_path / "first"))
    await program.all_serving()
    (tmp_path / "first").rmdir()
    async with client() as caller:
        workers = await pids(caller, name, 2)
        os.kill(min(workers), signal.SIGKILL)
        deaths = re.compile(r"worker \d \(process \d+\) ended with status 7")
        before = len(deaths.findall(program.text))
        await eventually(lambda: len(deaths.findall(program.text)) > before, within=15)
        await program.all_serving(3)
        assert len(await pids(caller, name, 2)) == 2


@pytest.mark.asyncio
async def test_one_worker_that_fails_at_the_start_is_tried_again(
    start: Start, name: str, tmp_path: Path
) -> None:
    program = start(name, "--workers", "2", kind=OneFails, FIRST=str(tmp_path / "first"))
    await program.all_serving()
    assert "ended with status 7" in program.text


@pytest.mark.asyncio
async def test_when_none_can_start_it_ends_with_their_status(start: Start, name: str) -> None:
    program = start(name, "--workers", "2", kind=FailingAtStart)
    assert await program.exited(20) == 7
    assert program.text.count("ended with status 7") == 2, "each was tried once"


@pytest.mark.asyncio
async def test_setting_that_only_a_worker_finds_wrong_ends_all_with_status_2(
    start: Start, name: str
) -> None:
    program = start(name, "--workers", "2", "--server_address", "203.0.113.1:0")
    assert await program.exited(20) == 2
    assert "--server_insecure" in program.text
    assert "Traceback" not in program.text


@pytest.mark.asyncio
async def test_setting_that_is_wrong_for_one_ends_the_others_too(
    start: Start, name: str, tmp_path: Path
) -> None:
    program = start(name, "--workers", "2", kind=OneIsWrong, FIRST=str(tmp_path / "first"))
    assert await program.exited(20) == 2
    assert program.text.count("the wrong planet") == 1


# -- what several cannot have --------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--server_id", "one"], "--server_id: server_id one: 2 workers are 2 nodes"),
        (["--server_address", "127.0.0.1:8080"], "write port 0, so that each takes a free one"),
        (["--server_address", "unix:/tmp/x"], "2 workers need 2 ports"),
        (["--server_advertise", "example.org:80"], "2 workers are reached at 2 ports"),
        (["--registry", "ectd://x"], "no registry has the scheme 'ectd'"),
        (["--workers", "0"], "--workers: workers: 0 is not one of 1 to 512"),
        (["--workers", "many"], "--workers: workers: 'many' is no whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
async def test_wrong_setting_is_told_once_and_before_any_worker_starts(
    start: Start, name: str, flags: list[str], text: str
) -> None:
    program = start(name, "--workers", "2", *flags)
    assert await program.exited(20) == 2
    assert program.text.count(text) == 1
    assert "starting" not in program.text
    assert "Traceback" not in program.text


def test_fixed_id_and_port_in_the_code_are_refused_too() -> None:
    class Fixed:
        id = Given("one", "code", 0)
        address = Given("127.0.0.1:0", "default", -1)
        advertise = Given("", "default", -1)

    with pytest.raises(micro.ConfigError, match="code: server_id one"):
        supervise("x", Settings(["--workers", "2"], {}), Fixed())


def test_program_without_a_file_cannot_have_workers() -> None:
    shown = subprocess.run(
        [sys.executable, "-"],
        input="import micro; micro.Service('x').run(['--workers', '2'])",
        text=True,
        capture_output=True,
        check=False,
    )
    assert shown.returncode == 2
    assert "started from a file" in shown.stderr


def test_place_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_WORKER", with_place(Place(2, 7))["MICRO_WORKER"])
    assert taken_place() == Place(2, 7)
    assert taken_place() is None


def test_place_set_by_hand_is_told_to_be_the_wrong_variable(
    start: Start, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICRO_WORKER", "4")
    with pytest.raises(micro.ConfigError, match="use MICRO_WORKERS=N"):
        taken_place()


@pytest.mark.asyncio
async def test_place_without_a_supervisor_is_told(start: Start, name: str) -> None:
    with socket.socket() as closed:
        line = closed.fileno()
    program = start(name, MICRO_WORKER=f"1/{line}")
    assert await program.exited(20) == 2
    assert "worker 1: no supervisor" in program.text
