"""nats-py towards NATS, saying what the plugin says on the wire of Go Micro's registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any
from uuid import uuid4

import msgspec
from bench import registries
from bench.load import Job, Point
from bench.peer import main
from bench.peers.raw_etcd import record
from bench.registries import SERVICE, RegistryClient, Seen

from micro.registry import Node

# By name: peers are not installed where types are checked.
nats: Any = import_module("nats")

QUESTIONS, CHANGES = "micro.registry.nats.query", "micro.registry.nats.watch"
TIMEOUT = 5.0
#: Seconds of silence after which nobody else is thought to answer: nothing says how many there are.
QUIET = 0.05


class Raw(RegistryClient):
    def __init__(self, port: int) -> None:
        self._url = f"nats://127.0.0.1:{port}"
        self._records: dict[str, bytes] = {}
        self._deletes = 0
        self._heard: dict[str, asyncio.Queue[bytes]] = {}

    async def open(self) -> None:
        self._nats = await nats.connect(self._url)
        self._inbox = f"_INBOX.{uuid4().hex}"
        await self._nats.subscribe(f"{self._inbox}.*", cb=self._hear)
        await self._nats.subscribe(QUESTIONS, cb=self._answer)
        await self._nats.subscribe(CHANGES, cb=self._told)

    async def _hear(self, message: Any) -> None:
        waiting = self._heard.get(message.subject)
        if waiting is not None:
            waiting.put_nowait(message.data)

    async def _answer(self, message: Any) -> None:
        for said in list(self._records.values()):
            await self._nats.publish(message.reply, said)

    async def _told(self, message: Any) -> None:
        if b'"Action":"delete"' in message.data:  # somebody may say so of a node that lives
            self._deletes += 1

    async def beat(self, node: Node) -> None:
        said = self._records[node.id] = record(node)
        name = f"{self._inbox}.{uuid4().hex}"
        echo = self._heard[name] = asyncio.Queue[bytes]()
        await self._nats.publish(CHANGES, b'{"Service":%b,"Action":"create"}' % said)
        await self._nats.publish(name, b"")  # when it is back, the server has taken the other
        async with asyncio.timeout(TIMEOUT):
            await echo.get()
        del self._heard[name]

    async def get(self) -> list[str]:
        name = f"{self._inbox}.{uuid4().hex}"
        answers = self._heard[name] = asyncio.Queue[bytes]()
        question = {"Service": {"name": SERVICE}, "Action": "get"}
        await self._nats.publish(QUESTIONS, msgspec.json.encode(question), reply=name)
        found: list[str] = []
        try:
            while True:
                async with asyncio.timeout(QUIET if found else TIMEOUT):
                    found.append(_read(msgspec.json.decode(await answers.get())).id)
        except TimeoutError:
            return found
        finally:
            del self._heard[name]

    async def follow(self) -> AsyncIterator[list[Seen]]:
        subscription = await self._nats.subscribe(CHANGES)
        yield []
        async for message in subscription.messages:
            yield [_read(msgspec.json.decode(message.data)["Service"])]

    async def aclose(self) -> None:
        await self._nats.close()


def _read(service: Any) -> Seen:
    one = service["nodes"][0]
    return Seen(one["id"], one["metadata"]["change"])


async def call(job: Job) -> Point:
    return await registries.drive(job, Raw(job.port), Raw(job.port))


if __name__ == "__main__":
    main(registries.serve, call)
