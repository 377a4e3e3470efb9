"""Discovery by multicast; each test in a network of its own where this machine allows that.

Elsewhere they run in the network of the machine, with names that are used once, and those that need
two hosts are skipped.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from micro.backend import Connections
from micro.backends._mdns_wire import Zone, parse
from micro.backends.mdns import MDNSRegistry
from micro.errors import Closed, ConfigError, Gap, ServiceNotFound, TooLarge, Unavailable
from micro.registry import Change, Node, Snapshot
from micro.testing import eventually
from micro.url import URL

VECTORS = Path(__file__).parent / "vectors"
GROUP = ("224.0.0.251", 5353)
MICRO = Zone("", "test")
#: What a busy machine may take longer than promised.
SLACK = 2.0

_NEW_NETWORK = 0x40000000


@pytest.fixture(autouse=True)
def network() -> Iterator[bool]:
    """A network with nothing but lo, for this test alone; False where that is not allowed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "unshare"):
        yield False
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_NEW_NETWORK) != 0:
            yield False
            return
        try:
            ip("link", "set", "lo", "up")
            yield True
        finally:
            assert libc.setns(home, _NEW_NETWORK) == 0
    finally:
        os.close(home)


@pytest.fixture
def own_network(network: bool) -> None:
    if not network:
        pytest.skip("needs a network namespace")


def ip(*command: str, pid: int | None = None) -> None:
    inside = [] if pid is None else ["nsenter", "-t", str(pid), "-n"]
    subprocess.run([*inside, "ip", *command], check=True)


@contextmanager
def other_host() -> Iterator[int]:
    """Another host on a cable to this one: we are 10.77.0.1, it is 10.77.0.2. Gives a pid in it."""
    inside = subprocess.Popen(["unshare", "-n", "sleep", "300"])
    try:
        here = Path("/proc/thread-self/ns/net").readlink()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{inside.pid}/ns/net").readlink() == here:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        ip("link", "set", "lo", "up", pid=inside.pid)
        yield inside.pid
    finally:
        inside.kill()
        inside.wait()


def cable(pid: int) -> None:
    ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(pid))
    for name, number, where in (("here", 1, None), ("there", 2, pid)):
        ip("addr", "add", f"10.77.0.{number}/24", "dev", name, pid=where)
        ip("link", "set", name, "up", pid=where)


#: For answers that come from another process, when the machine is busy.
PATIENT = "mdns://?timeout=3s"


@asynccontextmanager
async def connected(url: str = "mdns") -> AsyncIterator[MDNSRegistry]:
    registry = MDNSRegistry(URL.parse(url, source="test"))
    await registry.connect(Connections())
    try:
        yield registry
    finally:
        await registry.aclose()


@pytest_asyncio.fixture
async def registry() -> AsyncIterator[MDNSRegistry]:
    async with connected() as registry:
        yield registry


@pytest_asyncio.fixture
async def other() -> AsyncIterator[MDNSRegistry]:
    async with connected() as registry:
        yield registry


PEER = """
import asyncio, json, sys
import msgspec
from micro.backend import Connections
from micro.backends.mdns import MDNSRegistry
from micro.errors import ServiceNotFound
from micro.registry import Node
from micro.url import URL

async def main():
    registry = MDNSRegistry(URL.parse("mdns://?timeout=3s"))
    await registry.connect(Connections())
    for node, ttl in msgspec.json.decode(sys.argv[1], type=list[tuple[Node, float]]):
        await registry.register(node, ttl=ttl)
    print("ready", flush=True)
    while service := (await asyncio.to_thread(sys.stdin.readline)).strip():
        try:
            nodes = await registry.get(service)
        except ServiceNotFound:
            nodes = ()
        print(msgspec.json.encode(nodes).decode(), flush=True)
    await registry.aclose()

asyncio.run(main())
"""


class Peer:
    """Another process, on this host or on another."""

    def __init__(self, *nodes: Node, ttl: float = 30, pid: int | None = None) -> None:
        inside = [] if pid is None else ["nsenter", "-t", str(pid), "-n"]
        said = msgspec.json.encode([(node, ttl) for node in nodes]).decode()
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-c", PEER, said],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def get(self, service: str) -> tuple[Node, ...]:
        assert self.process.stdin is not None
        self.process.stdin.write(service + "\n")
        self.process.stdin.flush()
        return msgspec.json.decode(await self.line(), type=tuple[Node, ...])

    async def line(self) -> str:
        assert self.process.stdout is not None
        return await asyncio.to_thread(self.process.stdout.readline)

    async def kill(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.communicate)

    async def leave(self) -> None:
        """End as a program does."""
        await asyncio.to_thread(self.process.communicate)


@asynccontextmanager
async def peer(*nodes: Node, ttl: float = 30, pid: int | None = None) -> AsyncIterator[Peer]:
    process = Peer(*nodes, ttl=ttl, pid=pid)
    try:
        assert await process.line() == "ready\n"
        yield process
    finally:
        if process.process.poll() is None:
            await process.kill()


def unique() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


def node_(service: str | None = None, **fields: Any) -> Node:
    node = Node(service=service or unique(), id=uuid.uuid4().hex[:12], address="127.0.0.1:9301")
    return msgspec.structs.replace(node, **fields)


def same(nodes: Iterable[Node], others: Iterable[Node]) -> bool:
    return sorted(nodes, key=lambda node: node.id) == sorted(others, key=lambda node: node.id)


async def found(registry: MDNSRegistry, service: str) -> tuple[Node, ...]:
    try:
        return await registry.get(service)
    except ServiceNotFound:
        return ()


Items = AsyncGenerator[tuple[object, Snapshot | Change | None], None]


async def following(stream: Items) -> Snapshot | Change:
    async with asyncio.timeout(8):
        _, item = await anext(stream)
    assert item is not None  # which says that a stream goes on, and mDNS has none that does
    return item


class Follower:
    """What one who follows knows, and all changes that it was told."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[str, str], Node] = {}
        self.changes: list[tuple[str, Node]] = []
        self.entered = asyncio.Event()

    async def run(self, registry: MDNSRegistry, service: str | None) -> None:
        async with aclosing(registry.follow(service, None)) as stream:
            async for _, item in stream:
                if isinstance(item, Snapshot):
                    self.nodes = {(node.service, node.id): node for node in item.nodes}
                    self.entered.set()
                    continue
                assert item is not None
                key = (item.node.service, item.node.id)
                self.changes.append((item.kind, item.node))
                assert (item.kind == "create") == (key not in self.nodes)
                if item.kind == "delete":
                    del self.nodes[key]
                else:
                    self.nodes[key] = item.node


@asynccontextmanager
async def follow(registry: MDNSRegistry, service: str | None) -> AsyncIterator[Follower]:
    follower = Follower()
    task = asyncio.create_task(follower.run(registry, service))
    await asyncio.wait(
        [task, entered := asyncio.create_task(follower.entered.wait())],
        return_when=asyncio.FIRST_COMPLETED,
    )
    entered.cancel()
    try:
        yield follower
    finally:
        task.cancel()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(result, asyncio.CancelledError | None), result


def shout(wire: bytes, *, source: str = "127.0.0.1") -> None:
    """Send a packet to all on this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(source))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
        sock.sendto(wire, GROUP)


# -- finding each other ------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_two_processes_see_each_other_with_only_lo_up(registry: MDNSRegistry) -> None:
    service = unique()
    ours, theirs = node_(service, metadata={"a": "ours"}), node_(service, metadata={"a": "theirs"})
    await registry.register(ours, ttl=30)
    async with peer(theirs) as process:
        assert same(await registry.get(service), [ours, theirs])
        assert same(await process.get(service), [ours, theirs])
        assert service in await registry.services()


@pytest.mark.asyncio
async def test_a_process_that_ends_says_goodbye(registry: MDNSRegistry) -> None:
    node = node_()
    async with peer(node) as process, follow(registry, node.service) as follower:
        assert list(follower.nodes.values()) == [node]
        await process.leave()
        await eventually(lambda: follower.changes == [("delete", node)], within=2)
        assert await found(registry, node.service) == ()


@pytest.mark.asyncio
async def test_a_killed_process_vanishes_after_its_ttl_and_not_before(
    registry: MDNSRegistry,
) -> None:
    node = node_()
    began = time.monotonic()
    async with peer(node, ttl=2) as process, follow(registry, node.service) as follower:
        assert list(follower.nodes.values()) == [node]
        await process.kill()
        await eventually(lambda: not follower.nodes, within=3 + SLACK)
        assert time.monotonic() - began >= 2
        assert await found(registry, node.service) == ()


@pytest.mark.asyncio
async def test_a_process_restarted_under_its_id_takes_its_own_place(registry: MDNSRegistry) -> None:
    before = node_(metadata={"run": "1"})
    after = msgspec.structs.replace(before, metadata={"run": "2"}, address="127.0.0.1:9302")
    async with peer(before) as first, follow(registry, before.service) as follower:
        assert list(follower.nodes.values()) == [before]
        await first.kill()
        async with peer(after):
            await eventually(lambda: list(follower.nodes.values()) == [after], within=3)
            assert follower.changes == [("update", after)]
            assert await registry.get(before.service) == (after,)


@pytest.mark.asyncio
async def test_a_late_goodbye_of_a_former_process_does_not_last(
    own_network: None, registry: MDNSRegistry, other: MDNSRegistry
) -> None:
    node = node_()
    await registry.register(node, ttl=30)
    async with follow(other, node.service) as follower:
        with at_5353() as listens:
            shout(MICRO.announcement(MICRO.card(node), ttl=0))
            heard: list[int] = []
            while len(heard) < 2:
                said = await eventually(lambda: times_to_live(listens), within=0.2)
                heard += said or []
        assert heard[:2] == [0, 30]
        assert await other.get(node.service) == (node,)
        assert list(follower.nodes.values()) == [node]


def times_to_live(sock: socket.socket) -> list[int] | None:
    """Of the nodes that the next packet speaks of; None without a packet."""
    got = received(sock)
    return [said.ttl for said in MICRO.instances(parse(got[0]))] if got else None


@pytest.mark.asyncio
async def test_an_answer_read_after_the_goodbye_brings_nobody_back(registry: MDNSRegistry) -> None:
    """They come to two sockets, so that the order in which they are read says nothing."""
    card = MICRO.card(node_())
    question = parse(MICRO.query(card.node.service)).questions[0]
    here = ("127.0.0.1", 5353)
    async with follow(registry, card.node.service) as follower:
        registry._hear(MICRO.announcement(card, ttl=30), here, False)
        await eventually(lambda: follower.nodes)
        registry._hear(MICRO.announcement(card, ttl=0), here, False)
        registry._hear(MICRO.answer(question, card, ttl=30), here, True)
        await eventually(lambda: not follower.nodes)
        registry._hear(MICRO.announcement(card, ttl=30), here, False)
        await eventually(lambda: follower.nodes)


@pytest.mark.asyncio
async def test_a_node_just_deregistered_can_be_registered_again(
    own_network: None, registry: MDNSRegistry, other: MDNSRegistry
) -> None:
    node = node_()
    async with follow(other, node.service) as follower:
        with at_5353() as listens:
            for _ in range(3):
                await registry.register(node, ttl=30)
                await registry.deregister(node)
            await registry.register(node, ttl=30)
            await eventually(lambda: not registry._leaving)
            said: list[int] = []
            while (got := times_to_live(listens)) is not None:
                said += got
        assert said.count(0) == 3
        assert await other.get(node.service) == (node,)
        assert list(follower.nodes.values()) == [node]


@pytest.mark.asyncio
async def test_deregister_takes_that_node_alone(
    registry: MDNSRegistry, other: MDNSRegistry
) -> None:
    service = unique()
    gone, stays = node_(service), node_(service)
    for node in (gone, stays):
        await registry.register(node, ttl=30)
    async with follow(other, service) as follower:
        await eventually(lambda: len(follower.nodes) == 2)
        for node in (gone, gone, node_(service)):
            with pytest.raises(StopIteration):  # it waits for nothing, that others hear included
                registry.deregister(node).send(None)
        await eventually(lambda: list(follower.nodes.values()) == [stays], within=2)
        assert await registry.get(service) == await other.get(service) == (stays,)


@pytest.mark.asyncio
async def test_a_silent_node_vanishes_though_its_process_lives(
    registry: MDNSRegistry, other: MDNSRegistry
) -> None:
    silent, beating = node_(), node_()
    await registry.register(silent, ttl=2)
    began = time.monotonic()
    async with follow(registry, silent.service) as here, follow(other, None) as there:
        key = (silent.service, silent.id)
        gone: dict[str, float] = {}
        while len(gone) < 2:
            now = time.monotonic() - began
            assert now < 4 + SLACK
            await registry.register(beating, ttl=2)
            if key not in here.nodes:
                gone.setdefault("here", now)
            if key not in there.nodes:
                gone.setdefault("there", now)
            await asyncio.sleep(0.05)
        assert min(gone.values()) >= 1.9
        assert await found(registry, silent.service) == await found(other, silent.service) == ()
        assert (beating.service, beating.id) in there.nodes
        assert not [change for change in there.changes if change == ("delete", beating)]


class GoNode(asyncio.DatagramProtocol):
    """A node of Go: it answers who asks, and never speaks of itself."""

    def __init__(self, node: Node, ttl: int) -> None:
        self.asked = 0
        self.node, self.ttl = node, ttl

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        packet = parse(data)
        if not packet.is_answer and MICRO.is_asked(
            packet.questions[0].text, card := MICRO.card(self.node)
        ):
            self.asked += 1
            answer = MICRO.answer(packet.questions[0], card, ttl=self.ttl)
            for _ in range(3):  # once for each of its interfaces
                self.transport.sendto(answer, addr)


def at_5353() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("", 5353))
    membership = socket.inet_aton(GROUP[0]) + socket.inet_aton("127.0.0.1")
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    return sock


@asynccontextmanager
async def go_node(node: Node, ttl: int) -> AsyncIterator[GoNode]:
    loop = asyncio.get_running_loop()
    transport, silent = await loop.create_datagram_endpoint(
        lambda: GoNode(node, ttl), sock=at_5353()
    )
    try:
        yield silent
    finally:
        transport.close()


@pytest.mark.asyncio
async def test_a_node_that_never_speaks_is_asked_before_it_expires(registry: MDNSRegistry) -> None:
    node = node_()
    async with AsyncExitStack() as stack:
        silent = await stack.enter_async_context(go_node(node, ttl=1))
        follower = await stack.enter_async_context(follow(registry, node.service))
        assert list(follower.nodes.values()) == [node]
        await eventually(lambda: silent.asked >= 6, within=8)
        assert follower.changes == []
        silent.node = node_()
        await eventually(lambda: follower.changes == [("delete", node)], within=3)


# -- how long it takes -------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_first_call_goes_ahead_at_the_first_answer(registry: MDNSRegistry) -> None:
    node = node_()
    began = time.monotonic()
    await registry.register(node, ttl=30)
    async with connected("mdns://?timeout=5s") as patient:
        async with aclosing(patient.follow(node.service, None)) as stream:
            assert await following(stream) == Snapshot(nodes=(node,))
    assert time.monotonic() - began < 0.1 + SLACK


@pytest.mark.asyncio
async def test_get_waits_until_it_is_quiet_and_no_longer() -> None:
    node = node_()
    patient = "mdns://?timeout=5s"
    async with connected(patient) as registry, connected(patient) as other:
        await registry.register(node, ttl=30)
        for each in (registry, other):
            began = time.monotonic()
            assert await each.get(node.service) == (node,)
            assert 0.1 <= time.monotonic() - began < 0.1 + SLACK


@pytest.mark.asyncio
async def test_where_nobody_answers_the_wait_ends_after_the_timeout() -> None:
    async with connected("mdns://?timeout=300ms") as registry:
        service = unique()
        began = time.monotonic()
        with pytest.raises(ServiceNotFound, match=service):
            await registry.get(service)
        async with aclosing(registry.follow(service, None)) as stream:
            assert await following(stream) == Snapshot(nodes=())
        assert 0.6 <= time.monotonic() - began < 0.6 + SLACK


# -- following ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_each_change_is_told_once_however_many_interfaces_there_are(
    own_network: None,
) -> None:
    with other_host() as pid:
        cable(pid)
        async with connected() as registry, connected() as other:
            first = node_()
            second = msgspec.structs.replace(first, metadata={"weight": "2"})
            async with follow(other, first.service) as follower:
                await registry.register(first, ttl=30)
                await eventually(lambda: follower.changes == [("create", first)], within=3)
                await registry.register(second, ttl=30)
                await eventually(lambda: len(follower.changes) == 2, within=3)
                for _ in range(3):
                    await registry.register(second, ttl=30)
                await registry.deregister(second)
                await eventually(lambda: len(follower.changes) == 3, within=2)
                await eventually(lambda: not registry._leaving)
                kinds = [("create", first), ("update", second), ("delete", second)]
                assert follower.changes == kinds


@pytest.mark.asyncio
async def test_who_follows_all_sees_what_there_was_and_what_comes(
    registry: MDNSRegistry, other: MDNSRegistry
) -> None:
    was, comes = node_(), node_()
    await registry.register(was, ttl=30)
    async with follow(other, None) as follower:
        await eventually(lambda: was in follower.nodes.values(), within=3)
        await registry.register(comes, ttl=30)
        await eventually(lambda: comes in follower.nodes.values(), within=3)
        await registry.deregister(was)
        await eventually(lambda: was not in follower.nodes.values(), within=2)


@pytest.mark.asyncio
async def test_following_ends_with_the_registry_and_begins_with_none(
    registry: MDNSRegistry,
) -> None:
    with pytest.raises(Gap):
        await following(registry.follow(unique(), True))
    node = node_()
    await registry.register(node, ttl=30)
    async with aclosing(registry.follow(node.service, None)) as stream:
        await following(stream)
        await registry.aclose()
        with pytest.raises(Closed):
            await asyncio.wait_for(drain(stream), 2)


async def drain(stream: Items) -> None:
    async for _ in stream:
        pass


# -- names -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_names_are_compared_without_case(registry: MDNSRegistry, other: MDNSRegistry) -> None:
    service = unique()
    upper, lower = node_(service.upper(), id="a"), node_(service, id="b")
    for node in (upper, lower):
        await registry.register(node, ttl=30)
    for each in (registry, other):
        assert await each.get(service) == await each.get(service.upper()) == (upper, lower)
        listed = [name for name in await each.services() if name.lower() == service]
        assert len(listed) == 1
    async with follow(other, service.title()) as follower:
        await eventually(lambda: len(follower.nodes) == 2)
        respelt = msgspec.structs.replace(lower, service=service.upper())
        await registry.register(respelt, ttl=30)
        await eventually(lambda: follower.nodes.get((service.upper(), "b")) == respelt)
        assert len(follower.nodes) == 2


@pytest.mark.asyncio
async def test_a_namespace_is_apart_from_all_others() -> None:
    service = unique()
    urls = ("mdns", "mdns:///prod", "mdns:///staging.prod")
    async with connected(urls[0]) as a, connected(urls[1]) as b, connected(urls[2]) as c:
        nodes = {each: node_(service) for each in (a, b, c)}
        async with follow(b, None) as follower:
            for each, node in nodes.items():
                await each.register(node, ttl=30)
            for each, node in nodes.items():
                assert await each.get(service) == (node,)
            assert list(follower.nodes.values()) == [nodes[b]]
        async with connected("mdns:///PROD") as same:
            assert await same.get(service) == (nodes[b],)


@pytest.mark.asyncio
async def test_200_services_of_another_process_are_listed_completely() -> None:
    run = unique()
    nodes = [node_(f"{run}-{number}", metadata={"a": "b" * 200}) for number in range(200)]
    async with peer(*nodes), connected(PATIENT) as registry:
        listed = [name for name in await registry.services() if name.startswith(run)]
        assert listed == sorted(node.service for node in nodes)
        async with follow(registry, None) as follower:
            await eventually(lambda: same(follower.nodes.values(), nodes), within=5)


@pytest.mark.asyncio
async def test_a_large_node_is_seen_whole(registry: MDNSRegistry) -> None:
    noise = {f"k{n}": uuid.uuid5(uuid.NAMESPACE_DNS, str(n)).hex for n in range(1300)}
    node = node_(metadata=noise)
    async with peer(node):
        assert await registry.get(node.service) == (node,)
    with pytest.raises(TooLarge):
        await registry.register(node_(metadata={"a": "b" * 65_536}), ttl=30)


# -- the wire ----------------------------------------------------------------------------------


def go(name: str) -> bytes:
    return bytes.fromhex(json.loads((VECTORS / f"mdns-{name}.json").read_text())["hex"])


@pytest.mark.asyncio
async def test_a_query_of_go_is_answered_to_the_port_it_came_from(
    own_network: None, registry: MDNSRegistry
) -> None:
    node = node_("helloworld")
    await registry.register(node, ttl=30)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        client.sendto(go("service-query"), GROUP)
        answer = await eventually(lambda: received(client))
    assert answer is not None
    wire, source = answer
    assert source == ("127.0.0.1", 5353)
    assert wire[:12] == go("service-response")[:12]
    here = Zone("", socket.gethostname())
    assert wire == here.answer(parse(wire).questions[0], here.card(node), ttl=30)


def received(sock: socket.socket) -> tuple[bytes, Any] | None:
    try:
        return sock.recvfrom(65536)
    except BlockingIOError:
        return None


@pytest.mark.asyncio
async def test_a_query_from_the_port_of_mdns_is_answered_to_all(
    own_network: None, registry: MDNSRegistry
) -> None:
    node = node_("helloworld")
    await registry.register(node, ttl=30)
    with at_5353() as asks, at_5353() as listens:
        asks.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        asks.sendto(go("service-query"), GROUP)

        def answered() -> bool:
            got = received(listens)
            packet = parse(got[0]) if got else None
            return packet is not None and packet.is_answer and bool(packet.questions)

        await eventually(answered)


@pytest.mark.asyncio
async def test_nodes_of_go_come_and_go(registry: MDNSRegistry) -> None:
    async with follow(registry, "helloworld") as follower:
        shout(go("service-announce"))
        await eventually(lambda: follower.nodes)
        shout(go("service-goodbye"))
        await eventually(lambda: not follower.nodes)
    assert [kind for kind, _ in follower.changes] == ["create", "delete"]
    assert registry.dropped == 0


# -- two hosts ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_across_hosts_nodes_are_seen_but_for_those_on_loopback(own_network: None) -> None:
    service = unique()
    ours = node_(service, address="10.77.0.1:80")
    theirs = node_(service, address="10.77.0.2:80")
    theirs_alone = node_(service)
    with other_host() as pid:
        cable(pid)
        async with connected(PATIENT) as registry:
            await registry.register(ours, ttl=30)
            with leaving("here") as frames:
                hidden = node_(service)
                await registry.register(hidden, ttl=30)
                async with peer(theirs, theirs_alone, pid=pid) as process:
                    assert same(await process.get(service), [ours, theirs, theirs_alone])
                    assert same(await registry.get(service), [ours, theirs, hidden])
                await registry.deregister(hidden)
                await registry.register(node_(address="10.77.0.1:81", id="the-last"), ttl=30)
                sent = await eventually(lambda: frames(until=b"the-last"))
                assert ours.id.encode() in sent
                assert hidden.id.encode() not in sent
            assert registry.dropped == 0


@contextmanager
def leaving(interface: str) -> Iterator[Callable[..., bytes]]:
    """All that leaves through an interface, once a certain text has left."""
    every = 3
    outgoing = 4
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(every)) as sock:
        sock.bind((interface, every))
        sock.setblocking(False)
        sent: list[bytes] = []

        def frames(*, until: bytes) -> bytes:
            while (got := received(sock)) is not None:
                if got[1][2] == outgoing:
                    sent.append(got[0])
            return b"".join(sent) if any(until in frame for frame in sent) else b""

        yield frames


def inside(pid: int) -> list[str]:
    return ["nsenter", "-t", str(pid), "-n", sys.executable, "-c"]


LIAR = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
    for line in sys.argv[2:]:
        sock.sendto(bytes.fromhex(line), ("224.0.0.251", 5353))
"""


@pytest.mark.asyncio
async def test_another_host_cannot_speak_of_our_loopback(own_network: None) -> None:
    ours = node_()
    service = ours.service
    lies = [
        MICRO.announcement(MICRO.card(node_(service, address=address)), ttl=30)
        for address in ("127.0.0.1:1", "[::1]:1", "169.254.169.254:80")
    ]
    goodbye = MICRO.announcement(MICRO.card(ours), ttl=0)
    truth = node_(service, address="10.77.0.2:1")
    said = [*lies, goodbye, MICRO.announcement(MICRO.card(truth), ttl=30)]
    with other_host() as pid:
        cable(pid)
        async with connected() as registry, connected() as mine, follow(registry, service) as all_:
            await mine.register(ours, ttl=30)
            await eventually(lambda: all_.changes == [("create", ours)])
            await asyncio.to_thread(
                subprocess.run,
                [*inside(pid), LIAR, "10.77.0.2", *(wire.hex() for wire in said)],
                check=True,
            )
            await eventually(lambda: len(all_.changes) > 1)
            assert all_.changes == [("create", ours), ("create", truth)]
            assert registry.dropped == 3


FAR = """
import socket, sys
for source in ("203.0.113.1", "10.77.0.2"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.settimeout(1.5)
        sock.sendto(bytes.fromhex(sys.argv[1]), ("10.77.0.1", 5353))
        try:
            print(source, sock.recvfrom(65536)[1][0], flush=True)
        except TimeoutError:
            print(source, "nothing", flush=True)
"""


@pytest.mark.asyncio
async def test_a_question_from_beyond_the_link_is_not_answered(own_network: None) -> None:
    node = node_(address="10.77.0.1:80")
    with other_host() as pid:
        cable(pid)
        ip("addr", "add", "203.0.113.1/32", "dev", "lo", pid=pid)
        ip("route", "add", "default", "via", "10.77.0.2")
        async with connected() as registry:
            await registry.register(node, ttl=30)
            done = await asyncio.to_thread(
                subprocess.run,
                [*inside(pid), FAR, MICRO.query(node.service).hex()],
                check=True,
                capture_output=True,
                text=True,
            )
        assert done.stdout.splitlines() == ["203.0.113.1 nothing", "10.77.0.2 10.77.0.1"]


@pytest.mark.asyncio
async def test_an_interface_that_comes_up_later_is_used(own_network: None) -> None:
    service = unique()
    ours = node_(service, address="10.77.0.1:80")
    theirs = node_(service, address="10.77.0.2:80")
    with other_host() as pid:
        async with connected() as registry, peer(theirs, pid=pid) as process:
            await registry.register(ours, ttl=30)
            async with follow(registry, service) as follower:
                assert list(follower.nodes.values()) == [ours]
                cable(pid)
                await eventually(lambda: theirs in follower.nodes.values(), within=8)
                assert ours in await process.get(service)


@pytest.mark.asyncio
async def test_an_interface_without_an_address_does_no_harm(own_network: None) -> None:
    ip("link", "add", "here", "type", "veth", "peer", "name", "there")
    for name in ("here", "there"):
        ip("link", "set", name, "up")
    node = node_()
    async with connected() as registry, connected() as other:
        await registry.register(node, ttl=30)
        assert await other.get(node.service) == (node,)


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_without_multicast_the_error_names_the_way_out(own_network: None) -> None:
    ip("link", "set", "lo", "down")
    registry = MDNSRegistry(URL.parse("mdns"))
    with pytest.raises(Unavailable, match=r"multicast.*--registry memory, or MICRO_REGISTRY="):
        await registry.connect(Connections())
    await registry.aclose()


@pytest.mark.asyncio
async def test_when_multicast_ends_reading_and_registering_say_so(
    own_network: None, registry: MDNSRegistry
) -> None:
    ip("link", "set", "lo", "down")
    with pytest.raises(Unavailable, match="MICRO_REGISTRY="):
        await registry.register(node_(), ttl=30)
    with pytest.raises(Unavailable, match="MICRO_REGISTRY="):
        await registry.get(unique())
    with pytest.raises(Unavailable, match="MICRO_REGISTRY="):
        await following(registry.follow(None, None))


@pytest.mark.asyncio
async def test_a_port_that_is_not_shared_is_named_with_the_way_out(own_network: None) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 5353))
        with pytest.raises(Unavailable, match=r"in use.*MICRO_REGISTRY="):
            await MDNSRegistry(URL.parse("mdns")).connect(Connections())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mdns://127.0.0.1:5353", "test: mdns has no hosts"),
        ("mdns:///a/b", "mdns: path 'a/b'"),
        ("mdns://?timout=1", "did you mean 'timeout'"),
    ],
)
@pytest.mark.asyncio
async def test_a_wrong_url_is_a_config_error(url: str, says: str) -> None:
    registry = MDNSRegistry(URL.parse(url, source="test"))
    with pytest.raises(ConfigError, match=says):
        await registry.connect(Connections())
    await registry.aclose()


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


@pytest.mark.asyncio
async def test_closing_leaves_nothing_open() -> None:
    async with connected():  # what the loop opens once, it keeps
        pass
    tasks, files = len(asyncio.all_tasks()), open_files()
    for _ in range(3):
        async with connected() as registry:
            await registry.register(node := node_(), ttl=30)
            async with follow(registry, node.service):
                await registry.deregister(node)
            await registry.register(node, ttl=30)
            await registry.aclose()
            with pytest.raises(Closed):
                await registry.get(node.service)
    assert (len(asyncio.all_tasks()), open_files()) == (tasks, files)


@pytest.mark.asyncio
async def test_a_cancelled_connect_leaves_nothing_open() -> None:
    async with connected():
        pass
    files = open_files()
    task = asyncio.create_task(MDNSRegistry(URL.parse("mdns")).connect(Connections()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: open_files() == files)


def hostile(service: str) -> dict[str, bytes]:
    card = MICRO.card(node_(service))
    text = b"".join(bytes([255]) + b"61" * 127 + b"6" for _ in range(200))
    return {
        "rubbish": os.urandom(40) + b"\xff" * 400,
        "text": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "pointer to itself": struct.pack("!6H", 0, 0x8400, 0, 1, 0, 0) + b"\xc0\x0c" + b"\0" * 10,
        "not zlib": MICRO.announcement(card._replace(text=text), ttl=9),
        "port 0": MICRO.announcement(card._replace(port=0), ttl=9),
        "another service": MICRO.announcement(
            card._replace(node=msgspec.structs.replace(card.node, id=f"x.{service}-2")), ttl=9
        ).replace(service.encode(), service.upper().encode()[:-1] + b"Z"),
        "no name of a service": MICRO.answer(
            parse(MICRO.query(None)).questions[0],
            card._replace(node=msgspec.structs.replace(card.node, service=" ")),
            ttl=9,
        ),
    }


@pytest.mark.asyncio
async def test_hostile_packets_are_dropped_counted_and_said_once(
    own_network: None,
    registry: MDNSRegistry,
    other: MDNSRegistry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = node_()
    packets = hostile(node.service)
    with caplog.at_level(logging.WARNING, "micro.mdns"):
        async with follow(registry, None) as follower:
            for packet in packets.values():
                shout(packet)
            await eventually(lambda: registry.dropped == len(packets))
            await other.register(node, ttl=30)
            await eventually(lambda: node in follower.nodes.values())
            assert list(follower.nodes.values()) == [node]
    warnings = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert len(warnings) <= 2  # one of each registry
    assert all("dropped" in entry.getMessage() for entry in warnings)


FAKES = """
import socket, sys, time
import msgspec
from micro.backends._mdns_wire import Zone
from micro.registry import Node
zone = Zone("", "liar")
packets = []
for n in range(10_000):
    service = sys.argv[1] if n % 2 else f"fake-{n}"
    node = Node(service=service, id=f"n{n}", address="127.0.0.1:1", metadata={"fake": "x" * 50})
    packets.append(zone.announcement(zone.card(node), ttl=20))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)
    while True:
        for n, packet in enumerate(packets):
            sock.sendto(packet, ("224.0.0.251", 5353))
            if n % 20 == 0:
                time.sleep(0.002)
"""


@contextmanager
def flood(service: str) -> Iterator[None]:
    """Another process that sends 10,000 fake nodes, again and again."""
    process = subprocess.Popen([sys.executable, "-c", FAKES, service])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def services(follower: Follower) -> int:
    return len({name for name, _ in follower.nodes})


@pytest.mark.asyncio
async def test_10000_fake_nodes_are_capped_and_do_not_block_the_loop(
    own_network: None, registry: MDNSRegistry
) -> None:
    service = unique()
    async with follow(registry, service) as one, follow(registry, None) as every:
        with flood(service):
            longest = 0.0
            deadline = time.monotonic() + 50
            while registry.dropped < 5_000 or len(one.nodes) < 256 or services(every) < 1024:
                assert time.monotonic() < deadline
                # The time of this thread: what others do on a busy machine does not count.
                before = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - before)
            assert longest < 0.5
            assert len(one.nodes) == 256
            assert services(every) == 1024
            async with connected() as other:
                await other.register(node := node_(), ttl=30)
                assert await registry.get(node.service) == (node,)
