"""A program that calls ``Work.Burn`` of one node: ``callers.py JOB``, both sides JSON.

Its calls come by chance, so many a second, whatever becomes of them (``rate``); or one after
another (``callers``). ``patient`` callers are clients of ours, which repeat calls and slow down
when they are asked to; the others are raw connections, which do nothing of the kind. It tells of
each call when it was sent, what its last attempt took, and what it came to.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from tests.faults.survivor import SERVICE
from tests.faults.wire import ERROR, HEADER, REPLY, greeting, native_call

import micro
from micro.backends._tcp_channel import TCPChannel
from micro.call import Call, Reply
from micro.client import Client
from micro.errors import MicroError, ResourceExhausted
from micro.testing import serving

#: Seconds of the processor that each call takes.
BURN = 0.002
#: Raw connections.
CONNECTIONS = 4
#: Seconds after the last call for answers to come.
_LAST = 6.0
_EXHAUSTED = 8


@dataclass(frozen=True)
class Job:
    address: str
    seconds: float
    seed: str
    rate: float = 0.0
    callers: int = 0
    patient: bool = False


@dataclass
class Calls:
    """When each was sent, in seconds since the first; what it took; "" is an answer."""

    sent: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def add(self, sent: float, took: float, ended: str) -> None:
        self.sent.append(sent)
        self.took.append(took)
        self.ended.append(ended)


#: Makes one call: what its last attempt took, and what it came to.
Way = Callable[[], Awaitable[tuple[float, str]]]


class Pipe(asyncio.Protocol):
    """A connection that sends what it is told, and never waits."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[float, asyncio.Future[tuple[float, str]]]] = {}
        self._number = 0
        self._heard = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(greeting())

    def data_received(self, data: bytes) -> None:
        self._heard += data
        while len(self._heard) >= HEADER.size:
            length, kind, _, _, stream, aux = HEADER.unpack_from(self._heard)
            if len(self._heard) < HEADER.size + length:
                return
            self._heard = self._heard[HEADER.size + length :]
            if kind in (REPLY, ERROR):
                self._end(stream, "" if kind == REPLY else _code(aux))

    def connection_lost(self, exc: Exception | None) -> None:
        for number in tuple(self._calls):
            self._end(number, "lost")

    def call(self) -> Awaitable[tuple[float, str]]:
        self._number += 1
        body = json.dumps({"text": "", "seconds": BURN}).encode()
        ended = asyncio.get_running_loop().create_future()
        self._calls[self._number] = (time.monotonic(), ended)
        self._transport.write(native_call("Work.Burn", body, self._number))
        return ended

    def close(self) -> None:
        self._transport.close()

    def _end(self, number: int, how: str) -> None:
        began, ended = self._calls.pop(number)
        if not ended.done():
            ended.set_result((time.monotonic() - began, how))


def _code(aux: int) -> str:
    return "refused" if aux & 0xFF == _EXHAUSTED else f"code {aux & 0xFF}"


async def by_chance(job: Job, ways: Sequence[Way], calls: Calls) -> None:
    """Calls whose number in a second is that of Poisson; late ones are sent at once."""
    chance = random.Random(job.seed)
    running: set[asyncio.Task[None]] = set()
    began = due = time.monotonic()
    number = 0
    while (due := due + chance.expovariate(job.rate)) < began + job.seconds:
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        number += 1
        task = asyncio.create_task(_note(ways[number % len(ways)], calls, began))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running, timeout=_LAST)
    for task in running:
        task.cancel()


async def in_turn(job: Job, ways: Sequence[Way], calls: Calls) -> None:
    began = time.monotonic()

    async def call_on(way: Way) -> None:
        while time.monotonic() < began + job.seconds:
            await _note(way, calls, began)

    await asyncio.gather(*(call_on(ways[turn % len(ways)]) for turn in range(job.callers)))


async def _note(way: Way, calls: Calls, began: float) -> None:
    sent = time.monotonic() - began
    try:
        took, ended = await way()
    except asyncio.CancelledError:
        took, ended = time.monotonic() - began - sent, "hangs"
    calls.add(sent, took, ended)


async def raw(job: Job) -> Calls:
    calls = Calls()
    host, _, port = job.address.rpartition(":")
    loop = asyncio.get_running_loop()
    opened = [await loop.create_connection(Pipe, host, int(port)) for _ in range(CONNECTIONS)]
    pipes = [pipe for _, pipe in opened]
    await asyncio.gather(*(pipe.call() for pipe in pipes))
    await (by_chance if job.rate else in_turn)(job, [pipe.call for pipe in pipes], calls)
    for pipe in pipes:
        pipe.close()
    return calls


async def patient(job: Job) -> Calls:
    """By one client of ours; when each attempt of a call began is looked up on its way."""
    calls, attempts = Calls(), dict[str, float]()
    numbers = iter(range(10**9))
    send = TCPChannel.call

    async def noted(self: TCPChannel, call: Call, body: bytes) -> Reply:
        attempts[call.metadata["call"]] = time.monotonic()
        return await send(self, call, body)

    TCPChannel.call = noted  # type: ignore[method-assign] # there is no other place to look from
    caller = micro.Service("caller")
    async with serving(caller, {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": "tcp"}) as client:

        async def call() -> tuple[float, str]:
            number = str(next(numbers))
            ended = await _ended(client, job.address, number)
            now = time.monotonic()
            return now - attempts.pop(number, now), ended

        await call()
        await (by_chance if job.rate else in_turn)(job, [call], calls)
    return calls


async def _ended(client: Client, address: str, number: str) -> str:
    request = {"text": number, "seconds": BURN}
    try:
        await client.call(SERVICE, "Work.Burn", request, metadata={"call": number}, address=address)
    except ResourceExhausted:
        return "refused"
    except MicroError as exc:
        return type(exc).__name__
    return ""


def main(text: str) -> None:
    job = Job(**json.loads(text))
    calls = asyncio.run(patient(job) if job.patient else raw(job))
    sys.stdout.write(json.dumps([calls.sent, calls.took, calls.ended]))


if __name__ == "__main__":
    main(sys.argv[1])
