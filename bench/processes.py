"""Processes of peers: started on a core of their own, waited for, ended by their id. Linux only."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Seconds that a peer may take to start, or to end; a client has twice as long.
PATIENCE = 30.0
_POLL = 0.001

CORES = sorted(os.sched_getaffinity(0))
#: A server and its client never share a core, unless there is only one.
SERVER_CORE, CLIENT_CORE = CORES[0], CORES[-1]


def environment() -> dict[str, str]:
    """For peers: no setting of ours, and Go keeps to the one core."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MICRO_")}
    return kept | {"GOMAXPROCS": "1"}


def start(command: Sequence[str], core: int, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """A process on one core."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=stdout)
    # Before it has threads, which take this over.
    os.sched_setaffinity(process.pid, {core})
    return process


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server on the server's core, killed at the end."""
    process = start(command, SERVER_CORE, stdout=sys.stderr.fileno())
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


def output(command: Sequence[str]) -> bytes:
    """What a client on the client's core prints.

    Raises:
        subprocess.SubprocessError: it failed, and said why on stderr, or it takes too long.
    """
    with start(command, CLIENT_CORE, stdout=subprocess.PIPE) as process:
        try:
            printed, _ = process.communicate(timeout=2 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return printed


def prepare(pythons: Sequence[str], folders: Sequence[Path]) -> None:
    """Leave the server's core to servers; let there be files enough; write bytecode.

    Installing the peers wrote theirs; ours might be compiled at each start.
    """
    os.sched_setaffinity(0, {CLIENT_CORE})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for python in pythons:
        subprocess.run([python, "-m", "compileall", "-q", *folders], check=True)


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
