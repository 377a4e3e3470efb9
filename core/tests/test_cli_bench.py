"""``micro bench``: what it counts, what it measures, and what it prints."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro
from micro.cli import main
from micro.cli._load import SECOND, Histogram, Load
from micro.cli._output import Exit
from micro.cli._report import Report, Uncounted, report, show, time_text
from micro.routes import Counts
from micro.testing import serving

MICRO = str(Path(sys.executable).with_name("micro"))
#: Seconds that any one step may take.
PATIENCE = 40
SERVICE = """
import asyncio
import micro

class Counted:
    def __init__(self):
        self.calls = self.running = self.most = 0

    async def call(self, seconds: float = 0.0) -> None:
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(seconds)
        self.running -= 1

    async def seldom(self) -> None:
        self.calls += 1
        if self.calls % 5 == 0:
            raise micro.Aborted("one in five")
        if self.calls % 7 == 0:
            raise micro.NotFound("one in seven")

    async def wait(self) -> None:
        self.calls += 1
        await asyncio.Event().wait()

    async def refuse(self) -> None:
        raise micro.Aborted("always")

    async def length(self, text: str) -> int:
        return len(text) if micro.context().metadata["tenant"] == "a" else -1

    async def so_far(self, end: bool = False) -> dict[str, int]:
        told = {"calls": self.calls, "most": self.most}
        if end:
            self.calls = self.most = 0
        return told

service = micro.Service("counted")
service.handle(Counted())
service.run()
"""


@pytest.fixture(scope="module")
def registry() -> str:
    return f"mdns:///bench-{uuid.uuid4().hex[:12]}?timeout=500ms"


@pytest.fixture(scope="module")
def address(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """That of the service ``counted``, in a process of its own."""
    script = tmp_path_factory.mktemp("service") / "counted.py"
    script.write_text(SERVICE)
    with subprocess.Popen(
        [sys.executable, str(script), "--registry", registry],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        watchdog.cancel()
        yield line.partition("serving at ")[2].partition(",")[0]
        process.kill()


class Served:
    """What the service has counted."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.since()

    def until_now(self, *, end: bool = False) -> dict[str, int]:
        words = ("Counted.SoFar", json.dumps({"end": end}), "--address", self._address)
        told: dict[str, int] = json.loads(run("call", "counted", *words).stdout)
        return told

    def since(self) -> dict[str, int]:
        """What it has counted since the last time that this was asked."""
        return self.until_now(end=True)


@pytest.fixture
def served(address: str) -> Served:
    return Served(address)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, registry: str, address: str) -> None:
    monkeypatch.setenv("MICRO_REGISTRY", registry)


def run(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MICRO, *words],
        input=given,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def bench(*words: str, status: int = Exit.OK) -> dict[str, Any]:
    """What ``micro bench counted ... --json`` tells."""
    done = run("bench", "counted", *words, "--json")
    assert (done.returncode, done.stderr) == (status, ""), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def made(told: dict[str, Any]) -> int:
    """The calls that a report says were made."""
    before = told["warm_up"]
    return sum(one["calls"] + one["unfinished"] for one in (told, before))


def check_sums(told: dict[str, Any]) -> None:
    assert told["calls"] == told["succeeded"] + told["failed"]
    assert told["succeeded"] == sum(row["calls"] for row in told["histogram"])
    assert told["failed"] == sum(one["calls"] for one in told["errors"])


# -- counts ------------------------------------------------------------------------------------


def test_counts_are_those_of_the_service(served: Served) -> None:
    told = bench("Counted.Call", "-c", "8", "-d", "1s")
    check_sums(told)
    assert (told["failed"], told["errors"], told["unfinished"]) == (0, [], 0)
    assert served.since() == {"calls": made(told), "most": 8}
    assert told["warm_up"]["calls"] >= 1


def test_calls_per_second_are_those_of_the_time_that_was_measured() -> None:
    told = bench("Counted.Call", '{"seconds": 0.02}', "-c", "4", "-d", "1s")
    assert told["seconds"] == 1
    assert abs(told["calls_per_second"] - told["calls"]) <= 2 * 4
    assert 0 < told["calls_per_second"] <= 4 / 0.02


def test_errors_are_counted_by_their_kind_and_make_the_status_1(served: Served) -> None:
    told = bench("Counted.Seldom", "-c", "4", "-d", "500ms", status=Exit.ERROR)
    check_sums(told)
    kinds = {one["kind"]: one for one in told["errors"]}
    assert kinds.keys() == {"Aborted", "NotFound"}
    assert kinds["Aborted"]["calls"] > kinds["NotFound"]["calls"] > 0
    assert kinds["Aborted"]["detail"] == "counted: one in five"
    assert served.since()["calls"] == made(told)


def test_when_all_calls_fail_there_are_no_times_and_the_status_is_1() -> None:
    told = bench("Counted.Refuse", "-c", "2", "-d", "200ms", status=Exit.ERROR)
    check_sums(told)
    assert (told["succeeded"], told["latency"], told["histogram"]) == (0, None, [])
    assert told["failed"] > 0


def test_calls_that_are_late_are_counted_when_their_timeout_is_over() -> None:
    words = ("Counted.Wait", "-c", "3", "-d", "1s", "--timeout", "300ms")
    told = bench(*words, status=Exit.ERROR)
    check_sums(told)
    (late,) = told["errors"]
    assert late["kind"] == "DeadlineExceeded"
    assert 0.3 <= late["longest"] < 2.3


def test_where_nobody_listens_callers_do_not_storm() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        words = ("Counted.Call", "--address", address, "-c", "4", "-d", "500ms")
        told = bench(*words, status=Exit.ERROR)
    (unreachable,) = told["errors"]
    assert unreachable["kind"] == "Unavailable"
    assert address in unreachable["detail"]
    assert 0 < told["calls"] <= 4 * 0.5 / 0.01


def test_decisions_of_the_client_are_told() -> None:
    told = bench("Counted.Call", "-d", "200ms")
    assert told["client"] == dict.fromkeys(Counts.__struct_fields__, 0)


# -- a call is as micro call makes it ----------------------------------------------------------


def test_request_metadata_and_address_are_those_of_a_call(tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text('{"text": "abc"}')
    words = ["Counted.Length", "-m", "tenant=a", "-d", "200ms", "-c", "2"]
    assert bench(*words[:1], f"@{file}", *words[1:])["failed"] == 0
    nodes = json.loads(run("describe", "counted", "--json").stdout)["nodes"]
    words += ["--address", nodes[0]["address"], "--registry", "memory", "--content-type", "msgpack"]
    assert bench(*words[:1], '{"text": "abc"}', *words[1:])["failed"] == 0
    done = run("bench", "counted", *words[:1], "-", *words[1:], "--json", given='{"text": "abc"}')
    assert json.loads(done.stdout)["failed"] == 0


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["counte", "Counted.Call"], Exit.NOT_FOUND, "ServiceNotFound: service 'counte' is not"),
        (["counted", "Counted.Cal"], Exit.NOT_FOUND, "EndpointNotFound: counted: there is no"),
        (["counted", "/"], Exit.USAGE, "InvalidArgument: endpoint '/': write Handler.Method"),
        (["counted", "Counted.Call", "{"], Exit.USAGE, "UsageError: the JSON argument is not JSON"),
    ],
)
def test_what_no_call_can_reach_is_an_error_at_once(
    words: list[str], status: int, text: str
) -> None:
    began = time.monotonic()
    done = run("bench", *words, "-d", "1m")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"error: {text}")
    assert time.monotonic() - began < PATIENCE / 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-c", "0"], "'--callers' / '-c': 0 is not in the range"),
        (["-c", "some"], "'some' is not a valid integer"),
        (["-d", "0s"], "--duration: '0s' is not more than 0"),
        (["-d", "soon"], "--duration: 'soon' is not a duration"),
        (["--rate", "0"], "--rate: 0 is not from 0.001"),
        (["--rate", "nan"], "--rate: nan is not from 0.001"),
    ],
)
def test_an_option_out_of_range_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert main(["bench", "counted", "Counted.Call", *words]) == Exit.USAGE
    assert text in capsys.readouterr().err


# -- a rate ------------------------------------------------------------------------------------


def test_a_rate_is_kept_to_the_call(served: Served) -> None:
    told = bench("Counted.Call", "-c", "16", "-d", "1s", "--rate", "200")
    check_sums(told)
    assert (told["calls"], told["missed"], told["rate"]) == (200, 0, 200)
    assert made(told) == 200 + 20 + 1  # those of the warm-up, and the very first
    assert served.since()["calls"] == made(told)


def test_a_rate_that_is_not_reached_is_said_and_no_more_than_the_callers_run(
    served: Served,
) -> None:
    words = ("Counted.Call", '{"seconds": 0.1}', "-c", "3", "-d", "1s", "--rate", "100")
    told = bench(*words)
    assert told["missed"] > 40
    assert told["missed"] + told["calls"] == 100
    assert served.since()["most"] == 3
    done = run("bench", "counted", *words)
    assert "The rate was NOT reached: of 100 calls due " in done.stdout
    assert "more callers (-c)" in done.stdout


class Stalling:
    """Answers at once, but for one stall in which all calls wait."""

    def __init__(self, stall: float) -> None:
        self.calls = 0
        self.until = 0.0
        self.stall = stall

    async def call(self) -> None:
        self.calls += 1
        if self.calls == 100:
            self.until = time.monotonic() + self.stall
        await asyncio.sleep(max(self.until - time.monotonic(), 0))


async def load_on_stall(stall: float, *, callers: int, rate: float | None) -> Load:
    service = micro.Service("stalling")
    service.handle(Stalling(stall))
    async with serving(service) as client:
        load = Load(
            lambda: client.call("stalling", "Stalling.Call"),
            callers=callers,
            seconds=1.0,
            rate=rate,
        )
        await load.run()
    return load


@pytest.mark.asyncio
@pytest.mark.parametrize("callers", [1, 8])
async def test_calls_that_a_stall_kept_from_beginning_count_as_late(callers: int) -> None:
    """Coordinated omission: of 200 calls 80 were due in the 0.4 s that the service stalled."""
    load = await load_on_stall(0.4, callers=callers, rate=200)
    assert load.measured.succeeded == 200
    (p90,) = load.measured.latencies.percentiles(0.9)
    assert p90 > 0.2
    waited = await load_on_stall(0.4, callers=callers, rate=None)
    (p90,) = waited.measured.latencies.percentiles(0.9)
    assert p90 < 0.2  # what a load without a rate sees: a single slow call of each caller
    assert waited.measured.latencies.largest >= 0.4 * SECOND


@pytest.mark.asyncio
async def test_calls_begin_when_they_are_due() -> None:
    begun: list[float] = []

    async def call() -> None:
        begun.append(time.monotonic())

    load = Load(call, callers=4, seconds=1.0, rate=50)
    began = time.monotonic()
    await load.run()
    assert len(begun) == 50
    assert all(moment - began >= number / 50 for number, moment in enumerate(begun))
    (p50,) = load.measured.latencies.percentiles(0.5)
    assert p50 < 0.02  # on a machine that is busy; alone it is some microseconds


@pytest.mark.asyncio
async def test_time_is_measured_to_its_end_although_no_call_is_due_any_more() -> None:
    load = Load(lambda: asyncio.sleep(0), callers=3, seconds=0.9, rate=5)
    await load.run()
    assert (load.measured.succeeded, load.seconds) == (5, 0.9)


@pytest.mark.asyncio
async def test_what_the_warm_up_has_left_undone_is_no_load_of_the_rest() -> None:
    load = Load(lambda: asyncio.sleep(0.05), callers=1, seconds=0.5, warm_up=0.5, rate=200)
    await load.run()
    assert load.measured.succeeded + load.missed == 100
    assert load.measured.succeeded > 3
    assert load.measured.latencies.smallest < 0.3 * SECOND


@pytest.mark.asyncio
async def test_calls_that_fail_at_once_give_others_a_turn() -> None:
    async def call() -> None:
        raise micro.Unavailable("not sent", sent=False)

    for rate in (None, 1_000_000.0):
        load = Load(call, callers=4, seconds=60.0, rate=rate)
        stop = asyncio.get_running_loop().call_later(0.1, load.stop)
        async with asyncio.timeout(PATIENCE):
            await load.run()
        stop.cancel()
        assert load.interrupted
        assert load.measured.failed > 0


# -- an end before the end ---------------------------------------------------------------------


def interrupted(served: Served, *words: str, after: int) -> tuple[int, str, str]:
    """What a bench of calls that take 0.2 s leaves when it is interrupted after so many."""
    pipe = subprocess.PIPE
    command = [MICRO, "bench", "counted", "Counted.Call", '{"seconds": 0.2}', "-c", "5", *words]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while served.until_now()["calls"] < after:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_an_interrupt_ends_it_early_and_it_still_reports(served: Served) -> None:
    status, out, err = interrupted(served, "-d", "1m", "--json", after=50)
    told = json.loads(out)
    assert (status, err) == (Exit.INTERRUPTED, "")
    assert told["interrupted"]
    assert told["calls"] > 0
    assert 0 < told["seconds"] < PATIENCE
    assert told["unfinished"] == 5
    check_sums(told)
    assert served.since()["calls"] == made(told)


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [None, 100.0])
async def test_an_end_in_the_warm_up_tells_that_nothing_was_measured(
    capsys: pytest.CaptureFixture[str], rate: float | None
) -> None:
    load = Load(lambda: asyncio.sleep(0.01), callers=2, seconds=60, warm_up=60, rate=rate)
    asyncio.get_running_loop().call_later(0.2, load.stop)
    await load.run()
    told = report(load, "a", "B.C", Counts())
    assert told.warm_up.calls > 0
    assert (told.seconds, told.calls, told.missed, told.calls_per_second) == (0, 0, 0, 0)
    assert (told.latency, told.status) == (None, Exit.INTERRUPTED)
    show(told)
    shown = capsys.readouterr().out
    assert "Interrupted" in shown
    assert "NOT reached" not in shown


def test_calls_that_run_when_the_time_is_over_are_waited_for(served: Served) -> None:
    """The warm-up is over after 0.1 s, the time after 1.1 s, the second round after 1.4 s."""
    told = bench("Counted.Call", '{"seconds": 0.7}', "-c", "5", "-d", "1s")
    assert (told["calls"], told["unfinished"]) == (5, 0)
    assert served.since()["calls"] == made(told)


# -- percentiles -------------------------------------------------------------------------------

times = st.lists(st.integers(0, 1 << 44) | st.integers(0, 5000), min_size=1)


def histogram(*nanoseconds: int) -> Histogram:
    made = Histogram()
    for one in nanoseconds:
        made.add(one)
    return made


@given(times, st.floats(0, 1))
def test_percentile_is_that_of_the_sorted_times_or_up_to_a_128th_more(
    nanoseconds: list[int], share: float
) -> None:
    rank = max(math.ceil(round(share * len(nanoseconds), 6)), 1)
    exact = sorted(nanoseconds)[rank - 1]
    (told,) = histogram(*nanoseconds).percentiles(share)
    assert exact <= told * SECOND * (1 + 1e-12)
    assert told * SECOND <= exact * (1 + 1 / 128) * (1 + 1e-12)


@given(times)
def test_rows_have_every_time_once_below_their_end(nanoseconds: list[int]) -> None:
    rows = histogram(*nanoseconds).rows()
    ends = [end for end, _ in rows]
    assert ends == sorted(set(ends))
    assert len(rows) <= 16
    assert rows[0][1] > 0 < rows[-1][1]
    assert sum(count for _, count in rows) == len(nanoseconds)
    for number, end in enumerate(ends, 1):
        told = sum(count for _, count in rows[:number])
        surely = sum(one * (1 + 1 / 128) <= end * SECOND for one in nanoseconds)
        assert surely <= told <= sum(one <= end * SECOND for one in nanoseconds)


def test_histogram_takes_any_time_and_does_not_grow() -> None:
    found = Histogram()
    size = len(found._buckets)
    for power in range(64):
        found.add(1 << power)
    assert len(found._buckets) == size < 5_000
    assert (found.count, found.largest) == (64, 1 << 63)


def test_percentiles_of_a_known_mix() -> None:
    found = histogram(*[100_000] * 90, *[1_000_000] * 9, 50_000_000).percentiles(0.9, 0.99, 1.0)
    exact = [0.0001, 0.001, 0.05]
    assert all(one <= told <= one * 1.008 for one, told in zip(exact, found, strict=True))


# -- what is printed ---------------------------------------------------------------------------


def test_report_for_people_has_counts_percentiles_bars_and_errors() -> None:
    done = run("bench", "counted", "Counted.Seldom", "-c", "4", "-d", "300ms")
    assert (done.returncode, done.stderr) == (Exit.ERROR, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    firsts = [line[0] for line in lines if line]
    for name in ("calls", "failed", "calls/s", "min", "p50", "p90", "p99", "p99.9", "max"):
        assert firsts.count(name) == 1, name
    bars = [line for line in lines if line[:2] == ["up", "to"]]
    assert max(len(line[-1]) for line in bars) == 40
    assert all(set(line[-1]) == {"#"} for line in bars if line[4] != "0")
    assert ["FAILED", "LONGEST", "ERROR", "THE", "FIRST", "SAID"] in lines
    assert "counted: one in five" in done.stdout
    assert "The times are those of the calls that succeeded." in done.stdout


def test_progress_is_nowhere_where_there_is_no_terminal() -> None:
    for words in ((), ("--json",)):
        done = run("bench", "counted", "Counted.Call", "-c", "2", "-d", "700ms", *words)
        assert done.stderr == ""
        assert "\r" not in done.stdout
        assert "\x1b" not in done.stdout
        assert " of 0.7 s" not in done.stdout


def on_terminal(*words: str) -> str:
    """What a terminal gets to show."""
    primary, secondary = pty.openpty()
    shown = b""
    try:
        with subprocess.Popen([MICRO, *words], stdout=secondary, stderr=secondary) as process:
            os.close(secondary)
            while True:
                try:
                    shown += os.read(primary, 65536)
                except OSError:  # the process has closed it
                    break
            assert process.wait(PATIENCE) == 0
    finally:
        os.close(primary)
    return shown.decode().replace("\r\n", "\n")


def test_progress_is_one_line_on_a_terminal_and_leaves_nothing() -> None:
    words = ("bench", "counted", "Counted.Call", '{"seconds": 0.01}', "-c", "2", "-d", "1600ms")
    moving, _, rest = on_terminal(*words).rpartition("\r")
    looks = moving.split("\r")
    assert any(" s of 1.6 s  " in look and "p99" in look for look in looks)
    assert "\n" not in moving
    line = ""
    for look in looks:  # as a terminal writes over what stands there
        line = look + line[len(look) :]
    assert not line.strip()
    assert "Counted.Call: 2 callers" in rest


def test_progress_is_nowhere_for_machines() -> None:
    shown = on_terminal("bench", "counted", "Counted.Call", "-c", "2", "-d", "700ms", "--json")
    assert json.loads(shown)["failed"] == 0
    assert "\r" not in shown


def test_what_a_reader_has_to_know_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    load = Load(lambda: asyncio.sleep(0), callers=1, seconds=1)
    told = report(load, "a", "B.C", Counts(retries=3))
    show(replaced(told, cpu=0.97))
    shown = capsys.readouterr().out
    assert "This process used 97% of a core" in shown
    assert "The client decided: retries 3." in shown
    assert "of the warm-up" not in shown
    show(replaced(told, warm_up=Uncounted(calls=9, failed=2, unfinished=0)))
    assert "Of the 9 calls of the warm-up, which are not counted, 2 failed." in (
        capsys.readouterr().out
    )
    for quiet in ({"cpu": 0.5}, {"cpu": 0.97, "rate": 9.0}):  # who waits for a rate is not busy
        show(replaced(told, **quiet))
        assert "of a core" not in capsys.readouterr().out


def replaced(told: Report, **fields: Any) -> Report:
    return msgspec.structs.replace(told, **fields)


@pytest.mark.asyncio
async def test_the_share_of_a_core_is_that_of_this_process() -> None:
    async def burn() -> None:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass

    busy = Load(burn, callers=1, seconds=0.5)
    await busy.run()
    idle = Load(lambda: asyncio.sleep(0.01), callers=1, seconds=0.5)
    await idle.run()
    assert 1.1 >= busy.cpu > 2 * idle.cpu


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"),
        (0.000_000_4, "0.4 us"),
        (0.000_213, "213 us"),
        (0.000_999_6, "1 ms"),
        (0.001_234, "1.23 ms"),
        (0.099_97, "100 ms"),
        (0.9996, "1 s"),
        (12.34, "12.3 s"),
        (4321.0, "4,321 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
