"""aiohttp towards Consul, with the requests that the plugin makes, and nothing around them."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from importlib import import_module
from typing import Any

import msgspec
from bench import registries
from bench.load import Job, Point
from bench.peer import main
from bench.registries import SERVICE, TTL, RegistryClient, Seen

from micro.registry import Node

# By name: peers are not installed where types are checked.
aiohttp: Any = import_module("aiohttp")

TIMEOUT = 5.0
#: As the plugin: more at once are refused by a server that others use too.
CONNECTIONS = 8


class Raw(RegistryClient):
    def __init__(self, port: int) -> None:
        self._root = f"http://127.0.0.1:{port}/v1/"
        self._held: dict[str, Node] = {}

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=TIMEOUT),
        )
        # One that waits for changes has a connection of its own.
        self._waiting = aiohttp.ClientSession(headers={"Accept-Encoding": "identity"})

    async def beat(self, node: Node) -> None:
        is_new = self._held.get(node.id) is not node
        if is_new:
            self._held[node.id] = node
            await self._put("agent/service/register", msgspec.json.encode(_body(node)))
        await self._put(f"agent/check/pass/service:{_id(node)}")
        if not is_new:  # as the plugin, which looks each 30 s
            return
        only = f'?consistent=&filter=Service.ID == "{_id(node)}"'
        shown, _ = await self._read(self._session, f"health/service/{SERVICE}{only}")
        assert shown

    async def _put(self, path: str, body: bytes = b"") -> None:
        async with self._session.put(self._root + path, data=body) as answer:
            await answer.read()
            assert answer.status == 200

    async def _read(self, session: Any, path: str) -> tuple[Any, int]:
        async with session.get(self._root + path) as answer:
            body = await answer.read()
            assert answer.status == 200
            return msgspec.json.decode(body), int(answer.headers["X-Consul-Index"])

    async def get(self) -> list[str]:
        found, _ = await self._read(self._session, f"health/service/{SERVICE}?consistent=")
        return [_seen(entry).id for entry in found]

    async def follow(self) -> AsyncIterator[list[Seen]]:
        found, at = await self._read(self._waiting, f"health/service/{SERVICE}?consistent=")
        while True:
            yield [_seen(entry) for entry in found]
            path = f"health/service/{SERVICE}?index={at}&wait=3000ms"
            found, at = await self._read(self._waiting, path)

    async def aclose(self) -> None:
        await self._session.close()
        await self._waiting.close()


def _id(node: Node) -> str:
    return f"{node.service}/{node.id}"


def _body(node: Node) -> dict[str, Any]:
    tags = [_packed("t", {name: text}) for name, text in node.metadata.items()]
    tags += [_packed("e", endpoint) for endpoint in node.endpoints]
    tags.append(f"v-{zlib.compress(node.version.encode()).hex()}")
    host, _, port = node.address.rpartition(":")
    return {
        "ID": _id(node),
        "Name": node.service,
        "Tags": tags,
        "Port": int(port),
        "Address": host,
        "Meta": node.metadata,
        "Check": {
            "TTL": f"{TTL:g}s",
            "DeregisterCriticalServiceAfter": "65s",
            "Status": "passing",
        },
    }


def _packed(letter: str, value: object) -> str:
    return f"{letter}-{zlib.compress(msgspec.json.encode(value)).hex()}"


def _seen(entry: Any) -> Seen:
    """A node, read whole."""
    metadata: dict[str, str] = {}
    endpoints: list[Any] = []
    for tag in entry["Service"]["Tags"]:
        said = zlib.decompress(bytes.fromhex(tag[2:]))
        if tag[0] == "t":
            metadata |= msgspec.json.decode(said)
        elif tag[0] == "e":
            endpoints.append(msgspec.json.decode(said))
    return Seen(entry["Service"]["ID"].partition("/")[2], metadata["change"])


async def call(job: Job) -> Point:
    return await registries.drive(job, Raw(job.port), Raw(job.port))


if __name__ == "__main__":
    main(registries.serve, call)
