"""What a transport refuses and what it holds back, as tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from micro.errors import ResourceExhausted, TooLarge, Unavailable
from micro.testing._calls import (
    CANCELLED,
    MIB,
    POURED,
    Peer,
    TransportClients,
    dialled,
    endless,
    heard,
    listening,
    messages,
    new_call,
    new_stream,
    said,
)
from micro.testing.lifecycle import SLACK
from micro.testing.waiting import eventually
from micro.transport import Channel, Limits, Transport

_SMALL = Limits(message=1000)
_LARGE = Limits(message=64 * MIB)
#: Bytes of the messages of a stream that is held back.
_PIECE = 16 * 1024
#: Seconds that a small call may take beside large ones, all but one of fifty; less the slack.
_SMALL_TAKES = 0.05
#: Seconds without another message after which none comes.
_STAYS = 0.3


class LimitCases(TransportClients):
    """The part of the contract that ``Limits`` and backpressure are."""

    # -- sizes

    @pytest.mark.asyncio
    async def test_request_over_limit_is_refused(self, transport: Transport, peer: Peer) -> None:
        async with (
            listening(transport, peer, _SMALL) as listener,
            dialled(transport, listener.address) as channel,
        ):
            await channel.call(new_call(), bytes(1000))
            with pytest.raises(TooLarge):
                await channel.call(new_call(), bytes(1001))
            assert (await channel.call(new_call(), b"small")).body == b"small"
        assert len(peer.calls) == 2

    @pytest.mark.asyncio
    async def test_reply_over_limit_is_refused(self, transport: Transport, peer: Peer) -> None:
        async with (
            listening(transport, peer) as listener,
            dialled(transport, listener.address, _SMALL) as channel,
        ):
            assert (await channel.call(new_call("Large.N1000"), b"")).body == b"x" * 1000
            for size in (1001, 3 * MIB):
                with pytest.raises(TooLarge):
                    await channel.call(new_call(f"Large.N{size}"), b"")
            assert (await channel.call(new_call(), b"small")).body == b"small"

    @pytest.mark.asyncio
    async def test_4_mib_are_the_default_limit(self, channel: Channel) -> None:
        body = (await channel.call(new_call(f"Large.N{4 * MIB}"), b"")).body
        assert body == b"x" * 4 * MIB
        with pytest.raises(TooLarge):
            await channel.call(new_call(f"Large.N{4 * MIB + 1}"), b"")
        assert (await channel.call(new_call(), b"small")).body == b"small"

    @pytest.mark.asyncio
    async def test_message_to_a_stream_over_limit_is_refused(
        self, transport: Transport, peer: Peer
    ) -> None:
        async with (
            listening(transport, peer, _SMALL) as listener,
            dialled(transport, listener.address) as channel,
        ):
            assert await heard(channel, new_stream("Tail.Call"), bytes(1000)) == [bytes(1000)]
            with pytest.raises(TooLarge):
                await heard(channel, new_stream("Tail.Call"), bytes(1000), bytes(1001))
            await eventually(lambda: not peer.running, within=CANCELLED + SLACK)
            assert (await channel.call(new_call(), b"small")).body == b"small"

    @pytest.mark.asyncio
    async def test_message_of_a_stream_over_limit_is_refused(
        self, transport: Transport, peer: Peer
    ) -> None:
        async with (
            listening(transport, peer) as listener,
            dialled(transport, listener.address, _SMALL) as channel,
        ):
            async with channel.stream(new_stream("Large.N1001"), said()) as reply:
                assert await anext(messages(reply)) == b"before"
                with pytest.raises(TooLarge):
                    await anext(messages(reply))
            await eventually(lambda: not peer.running, within=CANCELLED + SLACK)
            assert (await channel.call(new_call(), b"small")).body == b"small"

    @pytest.mark.asyncio
    @pytest.mark.parametrize(
        "metadata",
        [{f"n{number}": "v" * 8000 for number in range(5)}, {f"n{n}": "" for n in range(101)}],
        ids=["40 KB", "101 fields"],
    )
    async def test_metadata_over_limit_is_refused(
        self, channel: Channel, peer: Peer, metadata: dict[str, str]
    ) -> None:
        with pytest.raises(ResourceExhausted):
            await channel.call(new_call(metadata=metadata), b"")
        with pytest.raises(ResourceExhausted):
            await heard(channel, new_stream("Count.Call", metadata=metadata), b"1")
        assert not peer.calls
        assert (await channel.call(new_call(), b"small")).body == b"small"

    @pytest.mark.asyncio
    async def test_reply_metadata_over_limit_is_refused(
        self, transport: Transport, peer: Peer
    ) -> None:
        async with (
            listening(transport, peer) as listener,
            dialled(transport, listener.address, Limits(headers=4096)) as channel,
        ):
            with pytest.raises(TooLarge):
                await channel.call(new_call("Talk.N5000"), b"")
            assert (await channel.call(new_call(), b"small")).body == b"small"

    # -- numbers

    @pytest.mark.asyncio
    async def test_connections_over_limit_are_refused(
        self, transport: Transport, peer: Peer
    ) -> None:
        async with AsyncExitStack() as stack:
            listening_ = listening(transport, peer, Limits(connections=2))
            listener = await stack.enter_async_context(listening_)
            first, second, third = [
                await stack.enter_async_context(dialled(transport, listener.address))
                for _ in range(3)
            ]
            for channel in (first, second):
                await channel.call(new_call(), b"")
            with pytest.raises(Unavailable):
                await third.call(new_call(), b"")
            for channel in (first, second):
                assert (await channel.call(new_call(), b"kept")).body == b"kept"
            await first.aclose()
            await eventually(lambda: _accepted(third))

    @pytest.mark.asyncio
    async def test_calls_over_limit_wait(self, transport: Transport, peer: Peer) -> None:
        async with (
            listening(transport, peer, Limits(calls=3)) as listener,
            dialled(transport, listener.address) as channel,
        ):
            bodies = [b"%d" % number for number in range(10)]
            calls = [
                asyncio.create_task(channel.call(new_call("Wait.Echo"), body)) for body in bodies
            ]
            at_once = 3 if self.multiplexed else 10
            await eventually(lambda: peer.running == at_once)
            calls[9].cancel()  # one that waits to be sent
            peer.release.set()
            replies = await asyncio.gather(*calls[:9])
            assert [reply.body for reply in replies] == bodies[:9]
            assert peer.most == at_once

    @pytest.mark.asyncio
    async def test_streams_over_limit_are_refused(self, transport: Transport, peer: Peer) -> None:
        async with (
            listening(transport, peer, Limits(streams=2)) as listener,
            dialled(transport, listener.address) as channel,
            _begun(channel),
        ):
            async with _begun(channel):
                if not self.multiplexed:
                    async with _begun(channel):
                        return
                with pytest.raises(ResourceExhausted) as caught:
                    async with _begun(channel):
                        pass
                assert caught.value.sent is False
                assert (await channel.call(new_call(), b"beside")).body == b"beside"
            await eventually(lambda: peer.running == 1)
            async with _begun(channel):
                pass

    @pytest.mark.asyncio
    async def test_idle_connection_gives_its_place_to_another(
        self, transport: Transport, peer: Peer
    ) -> None:
        self.needs_sockets()
        async with (
            listening(transport, peer, Limits(connections=1, idle=0.2)) as listener,
            dialled(transport, listener.address) as first,
            dialled(transport, listener.address) as second,
        ):
            for channel in (first, second, first):
                await eventually(lambda: _accepted(channel))  # noqa: B023 - asked at once

    # -- backpressure

    @pytest.mark.asyncio
    async def test_slow_reader_holds_the_server(self, channel: Channel, peer: Peer) -> None:
        async with channel.stream(new_stream(f"Pour.N{_PIECE}"), said()) as reply:
            await anext(messages(reply))
            ahead = await _settled(lambda: peer.sent)
            assert ahead * _PIECE <= self.window
            for _ in range(ahead + 100):
                await anext(messages(reply))
            assert peer.sent >= ahead + 100

    @pytest.mark.asyncio
    async def test_slow_server_holds_the_caller(self, channel: Channel, peer: Peer) -> None:
        given = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal given
            for _ in range(POURED // _PIECE):
                given += 1
                yield bytes(_PIECE)

        async with channel.stream(new_stream("Sip.Call"), body()) as reply:
            await anext(messages(reply))
            ahead = await _settled(lambda: given)
            assert ahead * _PIECE <= self.window
            peer.release.set()
            for _ in range(ahead + 100):
                await anext(messages(reply))
            assert given >= ahead + 100

    @pytest.mark.asyncio
    async def test_held_streams_hold_nothing_else(self, channel: Channel) -> None:
        pour, sip = new_stream(f"Pour.N{_PIECE}"), new_stream("Sip.Call")
        async with (
            channel.stream(pour, said()) as poured,
            channel.stream(sip, endless(*[bytes(_PIECE)] * 1000)) as sipped,
        ):
            await anext(messages(poured))
            await anext(messages(sipped))
            assert (await channel.call(new_call(), b"beside")).body == b"beside"
            assert await heard(channel, new_stream("Count.Call"), b"2") == [b"0", b"1"]

    @pytest.mark.asyncio
    async def test_large_does_not_block_small(self, channel: Channel) -> None:
        async def large() -> None:
            while True:
                await channel.call(new_call(), bytes(3 * MIB))

        took: list[float] = []
        loads = [asyncio.create_task(large()) for _ in range(2)]
        try:
            for _ in range(50):
                began = time.monotonic()
                await channel.call(new_call(), b"small")
                took.append(time.monotonic() - began)
        finally:
            for load in loads:
                load.cancel()
            await asyncio.gather(*loads, return_exceptions=True)
        assert sorted(took)[-2] <= _SMALL_TAKES + SLACK

    @pytest.mark.asyncio
    async def test_small_overtakes_large(self, transport: Transport, peer: Peer) -> None:
        async with (
            listening(transport, peer, _LARGE) as listener,
            dialled(transport, listener.address, _LARGE) as channel,
        ):
            large = asyncio.create_task(channel.call(new_call("Wait.Echo"), bytes(32 * MIB)))
            small = asyncio.create_task(channel.call(new_call("Slow.Echo"), b"small"))
            assert (await small).body == b"small"
            peer.release.set()
            assert (await large).body == bytes(32 * MIB)


async def _accepted(channel: Channel) -> bool:
    try:
        await channel.call(new_call(), b"")
    except Unavailable:
        return False
    return True


@asynccontextmanager
async def _begun(channel: Channel) -> AsyncIterator[None]:
    """A stream that runs."""
    async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
        assert await anext(messages(reply)) == b"begun"
        yield


async def _settled(count: Callable[[], int]) -> int:
    """The value of ``count`` once it has stayed the same for half a second."""
    value, since = count(), time.monotonic()

    def stays() -> bool:
        nonlocal value, since
        if count() != value:
            value, since = count(), time.monotonic()
        return time.monotonic() - since > _STAYS

    await eventually(stays, within=20.0)
    return value
