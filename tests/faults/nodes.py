"""The nodes of a fleet, in this process and in others."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import micro
from micro.errors import Unavailable
from micro.testing import serving

PROGRAM = Path(__file__).parents[2] / "examples/helloworld.py"


class Helloworld:
    async def call(self, name: str) -> dict[str, str]:
        return {"message": f"Hello {name}"}


class Member:
    """A node in this process; as by a supervisor started anew while it cannot be registered."""

    def __init__(self, service: micro.Service) -> None:
        self._service = service
        self._asked = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def leave(self) -> None:
        self._asked.set()

    async def left(self) -> None:
        async with asyncio.timeout(15):
            await self._task

    async def _run(self) -> None:
        while not self._asked.is_set():
            try:
                async with serving(self._service, {}):
                    await self._asked.wait()
            except Unavailable:
                await asyncio.sleep(0.2)


@dataclass
class Process:
    """The example, unedited, and what it says."""

    id: str
    log: Path
    popen: subprocess.Popen[bytes]

    @classmethod
    def start(cls, id: str, folder: Path, *, registry: str, ttl: float) -> Process:
        settings = {"registry": registry, "server_id": id, "register_ttl": f"{ttl}s"}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        log = folder / f"{id}.log"
        with log.open("wb") as out:
            command = [sys.executable, str(PROGRAM), *flags]
            return cls(id, log, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))

    def check(self) -> None:
        """It runs, and says nothing but lines of the levels INFO and WARNING."""
        assert self.popen.poll() is None, f"{self.id} ended with {self.popen.returncode}"
        for line in self.log.read_text().splitlines():
            assert line.split()[1:2] in (["INFO"], ["WARNING"]), f"{self.id} says: {line}"

    def stop(self) -> None:
        """Have it drain; it has to end within 10 s, with status 0."""
        self.popen.terminate()
        try:
            assert self.popen.wait(10) == 0, f"{self.id} ended with {self.popen.returncode}"
        finally:
            self.popen.kill()
            self.popen.wait(10)
