"""Unmodified Go Micro processes and ours, in one fleet: each finds and calls the other.

Go Micro v4.11 with its HTTP transport, over mDNS, which is its default, and over etcd; built once
from ``interop/``.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from google.protobuf.wrappers_pb2 import StringValue

import micro
from micro.record import decode_node
from micro.testing import eventually
from micro.testing.servers import EtcdServer


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


@pytest.fixture
def program(gomicro_binary: Path) -> Path:
    return gomicro_binary


@pytest.fixture
def name() -> str:
    return f"fleet-{uuid.uuid4().hex[:8]}"


@contextmanager
def serving(program: Path, name: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | variables
    process = subprocess.Popen([program, "serve", name], env=environment, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def go_service(program: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    with serving(program, name) as process:
        yield process


def our_service(name: str) -> micro.Service:
    service = micro.Service(name, version="1.2.3", metadata={"zone": "a"})
    service.handle(Helloworld())
    service.handle(Wire())
    return service


@asynccontextmanager
async def caller(name: str) -> AsyncIterator[tuple[micro.Service, micro.Watch]]:
    """A client of ours that sees the service."""
    async with micro.Service("web") as web, web.client.watch(name) as watch:
        await eventually(lambda: watch.nodes, within=10)
        yield web, watch


async def go(program: Path, *arguments: str) -> str:
    """What Go's program prints."""
    command = [str(program), *arguments]
    done = await asyncio.to_thread(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def read_by_go(program: Path, name: str) -> list[micro.Node]:
    """The nodes of a service, as a Go client reads them."""
    services = json.loads(await go(program, "get", name)) or []
    return [decode_node(json.dumps(service).encode()) for service in services]


def message(name: str, field: str) -> micro.Value:
    return micro.Value(name=name, type=name, values=(micro.Value(name=field, type="string"),))


def helloworld(node: micro.Node) -> tuple[micro.Endpoint, ...]:
    """The endpoints of Helloworld."""
    return tuple(one for one in node.endpoints if one.name.startswith("Helloworld."))


#: What either side says of Helloworld.
ENDPOINTS = tuple(
    micro.Endpoint(
        name=name, request=message("Request", "name"), response=message("Response", "message")
    )
    for name in ("Helloworld.Call", "Helloworld.Fail")
)


class Fleet:
    """What holds over each registry."""

    registry: ClassVar[str]

    @pytest.mark.asyncio
    async def test_go_client_finds_and_calls_our_service(self, program: Path, name: str) -> None:
        async with our_service(name):
            called = await go(program, "call", name)
        lines = [line.split("\t") for line in called.splitlines()]
        assert lines[0] == ["Helloworld.Call", "Hello Gopher", "<nil>"]
        refused = '"code":400,"detail":"name Gopher is not allowed","status":"Bad Request"'
        assert refused in lines[1][2]
        assert '"code":404' in lines[2][2]
        assert lines[3] == ["failed", "0"]

    @pytest.mark.asyncio
    async def test_go_client_reads_what_we_register(self, program: Path, name: str) -> None:
        async with our_service(name), caller(name) as (_, watch):
            (read,) = await read_by_go(program, name)
        assert (read,) == watch.nodes
        assert read.version == "1.2.3"
        assert helloworld(read) == ENDPOINTS
        assert read.metadata == self.metadata() | {"transports": "tcp,http"}

    @pytest.mark.asyncio
    async def test_go_client_does_not_find_our_service_that_has_stopped(
        self, program: Path, name: str
    ) -> None:
        async with our_service(name):
            assert await read_by_go(program, name)
        assert not await read_by_go(program, name)

    @pytest.mark.asyncio
    async def test_our_client_finds_and_calls_a_go_service(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (web, _):
            helloworld = web.client(name, Helloworld)
            assert await helloworld.call(Request("Alice")) == Response("Hello Alice")
            with pytest.raises(micro.InvalidArgument, match="name Bob is not allowed") as caught:
                await helloworld.fail(Request("Bob"))
            assert caught.value.id == "helloworld"
            with pytest.raises(micro.EndpointNotFound, match="can't find method Nope"):
                await web.call(name, "Helloworld.Nope", {})

    @pytest.mark.asyncio
    async def test_our_client_reads_what_go_registers(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (_, watch):
            (node,) = watch.nodes
        assert (node.service, node.id, node.version) == (name, f"{name}-go", "1.2.3")
        assert helloworld(node) == ENDPOINTS
        assert node.metadata == self.metadata() | {"broker": "http"}

    @pytest.mark.asyncio
    async def test_go_service_that_stops_is_seen_to_go(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (_, watch):
            go_service.terminate()
            await eventually(lambda: not watch.nodes, within=2.0 + 2.0)

    def metadata(self) -> dict[str, str]:
        spoken = {"transport": "http", "protocol": "mucp", "server": "mucp"}
        return {"zone": "a", "registry": self.registry, **spoken}


class TestOverMdns(Fleet):
    registry = "mdns"


class TestTransport:
    """What does not depend on a registry."""

    @pytest.mark.asyncio
    async def test_go_client_streams_with_our_service(self, program: Path, name: str) -> None:
        async with our_service(name):
            said = await go(program, "wire", name)
        lines = [line.split("\t") for line in said.splitlines()]
        greetings = [["Wire.Chat", "Ann", "Hello Ann"], ["Wire.Chat", "Bob", "Hello Bob"]]
        assert lines[:3] == [*greetings, ["Wire.Chat", "end", "EOF"]]
        assert lines[3:5] == greetings
        assert lines[5][:2] == ["Wire.Chat", "fail"]
        assert '"code":409,"detail":"stream failed"' in lines[5][2]
        assert lines[6:8] == greetings  # and then it hung up
        counted = ["Wire.Count", "Ann", "Ann 1"], *(["Wire.Count", "", f"Ann {n}"] for n in (2, 3))
        assert tuple(lines[8:12]) == (*counted, ["Wire.Count", "end"])
        assert lines[12:] == [
            ["Wire.Proto", '"Hello Ann"', "<nil>"],
            ["Wire.Raw", "00ff010002", "<nil>"],
        ]

    @pytest.mark.asyncio
    async def test_our_client_chats_with_a_go_service(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (web, _):
            chat = web.client(name, Wire).chat(says := Says())
            for who in ("Ann", "Bob"):
                says.put_nowait(who)
                assert await anext(chat) == Response(f"Hello {who}")
            says.put_nowait("end")
            assert [response async for response in chat] == []

    @pytest.mark.asyncio
    async def test_error_of_a_go_stream_is_raised(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (web, _):
            chat = web.client(name, Wire).chat(says := Says())
            says.put_nowait("fail")
            with pytest.raises(micro.AlreadyExists, match="stream failed"):  # its code is 409
                await anext(chat)

    @pytest.mark.asyncio
    async def test_our_client_hears_all_of_a_go_stream(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (web, _):
            count = web.client(name, Wire).count(Request("Ann"))
            assert [response.message async for response in count] == ["Ann 1", "Ann 2", "Ann 3"]

    @pytest.mark.asyncio
    async def test_our_client_exchanges_protobuf_and_bytes_with_a_go_service(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (web, _):
            wire = web.client(name, Wire)
            assert (await wire.proto(StringValue(value="Ann"))).value == "Hello Ann"
            assert await wire.raw(b"\x01\x00") == b"\x00\xff\x01\x00"

    @pytest.mark.asyncio
    async def test_go_calls_us_while_it_handles_a_stream(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        """Its calls have the id of the stream, and are calls all the same."""
        async with our_service(f"{name}-ours"), caller(name) as (web, _):
            relay = web.client(name, Wire).relay(Request(f"{name}-ours"))
            assert [response.message async for response in relay] == ["Hello 1"]

    @pytest.mark.asyncio
    async def test_go_server_loses_no_call_of_ours(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        """It loses about four in 10,000 requests of which it cannot tell the next from the last;
        its own clients lose them too."""
        async with caller(name) as (web, _):
            call = web.client(name, Helloworld).call
            numbers = iter(range(10_000))

            async def calls() -> None:
                for number in numbers:
                    assert (await call(Request(f"{number}"))).message == f"Hello {number}"

            await asyncio.gather(calls(), calls())


class Says(asyncio.Queue[str]):
    """A client's side of a chat, which has no end of its own."""

    def __aiter__(self) -> Says:
        return self

    async def __anext__(self) -> Request:
        return Request(await self.get())


class TestOverEtcd(Fleet):
    """Both sides have short leases, which Go Micro renews, or makes anew, at each interval."""

    registry = "etcd"
    ttl = 3
    interval = 1

    @pytest.fixture(autouse=True)
    def environment(self, etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both sides read the same variables."""
        etcd.start()  # an earlier test may have left it dead
        monkeypatch.setenv("MICRO_REGISTRY", "etcd")
        monkeypatch.setenv("MICRO_REGISTRY_ADDRESS", etcd.address)
        monkeypatch.setenv("MICRO_REGISTER_TTL", str(self.ttl))
        monkeypatch.setenv("MICRO_REGISTER_INTERVAL", str(self.interval))

    @pytest.mark.asyncio
    async def test_go_service_that_is_killed_is_gone_after_its_lease(
        self, go_service: subprocess.Popen[bytes], name: str
    ) -> None:
        async with caller(name) as (_, watch):
            go_service.kill()
            await eventually(lambda: not watch.nodes, within=self.ttl + 1.0 + 2.0)

    @pytest.mark.asyncio
    async def test_both_go_on_being_found_when_etcd_is_killed_and_comes_back(
        self, program: Path, go_service: subprocess.Popen[bytes], name: str, etcd: EtcdServer
    ) -> None:
        ours = f"{name}-ours"
        async with our_service(ours), caller(name) as (web, watch), caller(ours) as (_, own):
            async with self.outlasting(program, f"{name}-candle") as candle:
                helloworld = web.client(name, Helloworld)

                async def outlasted() -> bool:
                    assert await helloworld.call(Request("Alice")) == Response("Hello Alice")
                    return not candle.nodes

                etcd.kill()
                await eventually(lambda: watch.state == own.state == candle.state == "stale")
                assert not await outlasted()  # found as it was last known
                await asyncio.to_thread(etcd.start)
                await eventually(lambda: watch.state == own.state == "live", within=5.0 + 2.0)
                await eventually(outlasted, within=2 * self.ttl + 1.0 + 2.0, every=0.05)
            called = await go(program, "call", ours)
            assert called.endswith("failed\t0\n")

    @pytest.mark.asyncio
    async def test_both_are_found_again_when_etcd_has_lost_its_data(
        self, program: Path, go_service: subprocess.Popen[bytes], name: str, etcd: EtcdServer
    ) -> None:
        async with our_service(f"{name}-ours") as ours, caller(name):
            await asyncio.to_thread(etcd.restart, keep_data=False)
            for service in (name, ours.name):
                async with asyncio.timeout(5.0 + 2.0), caller(service) as (web, _):
                    assert await read_by_go(program, service)
                    helloworld = web.client(service, Helloworld)
                    assert await helloworld.call(Request("Alice")) == Response("Hello Alice")

    @asynccontextmanager
    async def outlasting(self, program: Path, name: str) -> AsyncIterator[micro.Watch]:
        """A node that nobody renews, with a lease twice as long as those of others: once it is
        gone, who is still found has been renewed."""
        with serving(program, name, MICRO_REGISTER_TTL=str(2 * self.ttl)) as process:
            async with caller(name) as (_, watch):
                process.kill()
                yield watch
