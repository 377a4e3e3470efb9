"""Bad input is refused, and a service that gets it answers all others on, in little memory."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from tests.faults.calls import (
    MIB,
    SLACK,
    TRANSPORTS,
    Served,
    Stage,
    beside,
    files,
    memory,
    most_memory,
)
from tests.faults.served import Said, Work
from tests.faults.wire import (
    ERROR,
    FRAGMENT,
    GOAWAY,
    HEADER,
    JSON,
    REPLY,
    REQUEST,
    connected,
    greeting,
    http_call,
    native_call,
    said,
)

from micro.testing import eventually

#: Bytes that the service's memory may grow by, and seconds that its loop may compute at a stretch.
GROWTH = 50 * MIB
BLOCKED = 0.1
#: The codes of errors.
INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8
MESSAGE = 4 * MIB
#: Answers that others have to get beside an input, that it means something.
ENOUGH = 20
#: How often each input is sent, at once.
TIMES = 8
#: Connections that nobody uses, and how many the service takes.
IDLE, CONNECTIONS = 10_000, 1000
#: Seconds that the service gives who is refused to read why, and between two looks of its at
#: native connections.
LINGER, TURN = 2.0, 10.0
#: Seconds between two looks of the service at who is too slow.
LOOK = 0.5


class Limited(Served):
    """It may have little more files open than it takes connections."""

    def command(self, data: Path, ports: Sequence[int]) -> Sequence[str | Path]:
        return ["sh", "-c", 'ulimit -n 1100; exec "$@"', "sh", *super().command(data, ports)]


@dataclass(frozen=True)
class Patience:
    """Seconds that the service waits for a head, and for a body."""

    head: float
    body: float


@pytest.fixture
def patience(full: bool) -> Patience:
    return Patience(5.0, 60.0) if full else Patience(1.0, 1.5)


@pytest.fixture
def served(tmp_path: Path, full: bool, patience: Patience) -> Iterator[Served]:
    """With its default limits when there is time."""
    limits = () if full else (patience.head, patience.body)
    with Limited(tmp_path, *limits) as served:
        yield served
        served.check()


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many as the connections need of which this process is the client."""
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, min(IDLE + 500, most)), most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


class Others:
    """Those who call the service meanwhile, by both protocols."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._answers = dict.fromkeys(TRANSPORTS, 0)
        self._slowest = 0.0

    async def suffer(self, *inputs: Callable[[], Awaitable[None]]) -> None:
        """Do each of them often; others are answered soon, and nothing of it stays.

        It is done until there was enough traffic beside it to tell.
        """
        before = memory(self._stage.served.pid)
        enough = min(self._answers.values()) + ENOUGH
        async with self._call_on("tcp") as native, self._call_on("http"):
            while min(self._answers.values()) < enough:
                for one in inputs:
                    await asyncio.gather(*(one() for _ in range(TIMES)))
                await asyncio.sleep(0)
            enough = max(self._answers.values()) + 2
            await eventually(lambda: min(self._answers.values()) >= enough)
            state = await native.state()
        assert memory(self._stage.served.pid) - before < GROWTH
        assert state.blocked < BLOCKED
        assert self._slowest < BLOCKED + SLACK
        self._stage.served.check()

    @asynccontextmanager
    async def _call_on(self, transport: str) -> AsyncIterator[Work]:
        async def run() -> None:
            while True:
                await self._call(work, transport)
                await asyncio.sleep(0.005)

        async with self._stage.calling(transport) as work:
            await self._call(work, transport)  # who is connected, stays so
            async with beside(run()):
                yield work

    async def _call(self, work: Work, transport: str) -> None:
        began = time.monotonic()
        try:
            await work.echo(Said("ping"))
        except Exception as exc:  # whatever it is, it is wrong
            self._stage.journal.blame(f"a call by {transport} failed: {exc!r}")
        self._answers[transport] += 1
        self._slowest = max(self._slowest, time.monotonic() - began)


@pytest.fixture
def others(stage: Stage) -> Others:
    return Others(stage)


@pytest.mark.asyncio
async def test_1_an_empty_body(served: Served, others: Others) -> None:
    async def native() -> None:
        calls = native_call("Work.Echo", b"") + native_call("Work.FillIn", b"", 2)
        async with connected(served.address, greeting() + calls) as raw:
            _, failed, filled = sorted(await raw.frames(3), key=lambda frame: frame[1])
            assert failed[:3] == (ERROR, 1, INVALID_ARGUMENT)
            assert filled == (REPLY, 2, 2, b'{"number":7}')

    async def http() -> None:
        async with connected(served.address, http_call("Work.Echo", b"")) as raw:
            assert await raw.status() == 400
        async with connected(served.address, http_call("Work.FillIn", b"")) as raw:
            assert await raw.status() == 200
            assert raw.heard.endswith(b'{"number":7}\n')
        async with connected(served.address, http_call("Work.Echo", b"", go=True)) as raw:
            assert await raw.status() == 200
            assert b"Micro-Error: {" in raw.heard

    await others.suffer(native, http)


@pytest.mark.asyncio
async def test_2_a_body_of_one_byte_too_much(served: Served, others: Others) -> None:
    body = said("x" * MESSAGE)

    async def native() -> None:
        calls = native_call("Work.Echo", body) + native_call("Work.Echo", said("after"), 2)
        async with connected(served.address, greeting() + calls) as raw:
            _, failed, answered = await raw.frames(3, within=20)
            assert failed[:3] == (ERROR, 1, RESOURCE_EXHAUSTED | 0x8000_0000)
            assert answered == (REPLY, 2, 2, said("after").replace(b" ", b""))

    async def http() -> None:
        head = http_call("Work.Echo", b"", f"Content-Length: {MESSAGE + 1}")
        async with connected(served.address, head) as raw:
            assert await raw.status() == 413
        chunked = http_call("Work.Echo", b"", "Transfer-Encoding: chunked")
        chunk = b"%x\r\n%b\r\n" % (MIB, b"x" * MIB)
        async with connected(served.address, chunked + 4 * chunk + b"1\r\nx\r\n0\r\n\r\n") as raw:
            assert await raw.status(within=20) == 413

    await others.suffer(native, http)


@pytest.mark.asyncio
async def test_3_a_length_of_4_gib(served: Served, others: Others) -> None:
    async def native() -> None:
        header = HEADER.pack(2**32 - 1, REQUEST, JSON, 0, 1, 0)
        async with connected(served.address, greeting() + header + b"x" * 10) as raw:
            await raw.closed()
            assert (await raw.frames(2))[1][0] == GOAWAY

    async def http() -> None:
        head = http_call("Work.Echo", b"x" * 10, f"Content-Length: {2**32}")
        async with connected(served.address, head) as raw:
            assert await raw.status() == 413
            await raw.closed(within=2 + 2 * SLACK)

    before = most_memory(served.pid)
    await others.suffer(native, http)
    assert most_memory(served.pid) - before < GROWTH


@pytest.mark.asyncio
async def test_4_1_gib_after_a_length_of_10(served: Served, others: Others, chance: Random) -> None:
    beginnings = [
        greeting() + native_call("Work.Echo", b"x" * 10),
        http_call("Work.Echo", b"x" * 10),
    ]
    noises = [bytes(MIB), chance.randbytes(MIB), b"POST / HTTP/1.1\r\n" * 60_000]

    async def flood() -> None:
        noise = chance.choice(noises)
        async with connected(served.address, chance.choice(beginnings)) as raw:
            sent = 0
            while not raw.writer.is_closing():
                await raw.say(noise)
                sent += len(noise)
                assert sent < 1024 * MIB

    await others.suffer(flood)


@pytest.mark.asyncio
async def test_5_a_length_that_is_none(served: Served, others: Others, chance: Random) -> None:
    async def native() -> None:
        # Of the whole, and of the head.
        whole, head = chance.choice([(2**31, 5), (2**32 - 5, 0), (4, 5), (0, 2**16 - 1)])
        header = HEADER.pack(whole, REQUEST, JSON, head, 1, 0)
        async with connected(served.address, greeting() + header) as raw:
            await raw.closed()
            assert (await raw.frames(2))[1][0] == GOAWAY

    async def http() -> None:
        lengths = ["-1", "+5", "1_0", "0x10", "5, 6", "", "1e3", "9" * 30, "\u0663"]
        call = http_call("Work.Echo", b"x" * 10, f"Content-Length: {chance.choice(lengths)}")
        async with connected(served.address, call) as raw:
            assert await raw.status() in (400, 413)
            await raw.closed(within=LINGER + SLACK)

    await others.suffer(native, http)


@pytest.mark.asyncio
async def test_6_a_call_that_ends_too_early(served: Served, others: Others, chance: Random) -> None:
    calls = [
        greeting() + native_call("Work.Wait", said("x")),
        greeting() + native_call("Work.Wait", said("x" * 3 * FRAGMENT)),
        http_call("Work.Wait", said("x" * 100)),
        http_call("Work.Wait", b"", "Transfer-Encoding: chunked") + b"64\r\n" + said("x" * 200),
    ]

    async def send() -> None:
        call = chance.choice(calls)
        cut = min(len(call) - 1, chance.randrange(300) or len(call))
        async with connected(served.address, call[:cut]) as raw:
            raw.writer.write_eof()
            await raw.closed(within=LINGER + SLACK)

    await others.suffer(send)


@pytest.mark.asyncio
async def test_7_a_head_that_comes_slowly(
    served: Served, others: Others, chance: Random, patience: Patience
) -> None:
    heads = [greeting(), http_call("Work.Echo", said("x"))]

    async def drip() -> None:
        head = chance.choice(heads)
        begun = chance.randrange(30)
        async with connected(served.address, head[:begun]) as raw:
            began = time.monotonic()
            async with beside(raw.drip(head[begun:], patience.head / 4)):
                heard = await raw.closed(patience.head + LOOK + LINGER + SLACK)
            assert time.monotonic() - began > patience.head / 2
            assert not heard or heard.startswith(b"HTTP/1.1 408 ")

    await others.suffer(drip)


@pytest.mark.asyncio
@pytest.mark.timeout(200)
async def test_8_a_body_that_comes_slowly(
    served: Served, others: Others, patience: Patience
) -> None:
    call = native_call("Work.Echo", said("x" * 1000))
    pieces = native_call("Work.Echo", said("x" * 3 * FRAGMENT))
    native = [greeting() + call[:500], greeting() + pieces[: FRAGMENT + 500]]

    async def drip(call: bytes, within: float) -> bytes:
        async with connected(served.address, call) as raw:
            began = time.monotonic()
            async with beside(raw.drip(b"x" * 400, patience.body / 4)):
                heard = await raw.closed(within + LOOK + LINGER + SLACK)
            assert time.monotonic() - began > patience.body - 0.1
            return heard

    async def http() -> None:
        heard = await drip(http_call("Work.Echo", said("x" * 1000))[:500], patience.body)
        assert heard.startswith(b"HTTP/1.1 408 ")

    async def whole() -> None:
        await drip(native[0], patience.body + TURN)

    async def in_pieces() -> None:
        await drip(native[1], patience.body + TURN)

    async def all_kinds() -> None:
        await asyncio.gather(http(), whole(), in_pieces())

    await others.suffer(all_kinds)


@pytest.mark.asyncio
@pytest.mark.usefixtures("many_files")
async def test_9_10000_idle_connections(served: Served, others: Others, patience: Patience) -> None:
    idle: list[socket.socket] = []

    async def connect() -> None:
        while len(idle) < IDLE:
            sock = socket.socket()
            idle.append(sock)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
            if len(idle) % 1000 == 0:
                assert files(served.pid) < CONNECTIONS + 50

    before = files(served.pid)
    try:
        await others.suffer(connect)
        await eventually(lambda: files(served.pid) <= before, within=patience.head + LOOK + SLACK)
        await others.suffer()  # by connections that come later
    finally:
        for sock in idle:
            sock.close()
