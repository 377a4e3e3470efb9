"""Nodes whose processes answer for them: with Go Micro's, over outages, and against forgeries."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from micro.errors import Gap, PermissionDenied, ServiceNotFound, Unavailable
from micro.follow import View, Watch
from micro.registry import Change, Node, Registry
from micro.testing import eventually
from micro.testing.proxy import FaultProxy
from micro.testing.servers import NatsServer
from micro.url import URL

Connected = Callable[..., AbstractAsyncContextManager[Registry]]
Raw = Callable[..., AbstractAsyncContextManager[NatsClient]]
Publish = Callable[..., Awaitable[None]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0
#: As Go Micro has it: a node without a time to live.
GO_NODE = {"metadata": None, "id": "greeter-go", "address": "127.0.0.1:9302"}


@pytest_asyncio.fixture
async def registry(nats_url: str, connected: Connected) -> AsyncIterator[Registry]:
    async with connected(nats_url) as registry:
        yield registry


@pytest_asyncio.fixture
async def other(nats_url: str, connected: Connected) -> AsyncIterator[Registry]:
    async with connected(nats_url) as registry:
        yield registry


@pytest_asyncio.fixture
async def go(nats: NatsServer, nats_url: str, raw: Raw) -> AsyncIterator[Peer]:
    async with raw(nats.address) as client:
        yield Peer(client, f"{URL.parse(nats_url).path}.micro.registry.nats")


class Peer:
    """A process of Go Micro, as far as a registry sees it."""

    def __init__(self, client: NatsClient, root: str) -> None:
        self.client = client
        self._root = root

    async def tell(self, action: str, **fields: object) -> None:
        service = {"name": "greeter", "version": "1", "nodes": [GO_NODE], **fields}
        await self.tell_raw(json.dumps({"Service": service, "Action": action}).encode())

    async def tell_raw(self, data: bytes) -> None:
        await self.client.publish(f"{self._root}.watch", data)

    async def ask(self, data: bytes, reply: str) -> None:
        await self.client.publish(f"{self._root}.query", data, reply=reply)

    async def told(self) -> list[dict[str, Any]]:
        """What is told from now on."""
        told: list[dict[str, Any]] = []

        async def hear(msg: Msg) -> None:
            told.append(json.loads(msg.data))

        await self.client.subscribe(f"{self._root}.watch", cb=hear)
        await self.heard()
        return told

    async def answer(self, *services: dict[str, object]) -> None:
        """Answer each question with these."""

        async def answer(msg: Msg) -> None:
            for service in services:
                await msg.respond(json.dumps(service).encode())

        await self.client.subscribe(f"{self._root}.query", cb=answer)
        await self.heard()

    async def heard(self) -> None:
        """The server has read all that was sent; nats-py's ``flush`` does not say so."""
        inbox = self.client.new_inbox()
        echo = await self.client.subscribe(inbox)
        await self.client.publish(inbox, b"")
        await echo.next_msg(timeout=SLACK)
        await echo.unsubscribe()


@asynccontextmanager
async def watching(registry: Registry, service: str | None = "greeter") -> AsyncIterator[Watch]:
    view = View(registry, service, ttl=30)
    try:
        async with view.watch() as watch:
            yield watch
    finally:
        await view.aclose()


def ids(watch: Watch) -> list[str]:
    return [node.id for node in watch.nodes]


# -- with Go Micro --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_question_of_go_micro_is_answered_with_our_node(
    registry: Registry, go: Peer
) -> None:
    await registry.register(NODE, ttl=60)
    inbox = await go.client.subscribe("_INBOX.go")
    await go.ask(b'{"Service":{"name":"greeter","nodes":null},"Action":"get"}', "_INBOX.go")
    said = json.loads((await inbox.next_msg(timeout=SLACK)).data)
    assert 0 < said.pop("ttl") <= 60
    assert said["nodes"] == [{"metadata": {}, "id": NODE.id, "address": NODE.address}]


@pytest.mark.asyncio
async def test_a_node_of_go_micro_is_found_by_its_answer(registry: Registry, go: Peer) -> None:
    two = {**GO_NODE, "id": "greeter-go-2"}
    await go.answer({"name": "greeter", "version": "1", "nodes": [GO_NODE, two]})
    assert [node.id for node in await registry.get("greeter")] == ["greeter-go", "greeter-go-2"]
    assert await registry.services() == ("greeter",)


@pytest.mark.asyncio
async def test_changes_of_go_micro_are_told(registry: Registry, go: Peer) -> None:
    async with watching(registry) as watch, asyncio.timeout(3 * (1 + SLACK)):
        await go.tell("create")
        assert (await anext(watch)).kind == "create"
        await go.tell("create", version="2")
        change = await anext(watch)
        assert (change.kind, change.node.version) == ("update", "2")
        await go.tell("delete", version="2")
        assert (await anext(watch)).kind == "delete"


@pytest.mark.asyncio
async def test_a_node_of_go_micro_that_is_silent_for_three_of_its_intervals_is_gone(
    registry: Registry, go: Peer
) -> None:
    async with watching(registry) as watch:
        await go.tell("create")
        await asyncio.sleep(0.5)  # its interval
        await go.tell("create")
        last = time.monotonic()
        await eventually(lambda: ids(watch) == ["greeter-go"], within=1 + SLACK)
        await eventually(lambda: not watch.nodes, within=3 + SLACK)
        assert time.monotonic() - last >= 3


@pytest.mark.asyncio
async def test_a_node_of_go_micro_that_answers_when_it_is_asked_stays(
    registry: Registry, go: Peer
) -> None:
    await go.answer({"name": "greeter", "version": "1", "nodes": [GO_NODE]})
    async with watching(registry) as watch:
        for _ in range(2):
            await go.tell("create")
        await eventually(lambda: ids(watch) == ["greeter-go"], within=1 + SLACK)
        end = time.monotonic() + 4.5
        while time.monotonic() < end:
            assert ids(watch) == ["greeter-go"]
            await asyncio.sleep(0.1)


@pytest.mark.asyncio
async def test_what_we_tell_has_the_form_of_go_micro(registry: Registry, go: Peer) -> None:
    told = await go.told()
    await registry.register(NODE, ttl=60)
    await registry.deregister(NODE)
    await eventually(lambda: len(told) == 2, within=SLACK)
    assert [said["Action"] for said in told] == ["create", "delete"]
    nodes = {"metadata": None, "id": NODE.id, "address": NODE.address}
    assert told[1]["Service"] == {
        "name": "greeter",
        "version": "latest",
        "metadata": None,
        "endpoints": None,
        "nodes": [nodes],
    }


# -- outages --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_while_the_server_is_down_nothing_is_registered_late(
    nats: NatsServer, nats_url: str, connected: Connected
) -> None:
    async with connected(f"{nats_url}?timeout=500ms") as registry:
        await asyncio.to_thread(nats.stop)
        with pytest.raises(Unavailable):
            await registry.register(NODE, ttl=60)
        await asyncio.to_thread(nats.start)
        await eventually(lambda: _registers(registry, OTHER), within=5 + SLACK)
        assert await registry.get("greeter") == (OTHER,)


@pytest.mark.asyncio
async def test_what_could_not_be_said_before_the_connection_ended_is_not_said_on_the_next(
    nats: NatsServer, nats_url: str, connected: Connected
) -> None:
    async with connected(f"{nats_url}?timeout=500ms") as registry, watching(registry) as watch:
        await asyncio.to_thread(nats.pause)  # it takes what is sent, and answers nothing
        with pytest.raises(Unavailable):
            await registry.register(NODE, ttl=60)
        await asyncio.to_thread(nats.restart)
        await eventually(lambda: _registers(registry, OTHER), within=5 + SLACK)
        assert await registry.get("greeter") == (OTHER,)
        await eventually(lambda: ids(watch) == [OTHER.id], within=5 + SLACK)


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_who_heard_of_a_node_that_was_not_registered_after_all_is_told_so(
    nats: NatsServer, nats_url: str, registry: Registry, connected: Connected, how: str
) -> None:
    async with connected(f"{nats_url}?timeout=500ms") as writer, watching(registry) as watch:
        await asyncio.to_thread(nats.pause)  # it takes what is sent, and tells it afterwards
        registering = asyncio.create_task(writer.register(NODE, ttl=60))
        if how == "cancelled":
            await asyncio.wait([registering], timeout=0.1)
            registering.cancel()
        with pytest.raises((Unavailable, asyncio.CancelledError)):
            await registering
        await asyncio.to_thread(nats.resume)
        await eventually(lambda: _registers(writer, OTHER), within=5 + SLACK)
        await eventually(lambda: OTHER.id in ids(watch), within=1 + SLACK)
        assert ids(watch) == [OTHER.id]


async def _registers(registry: Registry, node: Node) -> bool:
    try:
        await registry.register(node, ttl=60)
    except Unavailable:
        return False
    return True


@pytest.mark.asyncio
async def test_flush_of_nats_py_is_no_proof_its_ping_overtakes_what_was_published(
    raw: Raw,
) -> None:
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576}\r\n')
        while data := await reader.read(65536):
            heard.extend(data)
            writer.write(b"PONG\r\n" * data.count(b"PING\r\n"))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with raw(f"{host}:{port}") as client:
            heard.clear()
            await client.publish("subject", b"hello")
            await client.flush()
            assert heard.index(b"PING") < heard.index(b"PUB")


@pytest.mark.asyncio
async def test_no_node_is_lost_when_the_server_is_restarted(
    nats: NatsServer, nats_url: str, connected: Connected
) -> None:
    nodes = [msgspec.structs.replace(NODE, id=f"node-{number}") for number in range(6)]
    async with AsyncExitStack() as stack:
        registries = [await stack.enter_async_context(connected(nats_url)) for _ in nodes]
        for registry, node in zip(registries, nodes, strict=True):
            await registry.register(node, ttl=60)
        watch = await stack.enter_async_context(
            watching(await stack.enter_async_context(connected(nats_url)))
        )
        await asyncio.to_thread(nats.restart, keep_data=False)
        await eventually(lambda: watch.state == "stale", within=SLACK)
        await eventually(lambda: watch.state == "live", within=2 + SLACK)
        assert list(watch.nodes) == nodes
        fresh = await stack.enter_async_context(connected(nats_url))
        assert await fresh.get("greeter") == tuple(nodes)
        await registries[-1].deregister(nodes[-1])
        async with asyncio.timeout(1 + SLACK):
            assert await anext(watch) == Change(kind="delete", node=nodes[-1])


@pytest.mark.asyncio
async def test_after_a_break_a_node_is_told_again(
    nats: NatsServer, nats_url: str, connected: Connected, go: Peer
) -> None:
    async with FaultProxy(nats.address) as proxy:
        async with connected(nats_url.replace(nats.address, proxy.address)) as registry:
            await registry.register(NODE, ttl=60)
            told = await go.told()
            proxy.cut()
            await eventually(lambda: told, within=1 + SLACK)
            assert told[0]["Action"] == "create"


@pytest.mark.asyncio
async def test_who_goes_during_a_break_says_goodbye_after_it(
    nats: NatsServer, nats_url: str, connected: Connected, go: Peer
) -> None:
    async with FaultProxy(nats.address) as proxy:
        url = nats_url.replace(nats.address, proxy.address)
        async with connected(f"{url}?timeout=500ms") as registry:
            await registry.register(NODE, ttl=60)
            told = await go.told()
            proxy.refuse()
            proxy.cut()
            with pytest.raises(Unavailable):
                await registry.deregister(NODE)
            proxy.heal()
            await eventually(lambda: told, within=1 + SLACK)
            assert told[0]["Action"] == "delete"


@pytest.mark.asyncio
async def test_a_goodbye_that_the_server_never_took_is_said_on_the_next_connection(
    nats: NatsServer, nats_url: str, connected: Connected, go: Peer
) -> None:
    async with FaultProxy(nats.address) as proxy:
        url = nats_url.replace(nats.address, proxy.address)
        async with connected(f"{url}?timeout=500ms") as registry:
            await registry.register(NODE, ttl=60)
            told = await go.told()
            proxy.blackhole()
            with pytest.raises(Unavailable):
                await registry.deregister(NODE)
            with pytest.raises(Unavailable):
                await registry.register(OTHER, ttl=60)  # it would be taken back at once
            proxy.cut()
            proxy.heal()
            await eventually(lambda: len(told) == 2, within=3 + SLACK)
            gone = {said["Service"]["nodes"][0]["id"] for said in told}
            assert (gone, {said["Action"] for said in told}) == ({NODE.id, OTHER.id}, {"delete"})


@pytest.mark.asyncio
async def test_what_we_tell_ourselves_is_no_news(registry: Registry, go: Peer) -> None:
    await registry.register(NODE, ttl=60)
    told = await go.told()
    async with watching(registry) as watch:
        await asyncio.gather(registry.deregister(NODE), registry.register(NODE, ttl=60))
        await registry.register(OTHER, ttl=60)
        await eventually(lambda: len(told) >= 3, within=SLACK)
        assert [said["Action"] for said in told] == ["delete", "create", "create"]
        assert watch.nodes == (NODE, OTHER)


@pytest.mark.asyncio
async def test_who_closes_says_goodbye(
    nats_url: str, connected: Connected, other: Registry
) -> None:
    async with watching(other) as watch:
        async with connected(nats_url) as registry:
            await registry.register(NODE, ttl=60)
            await eventually(lambda: watch.nodes == (NODE,), within=1 + SLACK)
        await eventually(lambda: not watch.nodes, within=1 + SLACK)


@pytest.mark.asyncio
async def test_there_is_no_going_on_from_a_mark(registry: Registry) -> None:
    async with aclosing(registry.follow("greeter", None)) as stream:
        mark, _ = await anext(stream)
    with pytest.raises(Gap):
        await anext(registry.follow("greeter", mark))


@pytest.mark.asyncio
async def test_that_nobody_answers_is_told_in_a_short_timeout_too(
    nats_url: str, connected: Connected
) -> None:
    async with connected(f"{nats_url}?timeout=400ms") as registry:
        with pytest.raises(ServiceNotFound):
            await registry.get("greeter")


# -- what others say ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_node_of_ours_that_somebody_deletes_is_told_again(
    registry: Registry, other: Registry
) -> None:
    await registry.register(NODE, ttl=60)
    async with watching(other) as watch, asyncio.timeout(2 * (1 + SLACK)):
        await other.deregister(NODE)
        # Who reads late is told both as one.
        if (first := await anext(watch)).kind == "delete":
            assert (await anext(watch)).kind == "create"
        else:
            assert first.kind == "update"
    assert await other.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_an_answer_goes_to_an_inbox_and_not_where_changes_are_told(
    registry: Registry, go: Peer, nats_url: str
) -> None:
    await registry.register(NODE, ttl=60)
    told = await go.told()
    root = f"{URL.parse(nats_url).path}.micro.registry.nats"
    for reply in (f"{root}.watch", f"{root}.query", "$JS.API.INFO"):
        await go.ask(b'{"Service":{"name":"greeter"},"Action":"get"}', reply)
    await eventually(lambda: registry.dropped == 3, within=SLACK)
    await go.heard()
    assert told == []


@pytest.mark.asyncio
async def test_a_missing_right_is_told_with_its_subject(
    nats_binary: Path, tmp_path: Path, connected: Connected
) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        """
        authorization { users: [
          {user: reader, password: p, permissions: {
            publish: ["micro.registry.nats.query", "_INBOX.>"], subscribe: [">"]}},
          {user: deaf, password: p, permissions: {
            publish: [">"], subscribe: ["_INBOX.>", "micro.registry.nats.query"]}},
          {user: kv, password: p, permissions: {publish: ["$JS.API.INFO"], subscribe: [">"]}},
        ] }
        """
    )
    with NatsServer(nats_binary, tmp_path, arguments=["-c", str(config)]) as server:
        async with connected(f"nats://reader:p@{server.address}") as registry:
            with pytest.raises(ServiceNotFound):
                await registry.get("greeter")
            with pytest.raises(PermissionDenied, match=r"micro\.registry\.nats\.watch"):
                await registry.register(NODE, ttl=60)
        with pytest.raises(PermissionDenied, match=r"subscription.*micro\.registry\.nats\.watch"):
            async with connected(f"nats://deaf:p@{server.address}"):
                pass
        with pytest.raises(PermissionDenied, match=r"js\.api\.stream\.info"):
            async with connected(f"nats-kv://kv:p@{server.address}"):
                pass


@pytest.mark.asyncio
async def test_a_right_that_is_taken_and_given_back_is_used_again(
    nats_binary: Path, tmp_path: Path, connected: Connected
) -> None:
    config = tmp_path / "nats.conf"

    def allow(subscribe: str) -> None:
        config.write_text(
            "authorization { users: [{user: me, password: p, permissions: "
            f'{{publish: [">"], subscribe: ["_INBOX.>", "{subscribe}"]}}}}] }}'
        )

    async def may_register() -> bool:
        try:
            await registered.register(NODE, ttl=60)
        except PermissionDenied:
            return False
        return True

    async def may_not() -> bool:
        return not await may_register()

    allow("micro.registry.nats.>")
    with NatsServer(nats_binary, tmp_path, arguments=["-c", str(config)]) as server:
        async with connected(f"nats://me:p@{server.address}") as registered:
            allow("micro.registry.nats.query")
            os.kill(server.pid, signal.SIGHUP)  # it reads the file again
            await eventually(may_not, within=SLACK)
            allow("micro.registry.nats.>")
            os.kill(server.pid, signal.SIGHUP)
            await eventually(may_register, within=2 + SLACK)
