"""What is done to an etcd, and to the links to it."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.request import Request, urlopen

from micro.testing import FaultProxy
from micro.testing.servers import EtcdServer

Where = Literal["etcd", "nodes", "callers"]


@dataclass(frozen=True)
class Fault:
    """One fault for so many seconds: of etcd itself, or of the link of the nodes or the callers.

    It is over when ``befall`` returns; what it did to etcd is over then, too: etcd answers.
    """

    kind: str
    seconds: float
    where: Where = "etcd"

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}, {self.seconds:.2f} s"

    async def befall(self, etcd: EtcdServer, links: dict[Where, FaultProxy]) -> None:
        if self.where == "etcd":
            await OF_ETCD[self.kind](etcd, self.seconds)
        else:
            await OF_LINK[self.kind](links[self.where], self.seconds)


# -- of etcd itself -------------------------------------------------------------------------------


async def kill(etcd: EtcdServer, seconds: float) -> None:
    await asyncio.to_thread(etcd.kill)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(etcd.start)


async def lose_data(etcd: EtcdServer, seconds: float) -> None:
    await asyncio.to_thread(etcd.kill)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(etcd.restart, keep_data=False)


async def go_back(etcd: EtcdServer, seconds: float) -> None:
    """Return with the data of before, as from a backup: with less than was seen of it."""
    data = etcd.log.with_name("data")
    backup = data.with_name("backup")
    await asyncio.to_thread(etcd.kill)
    await asyncio.to_thread(shutil.copytree, data, backup)
    await asyncio.to_thread(etcd.start)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(etcd.kill)
    await asyncio.to_thread(shutil.rmtree, data)
    backup.rename(data)
    await asyncio.to_thread(etcd.start)


async def pause(etcd: EtcdServer, seconds: float) -> None:
    await asyncio.to_thread(etcd.pause)
    await asyncio.sleep(seconds)
    etcd.resume()


async def compact(etcd: EtcdServer, seconds: float) -> None:
    """Forget all history; ``seconds`` after the beginning, so that there is some."""
    await asyncio.sleep(seconds)
    await asyncio.to_thread(_compact, etcd)


def _compact(etcd: EtcdServer) -> None:
    none = base64.b64encode(b"none").decode()
    revision = _ask(etcd, "kv/range", key=none)["header"]["revision"]
    _ask(etcd, "kv/compaction", revision=revision, physical=True)


def _ask(etcd: EtcdServer, method: str, **said: object) -> Any:
    """By etcd's gateway for JSON: another way than the one that is tested."""
    url = f"http://{etcd.address}/v3/{method}"
    with urlopen(Request(url, json.dumps(said).encode(), method="POST"), timeout=5) as answer:
        return json.load(answer)


# -- of a link ------------------------------------------------------------------------------------


async def refuse(link: FaultProxy, seconds: float) -> None:
    """As if etcd were dead: connections are reset, and nobody listens."""
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


OF_ETCD: dict[str, Callable[[EtcdServer, float], Awaitable[None]]] = {
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
