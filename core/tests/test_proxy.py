"""The fault proxy, with a test at both of its ends."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_asyncio

from micro.testing import FaultProxy, eventually
from micro.testing._proxy_connection import Faults

SOON = 2.0
MIB = 1024 * 1024

Fault = Callable[[FaultProxy], None]


class Peer:
    """One end of a connection. What it waits for has to come soon."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(10):
            await self._loop.sock_sendall(self._sock, data)

    async def some(self, most: int = 65536) -> bytes:
        async with asyncio.timeout(SOON):
            return await self._loop.sock_recv(self._sock, most)

    async def receive(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            chunk = await self.some(n - len(data))
            assert chunk, f"closed after {data!r}"
            data += chunk
        return data

    async def end(self) -> tuple[bytes, str]:
        """What still comes, and how the connection ends."""
        data = b""
        try:
            while chunk := await self.some():
                data += chunk
        except ConnectionResetError:
            return data, "RST"
        return data, "FIN"

    def hears_nothing(self) -> bool:
        """Neither bytes nor an end are there."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._sock.close()

    def reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


class Ends:
    """An upstream that leaves each connection to the test, and what connects to it."""

    def __init__(self, sockets: ExitStack) -> None:
        self._sockets = sockets
        self._listener = self._socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(100)
        self.address = "{}:{}".format(*self._listener.getsockname())

    async def connect(self, proxy: FaultProxy) -> Peer:
        host, _, port = proxy.address.rpartition(":")
        sock = self._socket()
        async with asyncio.timeout(SOON):
            await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
        return Peer(sock)

    async def accept(self) -> Peer:
        async with asyncio.timeout(SOON):
            sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        return Peer(self._sockets.enter_context(sock))

    async def pair(self, proxy: FaultProxy) -> tuple[Peer, Peer]:
        client = await self.connect(proxy)
        return client, await self.accept()

    def close(self) -> None:
        self._listener.close()

    def _socket(self) -> socket.socket:
        sock = self._sockets.enter_context(socket.socket())
        sock.setblocking(False)
        return sock


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[Ends]:
    with ExitStack() as sockets:
        yield Ends(sockets)


@pytest_asyncio.fixture
async def proxy(ends: Ends) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(ends.address, seed=7) as proxy:
        yield proxy


async def exchange(client: Peer, server: Peer, size: int) -> None:
    """Both send to each other at once, and have to get it as it was."""
    up, down = random.Random(1).randbytes(size), random.Random(2).randbytes(size)
    _, _, *got = await asyncio.gather(
        client.send(up), server.send(down), server.receive(size), client.receive(size)
    )
    assert got == [up, down]


# -- without a fault ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_every_byte_passes_as_it_is_both_ways(ends: Ends, proxy: FaultProxy) -> None:
    await exchange(*await ends.pair(proxy), MIB)


@pytest.mark.asyncio
async def test_many_connections_at_once_keep_apart(ends: Ends, proxy: FaultProxy) -> None:
    pairs = [await ends.pair(proxy) for _ in range(50)]
    marks = [b"%02d" % number * 5000 for number in range(50)]
    await asyncio.gather(
        *(client.send(mark) for (client, _), mark in zip(pairs, marks, strict=True))
    )
    got = await asyncio.gather(*(server.receive(10_000) for _, server in pairs))
    assert got == marks


@pytest.mark.asyncio
async def test_who_closes_one_side_still_gets_the_answer(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    await client.send(b"question")
    client._sock.shutdown(socket.SHUT_WR)
    assert await server.end() == (b"question", "FIN")
    await server.send(b"answer")
    server.close()
    assert await client.end() == (b"answer", "FIN")


@pytest.mark.asyncio
async def test_a_reset_passes_after_the_bytes_before_it(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    await client.send(b"last words")
    assert await server.receive(10) == b"last words"
    client.reset()
    assert await server.end() == (b"", "RST")


@pytest.mark.asyncio
async def test_who_sends_to_a_peer_that_closed_is_reset(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    server.close()
    assert await client.end() == (b"", "FIN")

    async def refused() -> bool:
        try:
            await client.send(b"anybody there?")
        except ConnectionError:
            return True
        return False

    await eventually(refused, within=SOON)


@pytest.mark.asyncio
async def test_an_upstream_that_is_not_there_is_a_reset(ends: Ends, proxy: FaultProxy) -> None:
    ends.close()
    client = await ends.connect(proxy)
    assert await client.end() == (b"", "RST")
    assert "Connect call failed" in proxy.log


@pytest.mark.asyncio
async def test_who_does_not_read_stalls_its_peer_and_fills_no_memory(
    ends: Ends, proxy: FaultProxy
) -> None:
    client, server = await ends.pair(proxy)
    piece, pieces = bytes(65536), 1
    tracemalloc.start()
    try:
        sending = asyncio.create_task(client.send(piece))
        while (await asyncio.wait({sending}, timeout=0.3))[0]:
            sending = asyncio.create_task(client.send(piece))
            pieces += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * MIB
    for _ in range(pieces):
        await server.receive(len(piece))
    await sending


# -- each fault -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_latency_holds_up_each_byte_however_many_follow(
    ends: Ends, proxy: FaultProxy
) -> None:
    client, server = await ends.pair(proxy)
    proxy.latency(0.2, jitter=0.05, direction="up")
    began = time.monotonic()
    for number in range(100):
        await client.send(bytes([number]))
        await asyncio.sleep(0)
    assert await server.receive(100) == bytes(range(100))
    assert 0.15 <= time.monotonic() - began <= 0.25 + SOON


@pytest.mark.asyncio
async def test_latency_holds_up_a_close_as_well(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.latency(0.2)
    began = time.monotonic()
    client.close()
    assert await server.end() == (b"", "FIN")
    assert time.monotonic() - began >= 0.2


@pytest.mark.asyncio
async def test_what_a_peer_said_before_it_went_arrives_before_its_reset(
    ends: Ends, proxy: FaultProxy
) -> None:
    client, server = await ends.pair(proxy)
    proxy.latency(0.2, direction="up")
    await client.send(b"last words")
    client.close()

    async def found_nobody() -> bool:
        await server.send(b"still there?")
        return "found nobody" in proxy.log

    await eventually(found_nobody, within=SOON)
    assert await server.end() == (b"last words", "RST")


@pytest.mark.asyncio
async def test_bandwidth_bounds_the_bytes_of_a_second(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.bandwidth(10_000)
    began = time.monotonic()
    await client.send(bytes(4000))
    await server.receive(4000)
    assert 0.3 <= time.monotonic() - began <= 0.4 + SOON


@pytest.mark.asyncio
async def test_slices_are_sent_one_by_one(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.slice(1)
    await client.send(bytes(range(200)))
    chunks = [await server.some()]
    while sum(map(len, chunks)) < 200:
        chunks.append(await server.some())
    assert b"".join(chunks) == bytes(range(200))
    assert len(chunks) > 20


@pytest.mark.asyncio
async def test_dup_chunk_doubles_one_chunk(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.dup_chunk()
    await client.send(b"once ")
    assert await server.receive(10) == b"once once "
    await client.send(b"again")
    client.close()
    assert await server.end() == (b"again", "FIN")


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [1, 100, 10_000])
async def test_flip_bit_changes_one_bit_of_the_nth_further_byte(
    ends: Ends, proxy: FaultProxy, n: int
) -> None:
    client, server = await ends.pair(proxy)
    await client.send(b"before")
    await server.receive(6)
    proxy.flip_bit(n)
    await client.send(bytes(20_000))
    got = await server.receive(20_000)
    assert [index for index, byte in enumerate(got) if byte] == [n - 1]
    assert got[n - 1].bit_count() == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [0, 1, 10, 5000])
async def test_reset_after_is_an_rst_to_both_after_n_bytes(
    ends: Ends, proxy: FaultProxy, n: int
) -> None:
    client, server = await ends.pair(proxy)
    proxy.reset_after(n, direction="down")
    await client.send(b"not counted")
    await server.receive(11)
    await server.send(bytes(6000))
    assert await client.end() == (bytes(n), "RST")
    assert await server.end() == (b"", "RST")


@pytest.mark.asyncio
@pytest.mark.parametrize("n", [0, 1, 10, 5000])
async def test_cut_after_is_a_fin_to_both_after_n_bytes(
    ends: Ends, proxy: FaultProxy, n: int
) -> None:
    client, server = await ends.pair(proxy)
    proxy.cut_after(n)
    await client.send(bytes(4 * MIB))
    assert await server.end() == (bytes(n), "FIN")
    assert await client.end() == (b"", "FIN")


@pytest.mark.asyncio
async def test_who_goes_on_after_a_cut_is_reset(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.cut_after(0)

    async def refused() -> bool:
        try:
            await client.send(b"more")
        except ConnectionError:
            return True
        return False

    await eventually(refused, within=1 + SOON)
    assert await server.end() == (b"", "FIN")


@pytest.mark.asyncio
async def test_blackhole_swallows_bytes_and_ends(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.blackhole()
    await client.send(b"up")
    await server.send(b"down")
    await eventually(lambda: proxy.log.count("vanished") == 2)
    server.close()
    other, _ = await ends.pair(proxy)
    other.close()
    await eventually(lambda: "the end vanished" in proxy.log)
    assert client.hears_nothing()


@pytest.mark.asyncio
async def test_blackhole_of_one_direction_lets_the_other_pass(
    ends: Ends, proxy: FaultProxy
) -> None:
    client, server = await ends.pair(proxy)
    proxy.blackhole("up")
    await client.send(b"up")
    await eventually(lambda: "vanished" in proxy.log)
    await server.send(b"down")
    assert await client.receive(4) == b"down"
    assert server.hears_nothing()


@pytest.mark.asyncio
@pytest.mark.parametrize("lost", ["bytes", "end"])
async def test_heal_resets_what_lost_something_and_nothing_else(
    ends: Ends, proxy: FaultProxy, lost: str
) -> None:
    client, server = await ends.pair(proxy)
    idle = await ends.pair(proxy)
    proxy.blackhole("up")
    if lost == "bytes":
        await client.send(b"lost")
    else:
        client._sock.shutdown(socket.SHUT_WR)
    await eventually(lambda: "vanished" in proxy.log)
    proxy.heal()
    assert await server.end() == (b"", "RST")
    assert await client.end() == (b"", "RST")
    await exchange(*idle, 1000)


@pytest.mark.asyncio
@pytest.mark.parametrize("end", [Peer.close, Peer.reset])
async def test_half_open_withholds_an_end_and_nothing_else(
    ends: Ends, proxy: FaultProxy, end: Callable[[Peer], None]
) -> None:
    client, server = await ends.pair(proxy)
    proxy.half_open("up")
    await client.send(b"bytes pass")
    assert await server.receive(10) == b"bytes pass"
    end(client)

    async def found_nobody() -> bool:
        await server.send(b"still there?")
        return "found nobody" in proxy.log

    await eventually(found_nobody)
    assert server.hears_nothing()


@pytest.mark.asyncio
async def test_heal_passes_on_an_end_that_half_open_withheld(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.half_open()
    client.close()
    await exchange(*await ends.pair(proxy), 1000)
    assert server.hears_nothing()
    proxy.heal()
    assert await server.end() == (b"", "FIN")


@pytest.mark.asyncio
async def test_refuse_looks_like_a_dead_server_to_who_connects(
    ends: Ends, proxy: FaultProxy
) -> None:
    before = await ends.pair(proxy)
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await ends.connect(proxy)
    await exchange(*before, 1000)


@pytest.mark.asyncio
async def test_refuse_leaves_the_port_to_nobody_else(proxy: FaultProxy) -> None:
    proxy.refuse()
    host, _, port = proxy.address.rpartition(":")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((host, int(port)))


@pytest.mark.asyncio
async def test_cut_resets_open_connections_and_no_later_one(ends: Ends, proxy: FaultProxy) -> None:
    before = [await ends.pair(proxy) for _ in range(3)]
    proxy.cut()
    for peers in before:
        assert [await peer.end() for peer in peers] == [(b"", "RST")] * 2
    await exchange(*await ends.pair(proxy), 1000)


# -- which connections, and for how long ----------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("which", "doubled"), [("all", [True, True]), ("open", [True, False]), ("new", [False, True])]
)
async def test_a_fault_concerns_the_connections_it_names(
    ends: Ends, proxy: FaultProxy, which: Any, doubled: list[bool]
) -> None:
    before = await ends.pair(proxy)
    proxy.dup_chunk(connections=which)
    ended: list[tuple[bytes, str]] = []
    for client, server in (before, await ends.pair(proxy)):
        await client.send(b"x")
        client.close()
        ended.append(await server.end())
    assert ended == [(b"xx" if twice else b"x", "FIN") for twice in doubled]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("direction", "doubled"),
    [("both", [True, True]), ("up", [True, False]), ("down", [False, True])],
)
async def test_a_fault_concerns_the_direction_it_names(
    ends: Ends, proxy: FaultProxy, direction: Any, doubled: list[bool]
) -> None:
    client, server = await ends.pair(proxy)
    proxy.dup_chunk(direction=direction)
    for sender, receiver, twice in zip((client, server), (server, client), doubled, strict=True):
        await sender.send(b"x")
        sender._sock.shutdown(socket.SHUT_WR)
        assert await receiver.end() == (b"xx" if twice else b"x", "FIN")


FAULTS: dict[str, Fault] = {
    "latency": lambda proxy: proxy.latency(60),
    "bandwidth": lambda proxy: proxy.bandwidth(1),
    "slice": lambda proxy: proxy.slice(1),
    "dup_chunk": lambda proxy: proxy.dup_chunk(),
    "flip_bit": lambda proxy: proxy.flip_bit(1),
    "reset_after": lambda proxy: proxy.reset_after(1),
    "cut_after": lambda proxy: proxy.cut_after(1),
    "blackhole": lambda proxy: proxy.blackhole(),
    "half_open": lambda proxy: proxy.half_open(),
    "refuse": lambda proxy: proxy.refuse(),
}
every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


@pytest.mark.asyncio
@every_fault
async def test_heal_ends_a_fault_for_open_and_new_connections(
    ends: Ends, proxy: FaultProxy, fault: Fault
) -> None:
    before = await ends.pair(proxy)
    fault(proxy)
    fault(proxy)
    proxy.heal()
    await exchange(*before, 10_000)
    await exchange(*await ends.pair(proxy), 10_000)


@pytest.mark.asyncio
async def test_heal_lets_pass_at_once_what_a_slow_line_holds(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    proxy.latency(60, connections="open")
    await client.send(b"held up")
    await exchange(*await ends.pair(proxy), 1000)
    assert server.hears_nothing()
    proxy.heal()
    assert await server.receive(7) == b"held up"


# -- chance, and what is told ---------------------------------------------------------------------


async def flipped(ends: Ends, seed: int) -> bytes:
    """What comes of zeros when 20 bits, one after another, are flipped."""
    got = b""
    async with FaultProxy(ends.address, seed=seed) as proxy:
        client, server = await ends.pair(proxy)
        for _ in range(20):
            proxy.flip_bit(3)
            await client.send(bytes(5))
            got += await server.receive(5)
    return got


@pytest.mark.asyncio
async def test_the_same_seed_does_the_same(ends: Ends) -> None:
    first = await flipped(ends, 7)
    assert await flipped(ends, 7) == first
    assert await flipped(ends, 8) != first


@pytest.mark.asyncio
@pytest.mark.parametrize("again", range(3))
async def test_the_same_seed_delays_as_long(ends: Ends, again: int) -> None:
    async with FaultProxy(ends.address, seed=7) as proxy:
        client, server = await ends.pair(proxy)
        proxy.latency(0.1, jitter=0.1)
        began = time.monotonic()
        await client.send(b"x")
        await server.receive(1)
    # Of 100 seeds, 5 begin with as long a delay.
    assert 0.19 <= time.monotonic() - began <= 0.2 + SOON


@pytest.mark.asyncio
async def test_the_log_tells_the_seed_and_when_what_was_done(ends: Ends, proxy: FaultProxy) -> None:
    client, server = await ends.pair(proxy)
    began = time.monotonic()
    proxy.flip_bit(2, direction="up")
    await client.send(b"abc")
    await server.receive(3)
    first, fault, effect = proxy.log.splitlines()
    assert first == repr(proxy) == f"FaultProxy('{ends.address}', seed=7)"
    assert fault.endswith("; direction up, connections all")
    assert "flip_bit: flip_in 2" in fault
    assert effect.endswith("#1 up: 3 bytes passed with a wrong bit")
    times = [float(line.split()[0]) for line in (fault, effect)]
    assert began - 0.001 <= times[0] <= times[1] <= time.monotonic() + 0.001


@pytest.mark.asyncio
async def test_the_log_is_bounded(proxy: FaultProxy) -> None:
    for _ in range(3000):
        proxy.cut()
    assert len(proxy.log.splitlines()) <= 1001


@pytest.mark.parametrize(
    "wrong",
    [
        lambda proxy: proxy.latency(-1),
        lambda proxy: proxy.latency(1, jitter=-1),
        lambda proxy: proxy.bandwidth(0),
        lambda proxy: proxy.slice(0),
        lambda proxy: proxy.flip_bit(0),
        lambda proxy: proxy.reset_after(-1),
        lambda proxy: proxy.cut_after(-1),
        lambda proxy: proxy.blackhole("left"),
        lambda proxy: proxy.half_open(connections="some"),
    ],
)
def test_what_is_no_fault_is_a_value_error(wrong: Fault) -> None:
    with pytest.raises(ValueError, match="FaultProxy: "):
        wrong(FaultProxy("127.0.0.1:1"))


@pytest.mark.parametrize("upstream", ["127.0.0.1", ":80", "127.0.0.1:http", ""])
def test_an_upstream_without_host_and_port_is_a_value_error(upstream: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        FaultProxy(upstream)


# -- the end --------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - no path is wanted


@pytest.mark.asyncio
@every_fault
async def test_nothing_is_left_of_a_proxy_that_ended_in_a_fault(ends: Ends, fault: Fault) -> None:
    files, tasks = open_files(), asyncio.all_tasks()
    async with FaultProxy(ends.address) as proxy:
        pairs = [await ends.pair(proxy) for _ in range(3)]
        fault(proxy)
        for client, server in pairs:
            await client.send(b"x")
            await server.send(b"x" * 100_000)
        pairs[0][0].close()
        pairs[1][1].close()
        began = time.monotonic()
    assert time.monotonic() - began < SOON
    for client, server in pairs:
        client.close()
        server.close()
    assert asyncio.all_tasks() == tasks
    assert open_files() == files


@pytest.mark.asyncio
async def test_leaving_resets_what_is_open_and_closes_the_port(ends: Ends) -> None:
    async with FaultProxy(ends.address) as proxy:
        peers = await ends.pair(proxy)
    assert [await peer.end() for peer in peers] == [(b"", "RST")] * 2
    with pytest.raises(ConnectionRefusedError):
        await ends.connect(proxy)


@pytest.mark.asyncio
@pytest.mark.parametrize("turns", range(5))
async def test_a_connection_that_is_cut_while_it_is_made_leaves_nothing(
    ends: Ends, turns: int
) -> None:
    files = open_files()
    async with FaultProxy(ends.address) as proxy:
        client = await ends.connect(proxy)
        for _ in range(turns):
            await asyncio.sleep(0)
        proxy.cut()
    assert await client.end() == (b"", "RST")
    client.close()
    assert open_files() == files


@pytest.mark.asyncio
async def test_connections_that_ended_leave_nothing_behind(ends: Ends, proxy: FaultProxy) -> None:
    files = open_files()
    for _ in range(20):
        client, server = await ends.pair(proxy)
        client.close()
        await server.end()
        server.close()
    await eventually(lambda: open_files() == files)
    proxy.cut()
    assert proxy.log.endswith("cut 0 connections")


@pytest.mark.asyncio
async def test_a_mistake_of_the_proxy_itself_is_raised_at_its_end(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Faults, "spoil", lambda faults, piece: 1 / 0)

    async def lifetime() -> None:
        async with FaultProxy(ends.address) as proxy:
            client, server = await ends.pair(proxy)
            await client.send(b"x")
            assert await server.end() == (b"", "RST")

    with pytest.raises(ExceptionGroup) as raised:
        await lifetime()
    assert isinstance(raised.value.exceptions[0], ZeroDivisionError)
