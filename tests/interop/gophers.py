"""Processes of unmodified Go Micro, which serve, and which call whom they are told to."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any, Self

import micro
from micro.record import decode_node

#: Seconds that Go Micro may take for whatever it is told; one call of its own ends after 5.
PATIENCE = 20


class GoError(Exception):
    """What a call or a stream of Go ended with, in Go's words; ``said`` is what came before."""

    def __init__(self, text: str, said: Any) -> None:
        super().__init__(text)
        self.said: Any = said


class Gopher:
    """One process of ``v4/main.go``: the service ``name``, and a client of any other.

    ``variables`` are settings of Go Micro's beside those that this process has.
    """

    def __init__(self, program: Path, name: str, **variables: str) -> None:
        self.name = name
        own = {
            "MICRO_SERVER_NAME": name,
            "MICRO_SERVER_ID": "go",
            "MICRO_SERVER_VERSION": "1.2.3",
            "MICRO_SERVER_METADATA": "zone=a",
            "MICRO_SERVER_ADDRESS": "127.0.0.1:0",
            "MICRO_CLIENT_RETRIES": "0",  # a failure is seen, and not repaired
        }
        self._process = subprocess.Popen(
            [program],
            env=os.environ | own | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def terminate(self) -> None:
        """Ask it to stop, which it does with a goodbye."""
        self._process.terminate()

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()

    async def get(self, service: str) -> list[micro.Node]:
        """The nodes of a service, as its registry has them; each a version of its own.

        Over mdns and nats it has those that have answered within 0.1 s.
        """
        found: list[dict[str, Any]] = await self.told("get", service) or []
        # Of those that failed the plugin for Consul makes a service without nodes.
        found = [one for one in found if one["nodes"]]
        for one in found:
            for node in one["nodes"]:
                # In Consul ids are of the whole agent, and ours begin with the service.
                node["id"] = node["id"].removeprefix(f"{service}/")
        return [decode_node(json.dumps(one).encode()) for one in found]

    async def call(self, service: str, endpoint: str, name: str) -> str:
        """The message of the response, in JSON.

        Raises:
            GoError: the call failed.
        """
        return str(await self.told("call", service, endpoint, name))

    async def knows(self, service: str) -> bool:
        """Whether its client knows of such a service; it asks once, and then watches."""
        try:
            await self.call(service, "Helloworld.Call", "Gopher")
        except GoError as exc:
            return f"service {service}: not found" not in str(exc)
        return True

    async def misses(self, service: str) -> bool:
        """The opposite."""
        return not await self.knows(service)

    async def stream(self, service: str, endpoint: str, *says: str) -> tuple[list[str], str]:
        """What it hears, an answer to each that it says and then all there is, and how it ends."""
        try:
            return await self.told("stream", service, endpoint, *says), ""
        except GoError as exc:
            return exc.said, str(exc)

    async def told(self, *words: str) -> Any:
        """What comes of an order of ``main.go``.

        Raises:
            GoError: it fails.
        """
        return await asyncio.to_thread(self._told, " ".join(words))

    def _told(self, order: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n".encode())
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        assert ready, f"{order}: no answer of Go within {PATIENCE} s"
        line = self._process.stdout.readline()
        assert line, f"{order}: Go has ended, with status {self._process.wait()}"
        answer = json.loads(line)
        if answer["error"]:
            raise GoError(answer["error"], answer["result"])
        return answer["result"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._process.communicate()  # it closes the pipes, too
