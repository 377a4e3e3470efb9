"""What every transport promises about ends, of listeners and of channels, as tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from micro.call import Body, Call, Reply
from micro.errors import (
    Closed,
    ConfigError,
    InvalidArgument,
    MicroError,
    Unavailable,
)
from micro.testing._calls import (
    CANCELLED,
    Peer,
    TransportClients,
    dialled,
    echoes,
    endless,
    listening,
    messages,
    new_call,
    new_stream,
    read,
    said,
)
from micro.testing.lifecycle import SLACK
from micro.testing.waiting import eventually
from micro.transport import Channel, Limits, Listener, Transport


class EndCases(TransportClients):
    """The part of the contract about the ends of listeners and channels."""

    # -- listeners

    @pytest.mark.asyncio
    async def test_nobody_listens_is_unavailable_and_not_sent(
        self, transport: Transport, peer: Peer
    ) -> None:
        async with listening(transport, peer) as listener:
            address = listener.address
        async with dialled(transport, address) as channel:
            with pytest.raises(Unavailable) as caught:
                await channel.call(new_call(), b"")
            assert caught.value.sent is False
            with pytest.raises(Unavailable) as caught:
                await read(channel, new_stream("Echo.Call"), endless())
            assert caught.value.sent is False

    @pytest.mark.asyncio
    @pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536"])
    async def test_what_is_no_address_is_refused(self, transport: Transport, address: str) -> None:
        with pytest.raises(InvalidArgument, match="host:port"):
            await transport.dial(address, Limits(), timeout=1)
        with pytest.raises(InvalidArgument, match="host:port"):
            await transport.listen(address, Peer(), Limits())

    @pytest.mark.asyncio
    async def test_address_in_use_is_told(self, transport: Transport, listener: Listener) -> None:
        with pytest.raises(ConfigError, match="in use"):
            await transport.listen(listener.address, Peer(), Limits())

    @pytest.mark.asyncio
    async def test_server_that_closes_ends_the_call(
        self, channel: Channel, listener: Listener, peer: Peer
    ) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b""))
        await eventually(lambda: peer.running)
        await listener.aclose()
        with pytest.raises(Unavailable) as caught:
            await calling
        assert caught.value.sent is None
        assert peer.cancelled == 1

    @pytest.mark.asyncio
    async def test_drain_lets_calls_end_and_takes_no_new_ones(
        self, transport: Transport, channel: Channel, listener: Listener, peer: Peer
    ) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b"kept"))
        async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
            await eventually(lambda: peer.running == 2)
            draining = asyncio.create_task(listener.drain(30))
            async with dialled(transport, listener.address) as late:
                await eventually(lambda: _refused(late))
            await eventually(lambda: _refused(channel))
            assert not draining.done()
            peer.release.set()
            assert (await calling).body == b"kept"
            assert [message async for message in messages(reply)] == [b"released"]
        await asyncio.wait_for(draining, SLACK)

    @pytest.mark.asyncio
    async def test_drain_refuses_calls_that_wait_to_be_sent(
        self, transport: Transport, peer: Peer
    ) -> None:
        async with (
            listening(transport, peer, Limits(calls=1)) as listener,
            dialled(transport, listener.address) as channel,
        ):
            first = asyncio.create_task(channel.call(new_call("Wait.Echo"), b"first"))
            await eventually(lambda: peer.running == 1)
            second = asyncio.create_task(channel.call(new_call("Wait.Echo"), b"second"))
            if not self.multiplexed:
                await eventually(lambda: peer.running == 2)
            draining = asyncio.create_task(listener.drain(30))
            async with dialled(transport, listener.address) as late:
                await eventually(lambda: _refused(late))
            peer.release.set()
            assert (await first).body == b"first"
            if self.multiplexed:
                with pytest.raises(Unavailable) as caught:
                    await second
                assert caught.value.sent is False
            else:
                assert (await second).body == b"second"
            await asyncio.wait_for(draining, SLACK)

    @pytest.mark.asyncio
    async def test_drain_ends_after_its_grace(
        self, channel: Channel, listener: Listener, peer: Peer
    ) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b""))
        await eventually(lambda: peer.running)
        began = time.monotonic()
        await listener.drain(0.2)
        assert 0.19 <= time.monotonic() - began < 0.2 + SLACK
        await listener.aclose()
        with pytest.raises(Unavailable):
            await calling

    @pytest.mark.asyncio
    async def test_stream_that_runs_while_drained_goes_on_in_both_directions(
        self, transport: Transport, channel: Channel, listener: Listener
    ) -> None:
        more = asyncio.Event()

        async def saying() -> AsyncIterator[bytes]:
            yield b"before"
            await more.wait()
            yield b"after"

        async with channel.stream(new_stream("Echo.Call"), saying()) as reply:
            assert await anext(messages(reply)) == b"before"
            draining = asyncio.create_task(listener.drain(30))
            async with dialled(transport, listener.address) as late:
                await eventually(lambda: _refused(late))
            more.set()
            assert await anext(messages(reply)) == b"after"
            if transport.features.half_close:
                assert [message async for message in messages(reply)] == []
        await asyncio.wait_for(draining, SLACK)

    @pytest.mark.asyncio
    async def test_new_stream_while_drained_is_refused_as_not_sent(
        self, transport: Transport, channel: Channel, listener: Listener, peer: Peer
    ) -> None:
        async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
            draining = asyncio.create_task(listener.drain(30))
            async with dialled(transport, listener.address) as late:
                await eventually(lambda: _refused(late))
            handled = len(peer.calls)
            for _ in range(3):
                with pytest.raises(Unavailable) as caught:
                    await read(channel, new_stream("Echo.Call"), said(b"one"))
                assert caught.value.sent is False
            assert len(peer.calls) == handled
            peer.release.set()
            assert [message async for message in messages(reply)] == [b"released"]
        await asyncio.wait_for(draining, SLACK)

    @pytest.mark.asyncio
    async def test_what_outlasts_its_server_is_told_that_it_stopped(
        self, channel: Channel, listener: Listener, peer: Peer
    ) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b""))
        async with channel.stream(new_stream("Wait.Call"), endless()) as reply:
            assert await anext(messages(reply)) == b"begun"
            await eventually(lambda: peer.running == 2)
            await listener.drain(0.1)
            await listener.aclose()
            for waiting in (calling, anext(messages(reply))):
                with pytest.raises(Unavailable, match="the server stopped") as caught:
                    await asyncio.wait_for(waiting, SLACK)
                assert caught.value.sent is None
        assert peer.cancelled == 2

    @pytest.mark.asyncio
    async def test_stream_without_end_is_told_that_its_server_stopped(
        self, transport: Transport
    ) -> None:
        async def tell(_: Call, __: Body) -> Reply:
            async def news() -> AsyncIterator[bytes]:
                while True:
                    yield b"news"
                    await asyncio.sleep(0)

            return Reply(body=news())

        async with (
            listening(transport, tell) as listener,
            dialled(transport, listener.address) as channel,
        ):
            got: list[bytes] = []
            reading = asyncio.create_task(
                read(channel, new_call("News.Call", kind="server"), said(b""), into=got)
            )
            await eventually(lambda: len(got) > 100)
            await listener.drain(0.1)
            assert not reading.done()
            await listener.aclose()
            with pytest.raises(Unavailable, match="the server stopped"):
                await asyncio.wait_for(reading, SLACK)

    @pytest.mark.asyncio
    async def test_handler_that_ignores_its_end_holds_nobody(self, transport: Transport) -> None:
        begun, release = asyncio.Event(), asyncio.Event()
        ignored = 0

        async def ignore(_: Call, __: Body) -> Reply:
            nonlocal ignored
            begun.set()
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    ignored += 1
            return Reply(body=b"")

        async with (
            listening(transport, ignore) as listener,
            dialled(transport, listener.address) as channel,
        ):
            calling = asyncio.create_task(channel.call(new_call(), b""))
            await begun.wait()
            try:
                async with asyncio.timeout(SLACK):
                    await listener.aclose()
                    with pytest.raises(Unavailable):
                        await calling
            finally:
                release.set()
        assert ignored

    @pytest.mark.asyncio
    async def test_listener_that_closes_leaves_its_successor_alone(
        self, transport: Transport
    ) -> None:
        async with listening(transport, Peer()) as first:
            await first.drain(0)
            async with (
                listening(transport, Peer(), at=first.address) as second,
                dialled(transport, second.address) as channel,
            ):
                await first.aclose()
                await echoes(channel)

    # -- channels

    @pytest.mark.asyncio
    async def test_channel_closed_twice_and_used_after(self, channel: Channel) -> None:
        await echoes(channel)
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(Closed):
            await channel.call(new_call(), b"")
        with pytest.raises(Closed):
            await read(channel, new_stream("Echo.Call"), endless())

    @pytest.mark.asyncio
    async def test_call_that_still_connects_has_the_grace_of_its_channel(
        self, channel: Channel
    ) -> None:
        call = asyncio.create_task(channel.call(new_call(), b"late"))
        await asyncio.sleep(0)  # it begins to connect
        await channel.aclose(grace=5)
        assert (await call).body == b"late"
        with pytest.raises(Closed):
            await channel.call(new_call(), b"")

    @pytest.mark.asyncio
    async def test_channel_closes_after_its_grace(self, channel: Channel, peer: Peer) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b"kept"))
        await eventually(lambda: peer.running)
        closing = asyncio.create_task(channel.aclose(grace=30))
        peer.release.set()
        assert (await calling).body == b"kept"
        await asyncio.wait_for(closing, SLACK)

    @pytest.mark.asyncio
    async def test_channel_that_closes_ends_its_calls(self, channel: Channel, peer: Peer) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b""))
        await eventually(lambda: peer.running)
        async with asyncio.timeout(0.1 + SLACK):
            await channel.aclose(grace=0.1)
            with pytest.raises(Unavailable):
                await calling
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)


async def _refused(channel: Channel) -> bool:
    try:
        await channel.call(new_call(), b"")
    except Unavailable as exc:
        return exc.sent is False
    except MicroError:
        return False
    return False
