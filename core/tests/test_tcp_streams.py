"""Streams of the native transport, a client and a server together: credit, order, memory."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from micro.call import Body, Call, Reply
from micro.errors import MicroError
from micro.testing import eventually
from micro.transport import Channel

from .native import KIB, MIB, PIECE, SOON, Acting, dialled, listening

sizes = st.lists(
    st.one_of(
        st.integers(0, 300_000),
        st.integers(0, 100),
        st.sampled_from([PIECE - 16, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 4 * PIECE]),
    ),
    max_size=30,
)
#: After how many messages a side rests for a moment; 0: never.
rests = st.sampled_from([0, 1, 7])


def new_stream(endpoint: str = "Echo.Call") -> Call:
    return Call(service="suite", endpoint=endpoint, kind="bidi", content_type="a/b")


def messages(reply: Reply) -> AsyncIterator[bytes]:
    assert not isinstance(reply.body, bytes)
    return reply.body


def made(count: Sequence[int], mark: int) -> list[bytes]:
    return [
        bytes([mark, number % 256])[:size] + bytes(max(size - 2, 0))
        for number, size in enumerate(count)
    ]


async def given_out(what: Sequence[bytes], rest: int) -> AsyncIterator[bytes]:
    for number, message in enumerate(what, 1):
        yield message
        if rest and not number % rest:
            await asyncio.sleep(0)


async def taken(body: AsyncIterator[bytes], rest: int, into: list[bytes]) -> None:
    async for message in body:
        into.append(message)
        if rest and not len(into) % rest:
            await asyncio.sleep(0.001)


@pytest.mark.asyncio
@settings(max_examples=40)
@example([300_000] * 8, [300_000] * 8, 1, 0, 0, 1)
@example([0] * 30, [PIECE + 1] * 30, 0, 1, 1, 0)
@example([PIECE, PIECE + 1] * 10, [PIECE * 3, 0] * 10, 1, 1, 1, 1)
@given(sizes, sizes, rests, rests, rests, rests)
async def test_no_mix_of_sizes_and_of_speeds_stops_a_stream(
    there: list[int], back: list[int], gives: int, takes: int, answers: int, reads: int
) -> None:
    """Each direction on its own: all messages arrive, in order, and nobody waits for ever."""
    to_server, to_client = made(there, 1), made(back, 2)
    got: list[bytes] = []

    async def handler(call: Call, body: Body) -> Reply:
        assert not isinstance(body, bytes)
        reading = asyncio.create_task(taken(body, takes, got))

        async def replies() -> AsyncIterator[bytes]:
            async for message in given_out(to_client, answers):
                yield message
            await reading

        return Reply(body=replies())

    heard: list[bytes] = []
    async with listening(handler) as listener, dialled(listener.address) as channel:
        async with asyncio.timeout(4 * SOON):
            async with channel.stream(new_stream(), given_out(to_server, gives)) as reply:
                await taken(messages(reply), reads, heard)
    assert heard == to_client
    assert got == to_server


@pytest.mark.asyncio
@settings(max_examples=15)
@given(st.integers(0, 2**32))
async def test_streams_and_calls_of_any_size_mix_nothing(seed: int) -> None:
    chance = random.Random(seed)
    handler = Acting()

    async def stream(channel: Channel, number: int) -> None:
        given = made([chance.randrange(150_000) for _ in range(chance.randrange(8))], number)
        heard: list[bytes] = []
        async with channel.stream(new_stream(), given_out(given, chance.randrange(3))) as reply:
            await taken(messages(reply), chance.randrange(3), heard)
        assert heard == given

    async def call(channel: Channel, number: int) -> None:
        body = made([chance.randrange(300_000)], number)[0]
        asked = Call(service="suite", endpoint="Echo.Call", content_type="a/b")
        assert (await channel.call(asked, body)).body == body

    async with listening(handler) as listener, dialled(listener.address) as channel:
        async with asyncio.timeout(4 * SOON), asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(stream(channel, number))
                tasks.create_task(call(channel, 100 + number))
                tasks.create_task(call(channel, 200 + number))


@pytest.mark.asyncio
@settings(max_examples=15)
@given(st.integers(0, 2**32))
async def test_leaving_streams_at_any_moment_disturbs_no_other(seed: int) -> None:
    chance = random.Random(seed)
    handler = Acting()

    async def stream(channel: Channel, number: int) -> None:
        endpoint = chance.choice(["Echo.Call", "Pour.5000", "Pour.200000", "Take.All", "Fail.All"])
        given = made([chance.randrange(200_000) for _ in range(5)], number)
        try:
            async with asyncio.timeout(chance.random() / 20):
                async with channel.stream(new_stream(endpoint), given_out(given, 1)) as reply:
                    heard: list[bytes] = []
                    await taken(messages(reply), 0, heard)
                    assert endpoint != "Echo.Call" or heard == given
        except (TimeoutError, MicroError):
            pass

    async with listening(handler) as listener, dialled(listener.address) as channel:
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(stream(channel, number))
        heard: list[bytes] = []
        async with channel.stream(new_stream(), given_out([b"a", b"b"], 0)) as reply:
            await taken(messages(reply), 0, heard)
        assert heard == [b"a", b"b"]
        await eventually(lambda: not handler.running)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1000, PIECE, 4 * MIB], ids=str)
@pytest.mark.parametrize("way", ["to the server", "to the client"])
async def test_who_does_not_read_holds_back_who_sends(size: int, way: str) -> None:
    """What lies between them is a window and one message, beside what the kernel holds."""
    handler = Acting()
    given = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            yield bytes(size)
            given += size

    async with listening(handler) as listener, dialled(listener.address) as channel:
        endpoint = "Hold.All" if way == "to the server" else f"Pour.{size}"
        said = body() if way == "to the server" else given_out([], 0)
        gc.collect()
        tracemalloc.start()
        try:
            async with channel.stream(new_stream(endpoint), said):
                before = -1.0
                while (sent := given + handler.sent * size + 0.5 * handler.running) > before:
                    before = sent
                    await asyncio.sleep(0.3)
                assert before <= 2 * size + 256 * KIB
                # Twice: the message that is sent and the one that is received.
                assert tracemalloc.get_traced_memory()[0] < 2 * size + 256 * KIB + MIB
        finally:
            tracemalloc.stop()
        await eventually(lambda: not handler.running)
