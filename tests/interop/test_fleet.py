"""The fleet with Go, a row of the matrix each: docs/go-micro.md has what came of them.

A fleet is unmodified Go Micro processes and ours that share a registry; calls go over the HTTP
transport, which is Go Micro's default.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nats
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from tests.interop.columns import REGISTRIES, VERSIONS, Column
from tests.interop.gophers import GoError, Gopher
from tests.interop.ours import (
    Helloworld,
    Request,
    Response,
    Says,
    Wire,
    caller,
    our_process,
)

import micro
from micro.testing import eventually

COLUMNS = [Column(registry, version) for version in VERSIONS for registry in REGISTRIES]
#: Seconds that a busy machine may add to a time that is promised.
SLACK = 2.0
#: Seconds within which a node that stops is gone, over mdns; over others it takes less.
LEAVE = 2.0
#: For a node that leaves: it is not gone because its time is up.
LONG = {"MICRO_REGISTER_TTL": "30"}


def message(name: str, field: str) -> micro.Value:
    return micro.Value(name=name, type=name, values=(micro.Value(name=field, type="string"),))


#: What either side says of Helloworld.
ENDPOINTS = tuple(
    micro.Endpoint(
        name=name, request=message("Request", "name"), response=message("Response", "message")
    )
    for name in ("Helloworld.Call", "Helloworld.Fail")
)


def helloworld(node: micro.Node) -> tuple[micro.Endpoint, ...]:
    """The endpoints of Helloworld."""
    return tuple(one for one in node.endpoints if one.name.startswith("Helloworld."))


def metadata(column: Column) -> dict[str, str]:
    """What either side says of itself."""
    spoken = {"transport": "http", "protocol": "mucp", "server": "mucp"}
    return {"zone": "a", "registry": column.registry, **spoken}


async def heartbeats(service: str, count: int) -> None:
    """Wait until Go has told of it over NATS so often: readers learn from it how long it lives."""
    async with await nats.connect(os.environ["MICRO_REGISTRY_ADDRESS"]) as client:
        told = await client.subscribe("micro.registry.nats.watch")
        while count:
            count -= service.encode() in (await told.next_msg(timeout=10)).data


@pytest.mark.parametrize("column", COLUMNS, ids=str, indirect=True, scope="module")
class TestFleet:
    """Go's side is ``go``, a service and a client; ours is the service ``ours``, or a client."""

    @pytest.mark.asyncio
    async def test_go_finds_our_service_with_its_metadata_version_and_endpoints(
        self, go: Gopher, ours: str, column: Column
    ) -> None:
        async with caller(ours) as (_, watch):
            (read,) = await eventually(lambda: go.get(ours))
        assert (read,) == watch.nodes
        assert read.version == "1.2.3"
        assert helloworld(read) == ENDPOINTS
        assert read.metadata == metadata(column) | {"transports": "tcp,http"}

    @pytest.mark.asyncio
    async def test_go_calls_our_service_with_json(self, go: Gopher, ours: str) -> None:
        assert await go.call(ours, "Helloworld.Call", "Gopher") == "Hello Gopher"
        assert await go.told("calls", ours, "1000") == 0  # none of them fails

    @pytest.mark.asyncio
    async def test_go_calls_our_service_with_protobuf(self, go: Gopher, ours: str) -> None:
        assert await go.told("proto", ours, "Gopher") == "Hello Gopher"

    @pytest.mark.asyncio
    async def test_go_is_told_the_error_of_our_service(self, go: Gopher, ours: str) -> None:
        refused = '"code":400,"detail":"name Gopher is not allowed","status":"Bad Request"'
        with pytest.raises(GoError, match=re.escape(refused)):
            await go.call(ours, "Helloworld.Fail", "Gopher")
        with pytest.raises(GoError, match='"code":404'):
            await go.call(ours, "Helloworld.Nope", "Gopher")

    @pytest.mark.asyncio
    async def test_go_streams_with_our_service(self, go: Gopher, ours: str) -> None:
        """Both ways; it ends the stream, or we do, with or without an error."""
        greetings = ["Hello Ann", "Hello Bob"]
        assert await go.stream(ours, "Wire.Chat", "Ann", "Bob", "end") == (greetings, "EOF")
        said, error = await go.stream(ours, "Wire.Chat", "Ann", "Bob", "fail")
        assert said == greetings
        assert '"code":409,"detail":"stream failed"' in error
        assert await go.stream(ours, "Wire.Chat", "Ann", "Bob", "close") == (greetings, "")
        counted = [f"Ann {n}" for n in (1, 2, 3)]
        assert await go.stream(ours, "Wire.Count", "Ann") == (counted, "EOF")

    @pytest.mark.asyncio
    async def test_go_sees_our_service_leave(self, program: Path, name: str) -> None:
        # Version 3 watches the first service alone that a client has called.
        with Gopher(program, f"{name}-web") as web:
            assert await web.misses(name)  # from here on it watches
            with our_process(name, **LONG) as leaving:
                await eventually(lambda: web.knows(name))
                leaving.terminate()
                await eventually(lambda: web.misses(name), within=LEAVE + SLACK)
                assert not await web.get(name)

    @pytest.mark.patient("v3.7.1", "v5.0.0")
    @pytest.mark.asyncio
    async def test_go_sees_our_service_crash(self, go: Gopher, name: str, column: Column) -> None:
        async def is_gone() -> bool:
            return not await go.get(name)

        with our_process(name) as doomed:
            await eventually(lambda: go.get(name))
            doomed.kill()
            await eventually(is_gone, within=column.crash + SLACK)

    @pytest.mark.asyncio
    async def test_our_client_finds_a_go_service_with_its_metadata_version_and_endpoints(
        self, go: Gopher, column: Column
    ) -> None:
        async with caller(go.name) as (_, watch):
            (node,) = watch.nodes
        assert await eventually(lambda: go.get(go.name)) == [node]
        assert (node.service, node.id, node.version) == (go.name, f"{go.name}-go", "1.2.3")
        assert helloworld(node) == ENDPOINTS
        assert node.metadata == metadata(column) | {"broker": "http"}

    @pytest.mark.asyncio
    async def test_our_client_calls_a_go_service_with_json(self, go: Gopher) -> None:
        async with caller(go.name) as (web, _):
            response = await web.client(go.name, Helloworld).call(Request("Alice"))
            assert response == Response("Hello Alice")

    @pytest.mark.asyncio
    async def test_our_client_calls_a_go_service_with_protobuf(self, go: Gopher) -> None:
        async with caller(go.name) as (web, _):
            response = await web.client(go.name, Wire).proto(StringValue(value="Ann"))
            assert response.value == "Hello Ann"

    @pytest.mark.asyncio
    async def test_our_client_is_told_the_error_of_a_go_service(self, go: Gopher) -> None:
        async with caller(go.name) as (web, _):
            with pytest.raises(micro.InvalidArgument, match="name Bob is not allowed") as caught:
                await web.client(go.name, Helloworld).fail(Request("Bob"))
            assert caught.value.id == "helloworld"
            with pytest.raises(micro.EndpointNotFound, match="can't find method Nope"):
                await web.call(go.name, "Helloworld.Nope", {})

    @pytest.mark.asyncio
    async def test_our_client_streams_with_a_go_service(self, go: Gopher) -> None:
        """Both ways; we end the stream, or it does, with or without an error."""
        async with caller(go.name) as (web, _):
            wire = web.client(go.name, Wire)
            chat = wire.chat(says := Says())
            for who in ("Ann", "Bob"):
                says.put_nowait(who)
                assert await anext(chat) == Response(f"Hello {who}")
            says.put_nowait("end")
            assert [response async for response in chat] == []
            chat = wire.chat(says := Says())
            says.put_nowait("fail")
            with pytest.raises(micro.AlreadyExists, match="stream failed"):  # its code is 409
                await anext(chat)
            counted = [response.message async for response in wire.count(Request("Ann"))]
            assert counted == ["Ann 1", "Ann 2", "Ann 3"]

    @pytest.mark.asyncio
    async def test_our_client_sees_a_go_service_leave(
        self, program: Path, name: str, column: Column
    ) -> None:
        with Gopher(program, name, **LONG) as leaving:
            async with caller(name) as (_, watch):
                leaving.terminate()
                await eventually(lambda: not watch.nodes, within=LEAVE + SLACK)

    @pytest.mark.patient("v3.7.1", "v5.0.0", "mdns")
    @pytest.mark.timeout(180)  # for mdns
    @pytest.mark.asyncio
    async def test_our_client_sees_a_go_service_crash(
        self, program: Path, name: str, column: Column
    ) -> None:
        with Gopher(program, name) as doomed:
            async with caller(name) as (_, watch):
                if column.registry == "nats":
                    await heartbeats(name, 2)
                doomed.kill()
                await eventually(lambda: not watch.nodes, within=column.go_crash + SLACK)
