"""Runs a conformance suite in a process of its own, and hears what comes of it.

It follows no file, variable or plugin of other tests. A pair of sockets tells it what to do, in one
line, and us what comes of it, in one for each event. When our side ends it is interrupted: so it
ends as it should, however we do.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import click
import msgspec

from micro.errors import Internal
from micro.settings import environment_of_tests

#: Seconds without any news after which a promise counts as one that never ends.
_LONGEST = 300.0
#: Seconds that the process has to take away what it registered, once it was interrupted.
_FAREWELL = 45.0
#: Seconds that it has to end, once it has nothing more to tell.
_LAST_WAIT = 10.0
_Heard: TypeAlias = Literal["all", "until stuck", "until interrupted"]
#: What pytest exits with.
_USAGE, _NOTHING = 4, 5
_SETTINGS = "[pytest]\nasyncio_mode = strict\nasyncio_default_fixture_loop_scope = function\n"


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to do: the suite of registries with the backend of ``url``.

    That is a namespace of this run's own, and so is ``inner_url``. ``examples`` and ``steps`` are
    for the comparison with the model.
    """

    url: str
    inner_url: str
    seed: int
    examples: int
    steps: int


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The tests were counted, one begins, one has ended, or all is swept.

    ``outcome`` is passed, failed or skipped, ``why`` in a line or few and ``text`` in full;
    ``left`` says what could not be taken away.
    """

    event: str
    promise: str = ""
    count: int = 0
    outcome: str = ""
    why: str = ""
    text: str = ""
    seconds: float = 0.0
    features: str = ""
    left: tuple[str, ...] = ()


def run(task: Task, only: str, hear: Callable[[Event], None]) -> bool:
    """Run the promises that match ``only``; False when it was interrupted.

    Raises:
        click.UsageError: ``only`` is no expression, or matches nothing.
        Internal: the process failed; the text has the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="micro-verify-") as name:
        folder = Path(name)
        line, other_end = socket.socketpair()
        with line:
            with other_end:
                process = _start(other_end, only, folder)
            try:
                line.sendall(msgspec.json.encode(task) + b"\n")
                heard = _heard(line, hear)
            finally:
                _end(process, line)
        said = (folder / "log").read_text(errors="replace").strip().splitlines() or ["nothing"]
    if process.returncode == _USAGE:
        why = next((line for line in said if line.startswith("ERROR: ")), said[-1])
        raise click.UsageError(f"-k: {why.removeprefix('ERROR: ')}")
    if process.returncode == _NOTHING:
        raise click.UsageError(f"-k: no promise matches {only!r}")
    if heard == "all" and process.returncode not in (0, 1):
        told = " | ".join(said[-5:])
        raise Internal(f"the tests ended with status {process.returncode}, and said: {told}")
    return heard != "until interrupted"


def _start(line: socket.socket, only: str, folder: Path) -> subprocess.Popen[bytes]:
    (folder / "pytest.ini").write_text(_SETTINGS)
    options = {
        "-c": folder / "pytest.ini",
        "--rootdir": folder,
        "--basetemp": folder / "temp",
        "--line": line.fileno(),
        "-k": only,
    }
    command = [
        *(sys.executable, "-P", "-m", "pytest", "--noconftest", "--import-mode=importlib"),
        *("-qq", "--no-header", "--no-summary", "--tb=short"),
        *("-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin", "-p", "micro.testing._verify"),
        *("--pyargs", "micro.testing._verify_cases"),
        *(str(word) for pair in options.items() for word in pair),
    ]
    variables = {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own program, by this interpreter
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_of_tests(**variables),
            pass_fds=[line.fileno()],
            start_new_session=True,  # an interrupt at the terminal is ours to pass on
        )


def _heard(line: socket.socket, hear: Callable[[Event], None]) -> _Heard:
    """Hear all events; when we are interrupted, or a promise never ends, the process has to end.

    How far we heard.
    """
    events, last = _Events(line), Event(event="")
    try:
        for event in events.until_closed(_LONGEST):
            last = event
            hear(event)
        return "all"
    except KeyboardInterrupt:
        click.echo("interrupted; taking away what is registered", err=True)
        heard: _Heard = "until interrupted"
    except TimeoutError:
        why = f"it did not end within {_LONGEST:g} s; what follows it was not tried"
        stuck = msgspec.structs.replace(last, event="ended", outcome="failed", why=why)
        hear(msgspec.structs.replace(stuck, seconds=_LONGEST))
        heard = "until stuck"
    line.shutdown(socket.SHUT_WR)
    with suppress(TimeoutError):
        for event in events.until_closed(_FAREWELL):
            hear(event)
    return heard


class _Events:
    """What comes of it; who was interrupted may go on to read."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._read = b""

    def until_closed(self, within: float) -> Iterator[Event]:
        """All events until the other side is closed.

        Raises:
            TimeoutError: there is none for so many seconds.
        """
        self._line.settimeout(within)
        while True:
            while b"\n" in self._read:
                one, _, self._read = self._read.partition(b"\n")
                yield msgspec.json.decode(one, type=Event)
            more = self._line.recv(65536)
            if not more:
                return
            self._read += more


def _end(process: subprocess.Popen[bytes], line: socket.socket) -> None:
    with suppress(OSError):  # it may have gone
        line.shutdown(socket.SHUT_WR)
    try:
        process.wait(_LAST_WAIT)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
