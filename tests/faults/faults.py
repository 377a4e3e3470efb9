"""What is done to the server of a registry, and to the links to it."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.request import Request, urlopen

from micro.testing import FaultProxy, Server

Where = Literal["server", "nodes", "callers"]


@dataclass(frozen=True)
class Fault:
    """One fault for so many seconds: of the server itself, or of the link of nodes or of callers.

    It is over when ``befall`` returns; what it did to the server is over then, too: it answers.
    """

    kind: str
    seconds: float
    where: Where = "server"

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}, {self.seconds:.2f} s"

    async def befall(self, server: Server, links: dict[Where, FaultProxy]) -> None:
        if self.where == "server":
            await OF_SERVER[self.kind](server, self.seconds)
        else:
            await OF_LINK[self.kind](links[self.where], self.seconds)


# -- of the server itself -------------------------------------------------------------------------


async def kill(server: Server, seconds: float) -> None:
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.start)


async def lose_data(server: Server, seconds: float) -> None:
    await asyncio.to_thread(server.kill)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.restart, keep_data=False)


async def go_back(server: Server, seconds: float) -> None:
    """Return with the data of before, as from a backup: with less than was seen of it."""
    data = server.log.with_name("data")
    backup = data.with_name("backup")
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(shutil.copytree, data, backup)
    await asyncio.to_thread(server.start)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(shutil.rmtree, data)
    backup.rename(data)
    await asyncio.to_thread(server.start)


async def pause(server: Server, seconds: float) -> None:
    await asyncio.to_thread(server.pause)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.start)


async def compact(server: Server, seconds: float) -> None:
    """Have an etcd forget all history; ``seconds`` after the beginning, so that there is some."""
    await asyncio.sleep(seconds)
    await asyncio.to_thread(_compact, server)


def _compact(server: Server) -> None:
    none = base64.b64encode(b"none").decode()
    revision = _ask(server, "kv/range", key=none)["header"]["revision"]
    _ask(server, "kv/compaction", revision=revision, physical=True)


def _ask(server: Server, method: str, **said: object) -> Any:
    """By etcd's gateway for JSON: another way than the one that is tested."""
    url = f"http://{server.address}/v3/{method}"
    with urlopen(Request(url, json.dumps(said).encode(), method="POST"), timeout=5) as answer:
        return json.load(answer)


# -- of a link ------------------------------------------------------------------------------------


async def refuse(link: FaultProxy, seconds: float) -> None:
    """As if the server were dead: connections are reset, and nobody listens."""
    link.refuse()
    link.cut()
    await asyncio.sleep(seconds)
    link.heal()


async def cut(link: FaultProxy, seconds: float) -> None:
    """Reset all connections, again and again."""
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while loop.time() < until:
        link.cut()
        await asyncio.sleep(0.2)


async def blackhole(link: FaultProxy, seconds: float) -> None:
    link.blackhole()
    await asyncio.sleep(seconds)
    link.heal()


async def latency(link: FaultProxy, seconds: float) -> None:
    link.latency(0.2, jitter=0.1)
    await asyncio.sleep(seconds)
    link.heal()


async def slices(link: FaultProxy, seconds: float) -> None:
    link.slice(1)
    await asyncio.sleep(seconds)
    link.heal()


OF_SERVER: dict[str, Callable[[Server, float], Awaitable[None]]] = {
    "kill": kill,
    "lose data": lose_data,
    "go back": go_back,
    "pause": pause,
    "compact": compact,
}
OF_LINK: dict[str, Callable[[FaultProxy, float], Awaitable[None]]] = {
    "refuse": refuse,
    "cut": cut,
    "blackhole": blackhole,
    "latency": latency,
    "slices": slices,
}
