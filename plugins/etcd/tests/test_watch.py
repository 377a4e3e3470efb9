"""Following: every change in order and once, or a Gap, or Unavailable; never a silent hole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import msgspec
import pytest

from micro.backend import Connections
from micro.errors import Closed, Gap, Unavailable
from micro.record import encode_node
from micro.registry import Change, Node, Snapshot
from micro.testing import eventually
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry, _channel
from micro_plugin_etcd._history import Mark

Ask = Callable[..., dict[str, Any]]
Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]
Item = Snapshot | Change | None

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, id="greeter-2")
#: Seconds that a busy machine gets.
SLACK = 2.0


def large(id_: str, step: int) -> Node:
    """A node of 60 KiB, that a number tells from others."""
    return msgspec.structs.replace(NODE, id=id_, metadata={"step": f"{step:61440}"})


def revision(ask: Ask, etcd: EtcdServer) -> int:
    now: int = ask(etcd, "kv/range", key=b"none")["header"]["revision"]
    return now


def compact(ask: Ask, etcd: EtcdServer) -> None:
    """Have it forget all changes so far."""
    ask(etcd, "kv/compaction", revision=revision(ask, etcd))


def put(ask: Ask, etcd: EtcdServer, prefix: bytes, *nodes: Node) -> None:
    """Put these nodes in one transaction."""
    puts = [{"key": key(prefix, node), "value": encode_node(node)} for node in nodes]
    ask(etcd, "kv/txn", success=[{"request_put": each} for each in puts])


def key(prefix: bytes, node: Node) -> bytes:
    return prefix + f"{node.service}/{node.id}".encode()


async def read(
    registry: EtcdRegistry, mark: object = None, *, items: int, service: str | None = "greeter"
) -> tuple[object, list[Item]]:
    """So many items that come after ``mark``, and the mark after them."""
    found: list[Item] = []
    async with aclosing(registry.follow(service, mark)) as stream, asyncio.timeout(10):
        async for mark_after, item in stream:
            mark = mark_after
            found.append(item)
            if len(found) == items:
                return mark, found
    raise AssertionError("the stream ended")


async def start(registry: EtcdRegistry) -> object:
    """The mark after a snapshot."""
    mark, _ = await read(registry, items=1)
    return mark


# -- what changes mean ----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_an_entry_that_becomes_garbage_is_a_delete_and_a_create_when_it_is_mended(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    async with aclosing(registry.follow("greeter", None)) as stream, asyncio.timeout(SLACK):
        assert (await anext(stream))[1] == Snapshot(nodes=(NODE,))
        ask(etcd, "kv/put", key=key(prefix, NODE), value=b"garbage")
        assert (await anext(stream))[1] == Change(kind="delete", node=NODE)
        ask(etcd, "kv/put", key=key(prefix, NODE), value=b"other garbage")
        await registry.register(NODE, ttl=60)
        assert (await anext(stream))[1] == Change(kind="create", node=NODE)
    assert registry.dropped >= 4  # each was read twice: as it came, and as what was before


@pytest.mark.asyncio
async def test_an_entry_that_becomes_that_of_another_node_is_a_delete(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    mark = await start(registry)
    ask(etcd, "kv/put", key=key(prefix, NODE), value=encode_node(OTHER))
    _, items = await read(registry, mark, items=2)
    assert items == [None, Change(kind="delete", node=NODE)]


@pytest.mark.asyncio
async def test_garbage_beside_the_nodes_is_counted_and_ends_no_stream(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    mark = await start(registry)
    ask(etcd, "kv/put", key=prefix + b"greeter/garbage", value=b"garbage")
    ask(etcd, "kv/deleterange", key=prefix + b"greeter/garbage")
    put(ask, etcd, prefix, NODE)
    _, items = await read(registry, mark, items=2)
    assert items == [None, Change(kind="create", node=NODE)]
    assert registry.dropped == 2


@pytest.mark.asyncio
async def test_an_entry_that_go_writes_is_followed(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    mark = await start(registry)
    record = b'{"name":"greeter","version":"","metadata":null,"endpoints":null,"nodes":[%s]}'
    node = b'{"metadata":null,"id":"greeter-1","address":"10.0.0.1:1"}'
    ask(etcd, "kv/put", key=key(prefix, NODE), value=record % node)
    _, items = await read(registry, mark, items=2)
    (change,) = (item for item in items if isinstance(item, Change))
    assert (change.kind, change.node.address) == ("create", "10.0.0.1:1")


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_who_goes_on_is_told_so_at_once(registry: EtcdRegistry) -> None:
    mark = await start(registry)
    for _ in range(3):
        began = time.monotonic()
        assert await read(registry, mark, items=1) == (mark, [None])
        assert time.monotonic() - began < SLACK


@pytest.mark.asyncio
async def test_two_nodes_in_one_transaction_both_come_to_who_stops_in_between(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    mark = await start(registry)
    put(ask, etcd, prefix, NODE, OTHER)
    mark, items = await read(registry, mark, items=2)
    assert items == [None, Change(kind="create", node=NODE)]
    mark, items = await read(registry, mark, items=3)
    assert items[-1] == Change(kind="create", node=OTHER)
    await registry.register(msgspec.structs.replace(NODE, version="2"), ttl=60)
    _, items = await read(registry, mark, items=2)
    assert [item.kind for item in items if item] == ["update"]  # type: ignore[union-attr] # no Snapshot


@pytest.mark.asyncio
async def test_changes_of_many_messages_come_in_order_and_once(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    mark = await start(registry)
    nodes = [large(f"n-{step % 10}", step) for step in range(100)]
    for node in nodes:
        await asyncio.to_thread(put, ask, etcd, prefix, node)
    _, items = await read(registry, mark, items=101)
    assert items[0] is None
    kinds = ["create"] * 10 + ["update"] * 90
    assert items[1:] == [
        Change(kind=kind, node=node)  # type: ignore[arg-type] # kinds are what they should be
        for kind, node in zip(kinds, nodes, strict=True)
    ]


@pytest.mark.asyncio
async def test_a_transaction_larger_than_a_message_comes_whole_and_once(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    mark = await start(registry)
    rounds = [[large(f"n-{n:02}", step) for n in range(18)] for step in range(3)]
    for nodes in rounds:
        await asyncio.to_thread(put, ask, etcd, prefix, *nodes)
    _, items = await read(registry, mark, items=1 + 3 * 18)
    told = [item.node for item in items if isinstance(item, Change)]
    assert told == [node for nodes in rounds for node in nodes]


@pytest.mark.asyncio
async def test_who_stops_within_a_large_transaction_misses_nothing_of_it(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    first, then = ([large(f"n-{n:02}", step) for n in range(18)] for step in range(2))
    await asyncio.to_thread(put, ask, etcd, prefix, *first)
    mark = await start(registry)
    await asyncio.to_thread(put, ask, etcd, prefix, *then)
    for stop_after in range(1, 18):
        after, _ = await read(registry, mark, items=1 + stop_after)
        _, items = await read(registry, after, items=1 + 18)
        assert [item.node for item in items if isinstance(item, Change)] == then


# -- gaps -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_to_go_on_from_a_compacted_revision_is_a_gap(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry
) -> None:
    mark = await start(registry)
    for version in "12":
        await registry.register(msgspec.structs.replace(NODE, version=version), ttl=60)
    compact(ask, etcd)
    with pytest.raises(Gap, match="compacted"):
        await read(registry, mark, items=1)


@pytest.mark.asyncio
async def test_a_compaction_of_nothing_new_is_no_gap(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry
) -> None:
    await registry.register(NODE, ttl=60)
    mark = await start(registry)
    compact(ask, etcd)
    assert await read(registry, mark, items=1) == (mark, [None])
    await registry.deregister(NODE)
    _, items = await read(registry, mark, items=2)
    assert items == [None, Change(kind="delete", node=NODE)]


@pytest.mark.asyncio
async def test_a_delete_whose_revision_is_compacted_is_a_gap(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry
) -> None:
    await registry.register(NODE, ttl=60)
    mark = await start(registry)
    await registry.deregister(NODE)
    compact(ask, etcd)  # from here, etcd tells of the delete, and not of what it deleted
    with pytest.raises(Gap):
        await read(registry, mark, items=2)


@pytest.mark.asyncio
async def test_deletes_that_are_compacted_before_a_slow_reader_has_them_are_a_gap(
    ask: Ask,
    etcd: EtcdServer,
    etcd_url: str,
    connected: Connected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))  # is sent ahead
    monkeypatch.setattr(_channel, "_OPTIONS", (*_channel._OPTIONS, *little))
    nodes = [large(f"n-{n:02}", n) for n in range(40)]
    async with connected(etcd_url) as registry:
        for node in nodes:
            await registry.register(node, ttl=60)
        async with aclosing(registry.follow("greeter", None)) as stream, asyncio.timeout(10):
            await anext(stream)
            await registry.register(NODE, ttl=60)
            await anext(stream)  # so that the watch is open, and from now on nobody reads
            for node in nodes:
                ask(etcd, "kv/deleterange", key=registry._key(node))
            compact(ask, etcd)
            with pytest.raises(Gap):
                for node in nodes:
                    assert (await anext(stream))[1] == Change(kind="delete", node=node)


@pytest.mark.asyncio
async def test_a_mark_that_the_server_has_not_reached_is_a_gap(registry: EtcdRegistry) -> None:
    mark = await start(registry)
    assert isinstance(mark, Mark)
    for ahead in (mark._replace(revision=mark.revision + 1), mark._replace(term=mark.term + 1)):
        with pytest.raises(Gap):
            await read(registry, ahead, items=1)


@pytest.mark.asyncio
async def test_to_go_on_at_a_server_that_lost_its_data_is_a_gap(
    etcd: EtcdServer, registry: EtcdRegistry, connected: Connected, etcd_url: str
) -> None:
    for version in "123":
        await registry.register(msgspec.structs.replace(NODE, version=version), ttl=60)
    mark = await start(registry)
    await asyncio.to_thread(etcd.restart, keep_data=False)
    async with connected(etcd_url) as other:
        with pytest.raises(Gap):
            await read(other, mark, items=1)


@pytest.mark.asyncio
@pytest.mark.parametrize("before", [(), (NODE,), (NODE, OTHER)])
async def test_to_go_on_at_a_server_that_lost_its_data_and_has_as_much_again_is_a_gap(
    ask: Ask,
    etcd: EtcdServer,
    registry: EtcdRegistry,
    prefix: bytes,
    before: tuple[Node, ...],
) -> None:
    ask(etcd, "kv/put", key=b"of others", value=b"")  # so that there is a revision before ours
    for node in before:
        await registry.register(node, ttl=60)
    mark = await start(registry)
    assert isinstance(mark, Mark)
    await asyncio.to_thread(etcd.restart, keep_data=False)
    for _ in range(mark.revision):
        put(ask, etcd, prefix, NODE, OTHER)
    async with asyncio.timeout(10):
        with pytest.raises(Gap):
            # Its term is no less either: it was restarted as often.
            await eventually(lambda: goes_on(registry, mark._replace(term=0)))


async def goes_on(registry: EtcdRegistry, mark: object) -> bool:
    try:
        await read(registry, mark, items=1)
    except Unavailable:  # it has just been started
        return False
    return True


@pytest.mark.asyncio
async def test_to_go_on_at_a_server_that_was_restarted_is_no_gap(
    etcd: EtcdServer, registry: EtcdRegistry, connected: Connected, etcd_url: str
) -> None:
    await registry.register(NODE, ttl=60)
    mark = await start(registry)
    await registry.register(OTHER, ttl=60)
    await asyncio.to_thread(etcd.restart)
    async with connected(etcd_url) as other:
        _, items = await read(other, mark, items=2)
    assert items == [None, Change(kind="create", node=OTHER)]


# -- how a stream ends ----------------------------------------------------------------------------


async def listen(registry: EtcdRegistry, told: list[Item]) -> None:
    async with aclosing(registry.follow("greeter", None)) as stream:
        async for _, item in stream:
            told.append(item)


@pytest.mark.asyncio
async def test_a_quiet_stream_of_an_idle_server_goes_on(registry: EtcdRegistry) -> None:
    told: list[Item] = []
    listening = asyncio.create_task(listen(registry, told))
    ended, _ = await asyncio.wait([listening], timeout=5.0)  # a silent one would have ended by now
    assert not ended
    await registry.register(NODE, ttl=60)
    await eventually(lambda: told == [Snapshot(nodes=()), Change(kind="create", node=NODE)])
    listening.cancel()
    await asyncio.wait([listening])
    assert listening.cancelled()


@pytest.mark.asyncio
@pytest.mark.parametrize("quiet", [0.0, 0.5])
async def test_a_paused_server_ends_a_stream_as_unavailable(
    etcd: EtcdServer, registry: EtcdRegistry, quiet: float
) -> None:
    told: list[Item] = []
    listening = asyncio.create_task(listen(registry, told))
    await eventually(lambda: told)
    await registry.register(NODE, ttl=60)
    await eventually(lambda: len(told) == 2)  # so that it is open
    await asyncio.wait([listening], timeout=quiet)  # after that, gRPC alone takes 8 s
    await asyncio.to_thread(etcd.pause)
    try:
        with pytest.raises(Unavailable):
            async with asyncio.timeout(4.0 + SLACK):
                await listening
    finally:
        etcd.resume()


@pytest.mark.asyncio
async def test_a_killed_server_ends_a_stream_as_unavailable(
    etcd: EtcdServer, registry: EtcdRegistry
) -> None:
    told: list[Item] = []
    listening = asyncio.create_task(listen(registry, told))
    await eventually(lambda: told)
    await asyncio.to_thread(etcd.kill)
    with pytest.raises(Unavailable):
        async with asyncio.timeout(SLACK):
            await listening


@pytest.mark.asyncio
async def test_to_close_the_connections_during_a_stream_is_closed_and_no_cancellation(
    connected: Connected, etcd_url: str
) -> None:
    connections, told = Connections(), list[Item]()
    async with connected(etcd_url, connections) as registry:
        listening = asyncio.create_task(listen(registry, told))
        await eventually(lambda: told)
        await registry.register(NODE, ttl=60)
        await eventually(lambda: len(told) == 2)  # so that it is open
        await connections.aclose()
        with pytest.raises(Closed):
            async with asyncio.timeout(SLACK):
                await listening


@pytest.mark.asyncio
async def test_to_close_a_registry_ends_its_streams_and_not_those_of_others(
    connected: Connected, etcd_url: str
) -> None:
    connections, told, kept = Connections(), list[Item](), list[Item]()
    async with connected(etcd_url, connections) as stays:
        async with connected(etcd_url, connections) as closes:
            ending = asyncio.create_task(listen(closes, told))
            staying = asyncio.create_task(listen(stays, kept))
            await eventually(lambda: told and kept)
            await stays.register(NODE, ttl=60)
            await eventually(lambda: len(told) == len(kept) == 2)  # so that they are open
        with pytest.raises(Closed):
            async with asyncio.timeout(SLACK):
                await ending
        await stays.deregister(NODE)
        await eventually(lambda: Change(kind="delete", node=NODE) in kept)
        staying.cancel()
        await asyncio.wait([staying])
    await connections.aclose()
