"""What stands in etcd: entries as Go Micro's, each under a lease of its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from micro.errors import ServiceNotFound, Unavailable, Unsupported
from micro.record import decode_node, encode_node
from micro.registry import Node, Snapshot
from micro.testing import eventually
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry, _api

Ask = Callable[..., dict[str, Any]]
Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
OTHER = msgspec.structs.replace(NODE, address="127.0.0.1:9302")
#: Seconds that a busy machine gets.
SLACK = 2.0


def captured(name: str) -> dict[str, str]:
    """The key and the value that Go Micro wrote."""
    vector: dict[str, str] = json.loads(
        (Path(__file__).parent / "vectors" / f"{name}.json").read_text()
    )
    return vector


def entries(ask: Ask, etcd: EtcdServer, prefix: bytes) -> list[dict[str, Any]]:
    """What stands under the keys that begin with ``prefix``."""
    end = prefix[:-1] + bytes([prefix[-1] + 1])
    found: list[dict[str, Any]] = ask(etcd, "kv/range", key=prefix, range_end=end).get("kvs", [])
    return found


def leases(ask: Ask, etcd: EtcdServer) -> set[int]:
    return {lease["ID"] for lease in ask(etcd, "lease/leases").get("leases", [])}


async def snapshot(registry: EtcdRegistry, service: str | None) -> Snapshot:
    async with aclosing(registry.follow(service, None)) as stream:
        _, item = await anext(stream)
    assert isinstance(item, Snapshot)
    return item


# -- entries --------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["etcd-service", "etcd-broker"])
async def test_an_entry_is_go_micros_byte_for_byte(
    ask: Ask, connected: Connected, etcd: EtcdServer, name: str
) -> None:
    vector = captured(name)
    node = decode_node(vector["value"].encode())
    async with connected(etcd.url) as registry:
        await registry.register(node, ttl=60)
        (entry,) = entries(ask, etcd, vector["key"].encode())
        await registry.deregister(node)
    assert entry["key"] == vector["key"].encode()
    assert entry["value"] == vector["value"].encode()


@pytest.mark.asyncio
async def test_the_lease_of_an_entry_lives_as_long_as_was_asked_for(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    (entry,) = entries(ask, etcd, prefix)
    assert ask(etcd, "lease/timetolive", ID=entry["lease"])["grantedTTL"] == 60


@pytest.mark.asyncio
async def test_part_of_a_second_is_a_second_for_the_lease(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=2.1)
    (entry,) = entries(ask, etcd, prefix)
    assert ask(etcd, "lease/timetolive", ID=entry["lease"])["grantedTTL"] == 3


@pytest.mark.asyncio
async def test_an_entry_that_go_wrote_is_found(
    ask: Ask, connected: Connected, etcd: EtcdServer
) -> None:
    vector = captured("etcd-service")
    key, value = vector["key"].encode(), vector["value"].encode()
    ask(etcd, "kv/put", key=key, value=value)
    async with connected(etcd.url) as registry:
        (node,) = await registry.get("helloworld")
        assert await registry.services() == ("helloworld",)
        assert await snapshot(registry, "helloworld") == Snapshot(nodes=(node,))
    ask(etcd, "kv/deleterange", key=key)
    assert encode_node(node) == value


@pytest.mark.asyncio
async def test_a_path_stands_before_the_keys(
    ask: Ask, connected: Connected, etcd: EtcdServer, etcd_url: str
) -> None:
    async with connected(f"{etcd.url}/prod/eu") as registry:
        await registry.register(NODE, ttl=60)
        (entry,) = entries(ask, etcd, b"/prod/")
        await registry.deregister(NODE)
    assert entry["key"] == b"/prod/eu/micro/registry/greeter/greeter-1"


@pytest.mark.asyncio
async def test_a_service_is_not_mixed_with_one_whose_name_goes_on(registry: EtcdRegistry) -> None:
    longer = msgspec.structs.replace(NODE, service="greeter-v2")
    await registry.register(NODE, ttl=60)
    await registry.register(longer, ttl=60)
    assert await registry.get("greeter") == (NODE,)
    assert await registry.services() == ("greeter", "greeter-v2")


@pytest.mark.asyncio
async def test_what_is_no_node_is_counted_and_skipped(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    for number, value in enumerate([b"", b"\xff\xfe", b"{}", b"[" * 10_000, b"x" * 70_000]):
        ask(etcd, "kv/put", key=b"%sgreeter/%d" % (prefix, number), value=value)
    assert await registry.get("greeter") == (NODE,)
    assert registry.dropped == 5
    assert await registry.services() == ("greeter",)
    assert registry.dropped == 10


@pytest.mark.asyncio
@pytest.mark.parametrize("key", [b"greeter/greeter-2", b"other/greeter-1", b"greeter/a/greeter-1"])
async def test_an_entry_under_a_key_that_is_not_its_nodes_is_counted_and_skipped(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes, key: bytes
) -> None:
    ask(etcd, "kv/put", key=prefix + key, value=encode_node(NODE))
    assert await registry.services() == ()
    assert registry.dropped == 1


# -- more than one page ---------------------------------------------------------------------------


@pytest.fixture
def crowd(ask: Ask, etcd: EtcdServer, prefix: bytes) -> Iterator[list[Node]]:
    """Nodes that fill more than two pages of answers."""
    nodes = [msgspec.structs.replace(NODE, id=f"n-{n:04}") for n in range(2 * _api._PAGE + 10)]
    for first in range(0, len(nodes), 100):
        puts = [
            {"request_put": {"key": prefix + b"greeter/" + node.id.encode(), "value": record}}
            for node in nodes[first : first + 100]
            for record in [encode_node(node)]
        ]
        ask(etcd, "kv/txn", success=puts)
    yield nodes
    ask(etcd, "kv/deleterange", key=prefix, range_end=prefix[:-1] + b"0")


@pytest.mark.asyncio
async def test_nodes_of_several_pages_are_listed(registry: EtcdRegistry, crowd: list[Node]) -> None:
    assert await registry.get("greeter") == tuple(crowd)
    assert (await snapshot(registry, "greeter")).nodes == tuple(crowd)
    assert await registry.services() == ("greeter",)


@pytest.mark.asyncio
async def test_the_pages_of_an_answer_are_of_one_moment(
    ask: Ask,
    etcd: EtcdServer,
    registry: EtcdRegistry,
    prefix: bytes,
    crowd: list[Node],
) -> None:
    first, last = (msgspec.structs.replace(NODE, id=id_) for id_ in ("a", "z"))
    done = asyncio.Event()

    def move(away: Node, here: Node) -> None:
        put = {"key": prefix + b"greeter/" + here.id.encode(), "value": encode_node(here)}
        gone = {"key": prefix + b"greeter/" + away.id.encode()}
        both = [{"request_put": put}, {"request_delete_range": gone}]
        ask(etcd, "kv/txn", success=both)

    async def move_on() -> None:
        while not done.is_set():
            await asyncio.to_thread(move, first, last)
            await asyncio.to_thread(move, last, first)

    async def ends() -> str:
        return "".join(node.id for node in await registry.get("greeter") if node not in crowd)

    move(last, first)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(move_on())
        seen = [await ends() for _ in range(40)]
        done.set()
    assert set(seen) == {"a", "z"}


@pytest.mark.asyncio
async def test_a_compaction_between_two_pages_is_unavailable(
    ask: Ask,
    etcd: EtcdServer,
    registry: EtcdRegistry,
    crowd: list[Node],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert registry._etcd is not None
    client = registry._etcd._client
    call, key = client.call, registry._key(crowd[0])

    async def call_and_compact(*args: Any) -> Any:
        answer = await call(*args)
        now = ask(etcd, "kv/put", key=key, value=b"")["header"]["revision"]
        ask(etcd, "kv/compaction", revision=now)
        return answer

    monkeypatch.setattr(client, "call", call_and_compact)
    with pytest.raises(Unavailable, match="compacted, while it was read; try again"):
        await registry.get("greeter")
    monkeypatch.undo()
    assert await registry.get("greeter") == tuple(crowd[1:])


# -- heartbeats -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_heartbeat_writes_nothing_and_keeps_the_lease(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    before = ask(etcd, "kv/range", key=prefix + b"greeter/greeter-1")
    held = leases(ask, etcd)
    for _ in range(3):
        await registry.register(NODE, ttl=60)
    assert ask(etcd, "kv/range", key=prefix + b"greeter/greeter-1") == before
    assert leases(ask, etcd) == held


@pytest.mark.asyncio
async def test_a_heartbeat_gives_the_lease_its_whole_time_again(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    (entry,) = entries(ask, etcd, prefix)

    def left() -> int:
        seconds: int = ask(etcd, "lease/timetolive", ID=entry["lease"])["TTL"]
        return seconds

    await eventually(lambda: left() < 59)
    await registry.register(NODE, ttl=60)
    assert left() >= 59


@pytest.mark.asyncio
@pytest.mark.parametrize("damage", ["deleted", "overwritten", "under no lease", "another lease"])
async def test_a_heartbeat_restores_the_entry_that_somebody(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes, damage: str
) -> None:
    await registry.register(NODE, ttl=60)
    (before,) = entries(ask, etcd, prefix)
    key, value = before["key"], before["value"]
    if damage == "deleted":
        ask(etcd, "kv/deleterange", key=key)
    elif damage == "overwritten":
        ask(etcd, "kv/put", key=key, value=b"garbage", lease=before["lease"])
    else:
        lease = ask(etcd, "lease/grant", TTL=60)["ID"] if damage == "another lease" else 0
        ask(etcd, "kv/put", key=key, value=value, lease=lease)
    await registry.register(NODE, ttl=60)
    (after,) = entries(ask, etcd, prefix)
    assert (after["key"], after["value"], after["lease"]) == (key, value, before["lease"])


@pytest.mark.asyncio
async def test_a_heartbeat_replaces_a_lease_that_is_gone(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    (before,) = entries(ask, etcd, prefix)
    ask(etcd, "lease/revoke", ID=before["lease"])
    assert entries(ask, etcd, prefix) == []
    await registry.register(NODE, ttl=60)
    (after,) = entries(ask, etcd, prefix)
    assert after["lease"] not in (before["lease"], 0)
    assert after["value"] == before["value"]


@pytest.mark.asyncio
async def test_a_lease_that_ends_during_the_heartbeat_is_replaced_in_it(
    ask: Ask,
    etcd: EtcdServer,
    registry: EtcdRegistry,
    prefix: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await registry.register(NODE, ttl=60)
    (before,) = entries(ask, etcd, prefix)
    assert registry._etcd is not None
    keep_alive = registry._etcd.keep_alive

    async def keep_alive_and_lose(lease: int) -> bool:
        kept = await keep_alive(lease)
        ask(etcd, "lease/revoke", ID=lease)
        return kept

    monkeypatch.setattr(registry._etcd, "keep_alive", keep_alive_and_lose)
    await registry.register(NODE, ttl=60)
    (after,) = entries(ask, etcd, prefix)
    assert after["lease"] != before["lease"]


@pytest.mark.asyncio
async def test_a_new_lease_that_ends_at_once_is_unavailable(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry._etcd is not None
    grant = registry._etcd.grant

    async def grant_and_lose(ttl: int) -> tuple[int, int]:
        lease, granted = await grant(ttl)
        ask(etcd, "lease/revoke", ID=lease)
        return lease, granted

    monkeypatch.setattr(registry._etcd, "grant", grant_and_lose)
    with pytest.raises(Unavailable, match="the lease of 60 s ended at once"):
        await registry.register(NODE, ttl=60)
    monkeypatch.undo()
    await registry.register(NODE, ttl=60)
    assert await registry.get("greeter") == (NODE,)


@pytest.mark.asyncio
async def test_another_ttl_leaves_no_lease_behind(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    others = leases(ask, etcd)
    for ttl in (60, 30, 60):
        await registry.register(NODE, ttl=ttl)
        (entry,) = entries(ask, etcd, prefix)
        assert leases(ask, etcd) - others == {entry["lease"]}
        assert ask(etcd, "lease/timetolive", ID=entry["lease"])["grantedTTL"] == ttl


@pytest.mark.asyncio
async def test_deregister_leaves_no_lease_behind(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    others = leases(ask, etcd)
    await registry.register(NODE, ttl=60)
    await registry.deregister(NODE)
    assert leases(ask, etcd) == others
    assert entries(ask, etcd, prefix) == []


@pytest.mark.asyncio
async def test_deregister_is_quiet_about_a_lease_that_is_gone(
    ask: Ask, etcd: EtcdServer, registry: EtcdRegistry, prefix: bytes
) -> None:
    await registry.register(NODE, ttl=60)
    (entry,) = entries(ask, etcd, prefix)
    ask(etcd, "lease/revoke", ID=entry["lease"])
    await registry.deregister(NODE)
    with pytest.raises(ServiceNotFound):
        await registry.get("greeter")


@pytest.mark.asyncio
async def test_deregister_forgets_what_another_process_registered(
    registry: EtcdRegistry, connected: Connected, etcd_url: str
) -> None:
    async with connected(etcd_url) as other:
        await registry.register(NODE, ttl=60)
        await other.deregister(OTHER)
        with pytest.raises(ServiceNotFound):
            await registry.get("greeter")


# -- time to live ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_server_that_would_keep_a_node_much_longer_is_unsupported_and_keeps_no_lease(
    ask: Ask, connected: Connected, etcd_binary: Path, tmp_path: Path
) -> None:
    slow = ("--election-timeout=6000", "--heartbeat-interval=600")  # a lease has 9 s at least
    server = EtcdServer(etcd_binary, tmp_path, arguments=slow)
    await asyncio.to_thread(server.start)
    try:
        async with connected(server.url) as registry:
            text = "keeps a node for 9 s at least, .*; set register_ttl to that, from 4 s"
            with pytest.raises(Unsupported, match=text):
                await registry.register(NODE, ttl=4)
            assert leases(ask, server) == set()
            assert entries(ask, server, b"/micro/") == []
            await registry.register(NODE, ttl=9)
            assert await registry.get("greeter") == (NODE,)
    finally:
        server.kill()


@pytest.mark.asyncio
async def test_a_node_of_a_dead_process_is_gone_after_its_ttl_also_over_a_restart(
    connected: Connected, etcd: EtcdServer, etcd_url: str, registry: EtcdRegistry
) -> None:
    async def is_gone() -> bool:
        try:
            await registry.get("greeter")
        except ServiceNotFound:
            return True
        except Unavailable:
            pass
        return False

    ttl = 2.0
    async with connected(etcd_url) as dying:
        await dying.register(NODE, ttl=ttl)
    began = time.monotonic()
    await eventually(is_gone, within=ttl + SLACK)
    assert time.monotonic() - began > ttl - 0.5
    async with connected(etcd_url) as dying:
        await dying.register(NODE, ttl=ttl)
    await asyncio.to_thread(etcd.restart)
    await eventually(is_gone, within=ttl + SLACK)  # a lease has its whole time again
