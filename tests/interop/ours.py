"""The same services as those of ``v4/main.go``, made with micro; also a program of its own.

``python -m tests.interop.ours NAME`` serves under that name.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.wrappers_pb2 import StringValue

import micro
from micro.testing import eventually

ROOT = Path(__file__).parents[2]


@dataclass
class Request:
    name: str


@dataclass
class Response:
    message: str


class Helloworld:
    async def call(self, request: Request) -> Response:
        return Response(message=f"Hello {request.name}")

    async def fail(self, request: Request) -> Response:
        raise micro.InvalidArgument(f"name {request.name} is not allowed")


class Wire:
    """What else the transport carries."""

    async def chat(self, said: AsyncIterator[Request]) -> AsyncIterator[Response]:
        async for request in said:
            if request.name == "end":
                return
            if request.name == "fail":
                raise micro.Aborted("stream failed")
            yield Response(message=f"Hello {request.name}")

    async def count(self, request: Request) -> AsyncIterator[Response]:
        for number in (1, 2, 3):
            yield Response(message=f"{request.name} {number}")

    async def relay(self, request: Request) -> AsyncIterator[Response]:
        raise NotImplementedError  # Go's calls the service that the request names
        yield request  # type: ignore[unreachable] # what makes it a stream

    async def proto(self, request: StringValue) -> StringValue:
        return StringValue(value=f"Hello {request.value}")

    async def raw(self, data: bytes) -> bytes:
        return b"\x00\xff" + data


class Says(asyncio.Queue[str]):
    """A client's side of a chat, which has no end of its own."""

    def __aiter__(self) -> Says:
        return self

    async def __anext__(self) -> Request:
        return Request(await self.get())


def new_name() -> str:
    """A service of one test's own."""
    return f"fleet-{uuid.uuid4().hex[:8]}"


def our_service(name: str) -> micro.Service:
    service = micro.Service(name, version="1.2.3", metadata={"zone": "a"})
    service.handle(Helloworld())
    service.handle(Wire())
    return service


@contextmanager
def our_process(name: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The service in a process of its own, registered; it may be killed."""
    command = [sys.executable, "-m", "tests.interop.ours", name]
    environment = os.environ | variables
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert ", registered with " in said, said + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


@asynccontextmanager
async def caller(name: str) -> AsyncIterator[tuple[micro.Service, micro.Watch]]:
    """A client of ours that sees the service."""
    async with micro.Service("web") as web, web.client.watch(name) as watch:
        await eventually(lambda: watch.nodes, within=10)
        yield web, watch


if __name__ == "__main__":
    our_service(sys.argv[1]).run([])
