"""What every transport promises of streams, as tests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from micro.errors import BY_NAME, DeadlineExceeded, Internal, Unavailable, Unsupported
from micro.testing._calls import (
    CANCELLED,
    Peer,
    TransportClients,
    endless,
    heard,
    messages,
    new_call,
    new_stream,
    read,
    said,
)
from micro.testing._unary import as_asked
from micro.testing.lifecycle import SLACK
from micro.testing.waiting import eventually
from micro.transport import Channel, Listener, Transport


class StreamCases(TransportClients):
    """The part of the contract that ``Channel.stream`` is."""

    # -- the kinds

    @pytest.mark.asyncio
    async def test_server_stream(self, channel: Channel) -> None:
        call = new_call("Count.Call", kind="server")
        assert await heard(channel, call, b"4") == [b"0", b"1", b"2", b"3"]

    @pytest.mark.asyncio
    async def test_client_stream(self, transport: Transport, channel: Channel) -> None:
        call = new_call("Sum.Call", kind="client")
        if transport.features.half_close:
            assert await heard(channel, call, b"27", b"10", b"5") == [b"42"]
        else:
            with pytest.raises(Unsupported):
                await heard(channel, call, b"27", b"10", b"5")

    @pytest.mark.asyncio
    async def test_bidi_ping_pong(self, channel: Channel) -> None:
        turn: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)

        async def pings() -> AsyncIterator[bytes]:
            while True:
                yield await turn.get()

        async with channel.stream(new_stream("Echo.Call"), pings()) as reply:
            for number in range(100):
                turn.put_nowait(b"%d" % number)
                assert await anext(messages(reply)) == b"%d" % number

    @pytest.mark.asyncio
    async def test_empty_stream(self, transport: Transport, channel: Channel) -> None:
        assert await heard(channel, new_call("Count.Call", kind="server"), b"0") == []
        if transport.features.half_close:
            assert await heard(channel, new_stream("Echo.Call")) == []

    @pytest.mark.asyncio
    async def test_half_close(self, transport: Transport, channel: Channel) -> None:
        """The end of what the client says is no end of what the server says."""
        call = new_stream("Tail.Call")
        if transport.features.half_close:
            assert await heard(channel, call, b"a", b"b", b"c") == [b"a", b"b", b"c"]
        else:
            with pytest.raises(Unsupported):
                await heard(channel, new_call("Tail.Call", kind="client"), b"a")

    @pytest.mark.asyncio
    async def test_messages_stay_what_they_are(self, channel: Channel) -> None:
        sizes = [0, 1, 0, 0, 65_536, 7, 65_537, 1_000_000, 0]
        given = [b"%c" % (65 + number) * size for number, size in enumerate(sizes)]
        async with channel.stream(new_stream("Echo.Call"), endless(*given)) as reply:
            got = [await anext(messages(reply)) for _ in given]
        assert [len(message) for message in got] == sizes
        assert got == given

    @pytest.mark.asyncio
    async def test_10000_messages_each_way_in_order(self, channel: Channel) -> None:
        given = [b"%d" % number for number in range(10_000)]
        async with channel.stream(new_stream("Echo.Call"), endless(*given)) as reply:
            assert [await anext(messages(reply)) for _ in given] == given

    @pytest.mark.asyncio
    async def test_streams_and_calls_at_once_mix_nothing(self, channel: Channel) -> None:
        async def stream(number: int) -> None:
            given = [b"%d %d" % (number, one) for one in range(50)]
            async with channel.stream(new_stream("Echo.Call"), endless(*given)) as reply:
                assert [await anext(messages(reply)) for _ in given] == given

        async def call(number: int) -> None:
            body = b"%d" % number
            assert (await channel.call(new_call("Slow.Echo"), body)).body == body

        async with asyncio.TaskGroup() as tasks:
            for number in range(50):
                tasks.create_task(stream(number))
                for one in range(4):
                    tasks.create_task(call(1000 * number + one))

    # -- what goes with them

    @pytest.mark.asyncio
    async def test_stream_arrives_as_it_was_sent(self, channel: Channel, peer: Peer) -> None:
        deadline = time.monotonic() + 30
        sent = new_stream("Count.Call", content_type="application/msgpack", deadline=deadline)
        for _ in range(2):
            await heard(channel, sent, b"1")
        got, other = peer.calls
        assert (got.service, got.endpoint) == (sent.service, sent.endpoint)
        assert got.kind != "unary"
        assert got.content_type == sent.content_type
        assert got.deadline == pytest.approx(deadline, abs=0.5)
        assert got.peer
        assert got.id
        assert got.id != other.id or not self.multiplexed

    @pytest.mark.asyncio
    async def test_stream_metadata_comes_first_and_trailer_last(
        self, channel: Channel, peer: Peer
    ) -> None:
        metadata = {"tenant": "acme", "x.y_z-1": "ünï 漢字", "empty": ""}
        call = new_stream("Count.Call", metadata=metadata)
        async with channel.stream(call, said(b"3")) as reply:
            assert await anext(messages(reply)) == b"0"
            assert reply.metadata == metadata
            assert [message async for message in messages(reply)] == [b"1", b"2"]
            assert reply.trailer == {"messages": "3"}
        assert peer.calls[0].metadata == metadata

    # -- errors

    @pytest.mark.asyncio
    @pytest.mark.parametrize("kind", sorted(BY_NAME))
    async def test_stream_status_codes_come_after_the_messages(
        self, channel: Channel, kind: str
    ) -> None:
        got: list[bytes] = []
        with pytest.raises(BY_NAME[kind]) as caught:
            await read(channel, new_stream(f"Fail.{kind}"), endless(), into=got)
        as_asked(caught.value, kind)
        assert got == [b"one", b"two"]

    @pytest.mark.asyncio
    async def test_stream_refused_before_its_first_message(self, channel: Channel) -> None:
        with pytest.raises(BY_NAME["NotFound"]) as caught:
            await heard(channel, new_stream("Refuse.NotFound"), b"a")
        as_asked(caught.value, "NotFound")

    @pytest.mark.asyncio
    async def test_stream_that_breaks_is_internal_and_tells_nothing(
        self, channel: Channel, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(Internal) as caught:
            await heard(channel, new_stream("Fail.Break"))
        assert caught.value.remote
        assert "secret" not in str(caught.value)
        assert "secret" in caplog.text

    @pytest.mark.asyncio
    async def test_body_that_raises_cancels_the_stream(self, channel: Channel, peer: Peer) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            await eventually(lambda: peer.running)
            raise ArithmeticError("of the caller")

        with pytest.raises(ArithmeticError, match="of the caller"):
            await read(channel, new_stream("Wait.Call"), body())
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    async def test_server_that_closes_ends_the_stream(
        self, channel: Channel, peer: Peer, listener: Listener
    ) -> None:
        async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
            await listener.aclose()
            assert peer.cancelled == 1
            with pytest.raises(Unavailable):
                await anext(messages(reply))

    @pytest.mark.asyncio
    async def test_channel_that_closes_ends_its_streams(self, channel: Channel, peer: Peer) -> None:
        async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
            await channel.aclose()
            with pytest.raises(Unavailable):
                await anext(messages(reply))
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    # -- cancellation

    @pytest.mark.asyncio
    async def test_leaving_cancels_the_handler(self, channel: Channel, peer: Peer) -> None:
        async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    async def test_leaving_ends_a_handler_that_is_held_back(
        self, channel: Channel, peer: Peer
    ) -> None:
        async with channel.stream(new_stream("Pour.N16384"), endless()) as reply:
            await anext(messages(reply))
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    async def test_leaving_at_the_end_cancels_nothing(self, channel: Channel, peer: Peer) -> None:
        for _ in range(20):
            assert await heard(channel, new_stream("Count.Call"), b"1") == [b"0"]
        await eventually(lambda: not peer.running)
        assert peer.cancelled == 0

    @pytest.mark.asyncio
    async def test_cancelled_reader_cancels_the_handler(self, channel: Channel, peer: Peer) -> None:
        call = new_stream("Wait.Call")
        reading = asyncio.create_task(read(channel, call, endless()))
        await eventually(lambda: peer.sent == 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("endpoint", ["Count.Call", "Fail.Aborted"])
    async def test_end_of_the_server_ends_the_body_too(
        self, channel: Channel, endpoint: str
    ) -> None:
        """A body that still has something to say is closed when its stream is left."""
        closed: list[bool] = []

        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"1"
            finally:
                closed.append(True)

        with contextlib.suppress(BY_NAME["Aborted"]):
            await read(channel, new_stream(endpoint), body())
        assert closed

    @pytest.mark.asyncio
    async def test_reply_does_not_wait_for_a_body_that_nobody_reads(
        self, channel: Channel, peer: Peer
    ) -> None:
        async def body() -> AsyncIterator[bytes]:
            while True:
                yield bytes(16_384)

        async with channel.stream(new_stream("Wait.Call"), body()) as reply:
            assert await anext(messages(reply)) == b"begun"
            peer.release.set()
            assert [message async for message in messages(reply)] == [b"released"]

    # -- deadlines

    @pytest.mark.asyncio
    async def test_deadline_on_sleeping_stream(self, channel: Channel, peer: Peer) -> None:
        began = time.monotonic()
        call = new_stream("Wait.Call", deadline=began + 0.2)
        async with channel.stream(call, endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
            with pytest.raises(DeadlineExceeded):
                await anext(messages(reply))
            assert 0.2 <= time.monotonic() - began < 0.2 + 0.05 + SLACK
            await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    async def test_deadline_of_a_stream_whose_body_is_held_back(self, channel: Channel) -> None:
        began = time.monotonic()
        call = new_stream("Sip.Call", deadline=began + 0.2)
        with pytest.raises(DeadlineExceeded):
            await read(channel, call, endless(*[bytes(16_384)] * 5000))
        assert 0.2 <= time.monotonic() - began < 0.2 + 0.05 + SLACK

    @pytest.mark.asyncio
    async def test_deadline_that_has_passed(self, channel: Channel, peer: Peer) -> None:
        with pytest.raises(DeadlineExceeded):
            await heard(channel, new_stream("Wait.Call", deadline=time.monotonic() - 1))
        await eventually(lambda: not peer.running)
