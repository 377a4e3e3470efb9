"""Unmodified Go Micro and a program of neither side, in the registry by ``micro register``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.interop.columns import Column
from tests.interop.gophers import Gopher
from tests.interop.test_fleet import metadata

from micro.testing import eventually
from micro.testing.ports import unused_ports

#: Seconds that any one step may take.
PATIENCE = 20
#: What it is registered as.
WORDS = ("--id", "n1", "--version", "2.1", "-m", "zone=a", "--check", "/well", "--json")
#: HTTP and JSON of the standard library, and no more.
PROGRAM = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"message": "Hello " + asked["name"]})

    def answer(self, message):
        body = json.dumps(message).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    "column", [Column("etcd", "v4.11.0")], ids=str, indirect=True, scope="module"
)
@pytest.mark.asyncio
async def test_go_finds_and_calls_a_program_that_knows_neither_of_us_while_it_is_registered(
    go: Gopher, name: str, column: Column, tmp_path: Path
) -> None:
    program, port = tmp_path / "program.py", unused_ports(1)[0]
    program.write_text(PROGRAM)
    address, command = f"127.0.0.1:{port}", (sys.executable, str(program), str(port))
    assert await go.misses(name)
    async with registered(name, "--address", address, *WORDS, "--", *command):
        (read,) = await go.get(name)
        assert (read.id, read.address, read.version) == ("n1", address, "2.1")
        assert read.metadata == metadata(column)
        assert await go.call(name, "Helloworld.Call", "Gopher") == "Hello Gopher"
        assert await go.told("calls", name, "10") == 0  # none of them fails
    assert await go.get(name) == []
    await eventually(lambda: go.misses(name))


@asynccontextmanager
async def registered(*words: str) -> AsyncIterator[None]:
    """``micro register`` with these words; within, the program is in the environment's registry."""
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "micro", "register", *words), stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE):
            assert command.stderr is not None
            while json.loads(await command.stderr.readline())["event"] != "registered":
                pass
        yield
    finally:
        if command.returncode is None:
            command.terminate()
        async with asyncio.timeout(PATIENCE):
            status = await command.wait()
    assert status == 128 + signal.SIGTERM  # which it passes on to the program
