"""Processes of peers: started on a core of their own, waited for, ended by their id. Linux only."""

from __future__ import annotations

import compileall
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import micro

ROOT = Path(__file__).resolve().parents[1]
#: Seconds that a peer may take to start, or to end.
PATIENCE = 30.0
_POLL = 0.001

CORES = sorted(os.sched_getaffinity(0))
#: A server and its client never share a core, unless there is only one.
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]


def command(module: str, *args: object) -> list[str]:
    """How a module of bench/peers is run."""
    return [sys.executable, "-m", f"bench.peers.{module}", *map(str, args)]


@contextmanager
def running(module: str, *args: object) -> Iterator[subprocess.Popen[bytes]]:
    """A peer's server on the server's core, killed at the end."""
    process = subprocess.Popen(command(module, *args), cwd=ROOT)
    try:
        # Before it has threads, which take this over.
        os.sched_setaffinity(process.pid, {SERVER_CORE})
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


def output(module: str, *args: object) -> bytes:
    """What a peer's client on the client's core prints.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on stderr.
    """
    with subprocess.Popen(command(module, *args), cwd=ROOT, stdout=subprocess.PIPE) as process:
        os.sched_setaffinity(process.pid, {CLIENT_CORE})
        printed, _ = process.communicate(timeout=2 * PATIENCE)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return printed


def keep_to_the_client_s_core() -> None:
    """Leave the server's core to the server."""
    os.sched_setaffinity(0, {CLIENT_CORE})


def compile_ours() -> None:
    """Write bytecode, as installing the peers did; else ours might be compiled at each start."""
    for folder in (Path(micro.__file__).parent, ROOT / "bench"):
        compileall.compile_dir(folder, quiet=1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        assert isinstance(port, int)
        return port


def wait_for(process: subprocess.Popen[bytes], port: int, request: bytes = b"") -> bytes:
    """The answer to ``request`` at ``port``, tried until there is one; without it, a connection.

    Raises:
        RuntimeError: the process ended, or is too slow.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                if not request:
                    return b""
                connection.sendall(request)
                return _until_closed(connection)
        except ConnectionError:
            time.sleep(_POLL)
    raise RuntimeError(f"{process.args!r} does not answer at port {port}")


def _until_closed(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def cpu_seconds(pid: int) -> float:
    """The CPU time of all threads of a process, to the nanosecond."""
    # The clock of another process, as clock_getcpuclockid(3) makes it, which Python has not.
    return time.clock_gettime((~pid << 3) | 2)
