"""What every transport promises when peers stop, vanish or talk nonsense, as tests."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from micro.errors import (
    DataLoss,
    DeadlineExceeded,
    Internal,
    Unavailable,
)
from micro.plugins import Plugins
from micro.testing._calls import (
    CANCELLED,
    HASTY,
    MIB,
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
)
from micro.testing.lifecycle import RECOVERY, SLACK, needed, nobody
from micro.testing.proxy import FaultProxy
from micro.testing.servers import Server
from micro.testing.waiting import eventually
from micro.transport import Channel, Transport

#: Answers that no protocol of ours begins with.
_GARBAGE = {
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"SSH-2.0-OpenSSH_9.2\r\n" * 50,
    "chance": random.Random(5).randbytes(10_000),
}


class FaultCases(TransportClients):
    """The part of the contract about networks and peers that fail."""

    @pytest.mark.asyncio
    @pytest.mark.parametrize("how", ["reset_after", "cut_after"])
    async def test_connection_that_ends_mid_reply(
        self, far: Channel, broken: FaultProxy, peer: Peer, how: str
    ) -> None:
        await echoes(far)
        getattr(broken, how)(100_000, direction="down")
        with pytest.raises(Unavailable) as caught:
            await far.call(new_call(f"Large.N{3 * MIB}"), b"")
        assert caught.value.sent is None
        broken.heal()
        await _recovers(far)
        assert [call.endpoint for call in peer.calls].count(f"Large.N{3 * MIB}") == 1

    @pytest.mark.asyncio
    async def test_connection_that_ends_mid_stream(
        self, far: Channel, broken: FaultProxy, peer: Peer
    ) -> None:
        async with far.stream(new_stream("Pour.N1000"), endless()) as reply:
            await anext(messages(reply))
            broken.cut()
            with pytest.raises(Unavailable):
                await _drain(messages(reply))
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)
        await _recovers(far)

    @pytest.mark.asyncio
    async def test_handler_is_cancelled_when_its_caller_is_lost(
        self, far: Channel, broken: FaultProxy, peer: Peer
    ) -> None:
        calling = asyncio.create_task(far.call(new_call("Wait.Echo"), b""))
        await eventually(lambda: peer.running)
        broken.cut()
        with pytest.raises(Unavailable):
            await calling
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    async def test_half_open_peer_is_found(
        self, hasty_url: str | None, broken: FaultProxy, plugins: Plugins, peer: Peer
    ) -> None:
        """Also by a call that has no deadline."""
        url = needed(hasty_url, "no hasty_url")
        async with (
            self.connected(url, plugins) as transport,
            dialled(transport, broken.address) as channel,
        ):
            await echoes(channel)
            broken.blackhole()
            began = time.monotonic()
            with pytest.raises(Unavailable):
                await channel.call(new_call(deadline=None), b"")
            assert time.monotonic() - began < HASTY + SLACK
            broken.heal()
            await _recovers(channel)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("garbage", sorted(_GARBAGE))
    async def test_garbage_reply(self, transport: Transport, garbage: str) -> None:
        self.needs_sockets()
        async with (
            _babbling(_GARBAGE[garbage]) as (address, closed),
            dialled(transport, address) as channel,
            asyncio.timeout(SLACK),
        ):
            with pytest.raises((DataLoss, Internal, Unavailable)):
                await channel.call(new_call(), b"")
            with pytest.raises((DataLoss, Internal, Unavailable)):
                await read(channel, new_stream("Echo.Call"), endless(b"a"))
            await closed.wait()

    # -- as LifecycleSuite has it of servers; here the server is a listener

    @pytest.mark.asyncio
    @pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
    async def test_init_bad_address(
        self,
        url: str,
        server: Server | None,
        plugins: Plugins,
        silent: bool,  # noqa: FBT001 - pytest gives it by name
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        if silent:
            self.needs_sockets()
        before, began = asyncio.all_tasks(), time.monotonic()
        with nobody(silent=silent) as address, pytest.raises((Unavailable, TimeoutError)):
            async with (
                self.connected(url, plugins) as transport,
                dialled(transport, address, timeout=0.5) as channel,
                asyncio.timeout(1.0),  # as every caller has it
            ):
                await channel.call(new_call(), b"")
        assert time.monotonic() - began < 1.0 + SLACK
        await eventually(lambda: asyncio.all_tasks() <= before)
        gc.collect()
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]

    @pytest.mark.asyncio
    async def test_down_up(self, url: str, server: Server | None, plugins: Plugins) -> None:
        async with self.connected(url, plugins) as transport, AsyncExitStack() as stack:
            async with listening(transport, Peer()) as listener:
                address = listener.address
                channel = await stack.enter_async_context(dialled(transport, address))
                await echoes(channel)
            began = time.monotonic()
            for _ in range(3):
                with pytest.raises(Unavailable):
                    await channel.call(new_call(), b"")
            assert time.monotonic() - began < SLACK
            async with listening(transport, Peer(), at=address):
                await _recovers(channel)

    @pytest.mark.asyncio
    async def test_reconnects_after_restart(
        self, url: str, server: Server | None, plugins: Plugins
    ) -> None:
        async with self.connected(url, plugins) as transport, AsyncExitStack() as stack:
            async with listening(transport, Peer()) as listener:
                address = listener.address
                channel = await stack.enter_async_context(dialled(transport, address))
                await echoes(channel)
            for _ in range(3):
                async with listening(transport, Peer(), at=address):
                    await _recovers(channel)

    @pytest.mark.asyncio
    async def test_server_that_says_nothing(
        self, url: str, server: Server | None, plugins: Plugins
    ) -> None:
        self.needs_sockets()
        async with (
            self.connected(url, plugins) as transport,
            listening(transport, Peer()) as listener,
            FaultProxy(listener.address) as proxy,
            dialled(transport, proxy.address) as channel,
        ):
            await echoes(channel)
            proxy.blackhole()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await channel.call(new_call(), b"")
            began = time.monotonic()
            call = new_stream("Echo.Call", deadline=began + 0.2)
            with pytest.raises(DeadlineExceeded):
                await read(channel, call, endless(b"a"))
            assert 0.2 <= time.monotonic() - began < 0.2 + SLACK
            proxy.heal()
            await _recovers(channel)


async def _drain(messages: AsyncIterator[bytes]) -> None:
    async for _ in messages:
        pass


async def _recovers(channel: Channel) -> None:
    """Wait until it works; it has to, a short time after its server does."""

    async def works() -> bool:
        try:
            await echoes(channel)
        except Unavailable:
            return False
        return True

    async with asyncio.timeout(RECOVERY + SLACK):
        await eventually(works, within=RECOVERY + SLACK)


@asynccontextmanager
async def _babbling(answer: bytes) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that answers whatever it is told with ``answer``; the event: nobody listens."""
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(1)
            writer.write(answer)
            while await reader.read(65_536):
                pass
        except ConnectionError:
            pass
        closed.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "{}:{}".format(*server.sockets[0].getsockname()), closed
