"""One measurement: a fresh process, or pair of them, and the Point that comes out of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from bench.load import GREETING, NAME, Job, Point, cpu_seconds
from bench.processes import SERVER_CORE, free_port, output, running, start, wait_for
from bench.programs import Programs
from bench.rows import IMPORTS, PEERS, PICKED, Load

#: Of what is measured, thrown away before: caches fill, tasks and connections are made.
WARM_UP = 0.4

_SCRIPT = Path(__file__).with_name("wrk.lua")
_BODY = json.dumps({"name": NAME}).encode()
_REQUEST = (
    b"POST /Helloworld/Call HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One competitor, in every round; ``seconds`` is how long it is measured each time."""

    programs: Programs
    load: Load
    peer: str
    seconds: float

    def measure(self) -> Point:
        """By fresh processes.

        Raises:
            AssertionError: a reply is wrong.
            RuntimeError, subprocess.SubprocessError: a process failed, and said why on stderr.
        """
        kinds = {
            "import": self._import,
            "start": self._start,
            "wrk": self._wrk,
            "pick": self._pick,
        }
        return kinds.get(self.load.kind, self._client)()

    def _client(self) -> Point:
        port = free_port()
        with running(self._command("serve", port)) as server:
            wait_for(server, port)
            job = Job(
                kind=self.load.kind,
                port=port,
                server_pid=server.pid,
                callers=self.load.callers,
                warm_up=WARM_UP * self.seconds,
                seconds=self.seconds,
                options=PEERS[self.peer].options,
            )
            printed = output(self._command("call", json.dumps(vars(job))))
        point: Point = json.loads(printed)
        return point

    def _wrk(self) -> Point:
        """Calls that wrk sends; it measures in whole seconds, and checks each reply."""
        port = free_port()
        wrk = [str(self.programs.wrk), "-t1", f"-c{self.load.callers}", "-s", str(_SCRIPT)]
        with running(self._command("serve", port)) as server:
            wait_for(server, port)
            url = f"http://127.0.0.1:{port}/"
            output([*wrk, "-d1s", url])
            before = cpu_seconds(server.pid)
            printed = output([*wrk, f"-d{max(1, round(self.seconds))}s", url])
            spent = cpu_seconds(server.pid) - before
        told: Point = json.loads(printed.partition(b"JSON ")[2])
        calls, failed = told.pop("calls"), told.pop("failed")
        if failed or not calls:
            raise AssertionError(f"{failed} of {calls} replies are wrong")
        rate = {"calls_per_s": calls / told.pop("seconds"), "server_us": spent / calls * 1e6}
        return rate | told

    def _import(self) -> Point:
        """From the start of a process to its exit."""
        began = time.perf_counter()
        process = start([sys.executable, "-c", IMPORTS[self.peer]], SERVER_CORE)
        _, status, usage = os.wait4(process.pid, 0)
        took = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        return {"wall_ms": took * 1e3, "cpu_ms": (usage.ru_utime + usage.ru_stime) * 1e3}

    def _start(self) -> Point:
        """From the start of a process to its first answer."""
        port = free_port()
        began = time.perf_counter()
        with running(self._command("serve", port)) as process:
            answer = wait_for(process, port, _REQUEST)
            took = time.perf_counter() - began
            cpu = cpu_seconds(process.pid)
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " not in head[:16] or json.loads(body) != {"message": GREETING}:
            raise AssertionError(f"{self.peer} answered {answer!r}")
        return {"wall_ms": took * 1e3, "cpu_ms": cpu * 1e3}

    def _pick(self) -> Point:
        """In one process, without a call."""
        command = [sys.executable, "-m", "bench.pick", PICKED[self.peer], str(self.seconds)]
        point: Point = json.loads(output(command))
        return point

    def _command(self, *more: object) -> list[str]:
        return self.programs.command(PEERS[self.peer], *more)
