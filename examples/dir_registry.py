"""A registry in a folder: whoever shares the folder finds each other, by ``dir:///srv/nodes``.

This is a whole backend, and a model for yours: test_dir_registry.py has it pass the suite. A node
is a file with Go Micro's record. It expires when the file says that it was modified, so the clocks
of those who share the folder must agree. The disk is taken to be local: calls of a slow one belong
into ``asyncio.to_thread``.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

from micro.backend import Connections
from micro.errors import Closed, DecodeError, Gap, ServiceNotFound, Unavailable
from micro.hookspecs import hookimpl
from micro.record import decode_node, encode_node
from micro.registry import (
    Change,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    check_node,
    check_service,
    check_ttl,
    in_order,
)


class DirRegistry(Registry):
    schemes = ("dir",)
    features = RegistryFeatures(min_ttl=0.1, converge=0.5)
    _folder: Path | None = None

    async def connect(self, connections: Connections) -> None:
        self.url.options(self.Options)  # there are none: an unknown one is a ConfigError
        self._folder = Path("/", self.url.path)
        with self._open() as folder:
            folder.mkdir(parents=True, exist_ok=True)

    async def aclose(self) -> None:
        self._folder = None

    async def register(self, node: Node, *, ttl: float) -> None:
        with self._open() as folder:
            record, until = encode_node(node), time.time() + check_ttl(ttl, self.features)
            new = folder / f"{uuid.uuid4()}.new"
            new.write_bytes(record)
            os.utime(new, (until, until))
            new.rename(folder / _name(node))  # who reads sees the old file or the new one

    async def deregister(self, node: Node) -> None:
        with self._open() as folder:
            (folder / _name(check_node(node))).unlink(missing_ok=True)

    async def get(self, service: str) -> tuple[Node, ...]:
        nodes = self._nodes(check_service(service))
        if not nodes:
            raise ServiceNotFound(f"service {service!r} is not registered in {self.url}")
        return nodes

    async def services(self) -> tuple[str, ...]:
        return tuple(sorted({node.service for node in self._nodes(None)}))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
        if mark is not None:
            raise Gap("dir: what happened meanwhile is not known")
        told = None
        while True:
            nodes = self._nodes(None if service is None else check_service(service))
            if nodes != told:
                told = nodes
                yield "there is no going on", Snapshot(nodes=nodes)
            await asyncio.sleep(0.1)

    def _nodes(self, service: str | None) -> tuple[Node, ...]:
        with self._open() as folder:
            found = [self._read(path) for path in folder.iterdir() if path.suffix == ".node"]
        return in_order(node for node in found if node and service in {None, node.service})

    def _read(self, path: Path) -> Node | None:
        try:
            node = decode_node(path.read_bytes())
            return node if path.stat().st_mtime > time.time() else None
        except FileNotFoundError:  # it has just been deregistered
            return None
        except DecodeError:  # somebody else wrote it
            self.dropped += 1
            return None

    @contextmanager
    def _open(self) -> Iterator[Path]:
        """The folder, for a call: here alone its errors become ours."""
        if self._folder is None:
            raise Closed("dir: the registry is not connected")
        try:
            yield self._folder
        except OSError as exc:
            raise Unavailable(f"{self.url}: {exc}") from exc


def _name(node: Node) -> str:
    return f"{node.service}.{node.id}.node"  # an id has no dots, so no two nodes share a name


@hookimpl
def micro_backends() -> list[type[Registry]]:
    return [DirRegistry]
