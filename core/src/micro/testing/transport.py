"""What every transport promises of unary calls, as tests."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from micro.call import Body, Call, Handler, Reply
from micro.errors import BY_NAME, Closed, ConfigError, MicroError, TooLarge, Unavailable
from micro.plugins import Plugins
from micro.testing.waiting import eventually
from micro.transport import Channel, Limits, Listener, Transport
from micro.url import URL

_MIB = 1024 * 1024


class _Peer:
    """A handler that does what the endpoint's name says, and counts."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.cancelled: int = 0
        self.release: asyncio.Event = asyncio.Event()

    async def __call__(self, call: Call, body: Body) -> Reply:
        self.calls.append(call)
        what, _, which = call.endpoint.partition(".")
        if what == "Fail":
            raise BY_NAME[which](f'as asked: {which} ünï \\ "quoted" \n second line')
        if what == "Large":
            return Reply(body=b"x" * int(which.removeprefix("N")))
        if what == "Wait":
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if what == "Slow":
            await asyncio.sleep(random.random() / 200)
        return Reply(body=body, metadata=dict(call.metadata))


class TransportSuite:
    """The contract of ``Transport``: subclass it and name the ``backend``; ``url`` may change."""

    backend: type[Transport]

    @pytest.fixture
    def url(self) -> str:
        return self.backend.schemes[0]

    @pytest_asyncio.fixture
    async def transport(self, url: str) -> AsyncIterator[Transport]:
        connections = Plugins().connections()
        transport = self.backend(URL.parse(url, source="test"))
        await transport.connect(connections)
        yield transport
        await transport.aclose()
        await connections.aclose()

    @pytest.fixture
    def peer(self) -> _Peer:
        return _Peer()

    @pytest_asyncio.fixture
    async def listener(self, transport: Transport, peer: _Peer) -> AsyncIterator[Listener]:
        async with _listening(transport, peer) as listener:
            yield listener

    @pytest_asyncio.fixture
    async def channel(self, transport: Transport, listener: Listener) -> AsyncIterator[Channel]:
        async with _dialled(transport, listener.address) as channel:
            yield channel

    @pytest.mark.asyncio
    @pytest.mark.parametrize("size", [0, 1, 100, 65_536, 3 * _MIB], ids=str)
    async def test_body_arrives_exact_both_ways(self, channel: Channel, size: int) -> None:
        body = random.Random(size).randbytes(size)
        assert (await channel.call(_call(), body)).body == body

    @pytest.mark.asyncio
    async def test_call_arrives_as_it_was_sent(self, channel: Channel, peer: _Peer) -> None:
        deadline = time.monotonic() + 30
        sent = _call(id="7", content_type="application/octet-stream", deadline=deadline)
        await channel.call(sent, b"")
        (got,) = peer.calls
        assert (got.service, got.endpoint, got.id) == (sent.service, sent.endpoint, sent.id)
        assert got.content_type == sent.content_type
        assert got.deadline == pytest.approx(deadline, abs=0.5)
        assert got.peer

    @pytest.mark.asyncio
    async def test_metadata_roundtrip(self, channel: Channel) -> None:
        metadata = {"tenant": "acme", "x.y_z-1": "ünï 漢字", "long": "v" * 8000, "empty": ""}
        reply = await channel.call(_call(metadata=metadata), b"{}")
        assert reply.metadata == metadata

    @pytest.mark.asyncio
    @pytest.mark.parametrize("kind", sorted(BY_NAME))
    async def test_status_codes(self, channel: Channel, kind: str) -> None:
        with pytest.raises(BY_NAME[kind]) as caught:
            await channel.call(_call(f"Fail.{kind}"), b"")
        assert type(caught.value) is BY_NAME[kind]
        assert caught.value.remote
        assert caught.value.id == "suite"
        assert caught.value.detail == f'as asked: {kind} ünï \\ "quoted" \n second line'

    @pytest.mark.asyncio
    async def test_request_over_limit_is_refused(self, transport: Transport, peer: _Peer) -> None:
        async with (
            _listening(transport, peer, Limits(message=1000)) as listener,
            _dialled(transport, listener.address) as channel,
        ):
            await channel.call(_call(), b"x" * 1000)
            with pytest.raises(TooLarge):
                await channel.call(_call(), b"x" * 1001)
            assert (await channel.call(_call(), b"small")).body == b"small"
        assert len(peer.calls) == 2

    @pytest.mark.asyncio
    async def test_reply_over_limit_is_refused(self, channel: Channel) -> None:
        with pytest.raises(TooLarge):
            await channel.call(_call(f"Large.N{4 * _MIB + 1}"), b"")
        assert (await channel.call(_call(), b"small")).body == b"small"

    @pytest.mark.asyncio
    async def test_1000_concurrent(self, channel: Channel) -> None:
        bodies = [b"%d" % number for number in range(1000)]
        replies = await asyncio.gather(*(channel.call(_call("Slow.Echo"), body) for body in bodies))
        assert [reply.body for reply in replies] == bodies

    @pytest.mark.asyncio
    async def test_cancel_reaches_the_handler(self, channel: Channel, peer: _Peer) -> None:
        calling = asyncio.create_task(channel.call(_call("Wait.Echo"), b""))
        await eventually(lambda: peer.calls)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await eventually(lambda: peer.cancelled == 1, within=0.1 + 2.0)

    @pytest.mark.asyncio
    async def test_cancel_storm_mixes_no_replies(self, channel: Channel, peer: _Peer) -> None:
        chance = random.Random(7)
        cancelled = 0
        for batch in range(200):
            tasks = {
                b"%d-%d" % (batch, n): asyncio.create_task(
                    channel.call(_call("Slow.Echo"), b"%d-%d" % (batch, n))
                )
                for n in range(20)
            }
            await asyncio.sleep(chance.random() / 200)
            for task in tasks.values():
                if chance.random() < 0.5:
                    task.cancel()
            for body, outcome in zip(
                tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True
            ):
                if isinstance(outcome, asyncio.CancelledError):
                    cancelled += 1
                else:
                    assert isinstance(outcome, Reply)
                    assert outcome.body == body
        assert cancelled > 500
        assert (await channel.call(_call(), b"after")).body == b"after"

    @pytest.mark.asyncio
    async def test_nobody_listens_is_unavailable_and_not_sent(
        self, transport: Transport, peer: _Peer
    ) -> None:
        async with _listening(transport, peer) as listener:
            address = listener.address
        async with _dialled(transport, address) as channel:
            with pytest.raises(Unavailable) as caught:
                await channel.call(_call(), b"")
            assert caught.value.sent is False

    @pytest.mark.asyncio
    async def test_server_that_closes_ends_the_call(
        self, transport: Transport, peer: _Peer
    ) -> None:
        async with _listening(transport, peer) as listener:
            async with _dialled(transport, listener.address) as channel:
                calling = asyncio.create_task(channel.call(_call("Wait.Echo"), b""))
                await eventually(lambda: peer.calls)
                await listener.aclose()
                with pytest.raises(Unavailable) as caught:
                    await calling
                assert caught.value.sent is None
        assert peer.cancelled == 1

    @pytest.mark.asyncio
    async def test_drain_lets_calls_end_and_takes_no_new_ones(
        self, transport: Transport, peer: _Peer
    ) -> None:
        async with _listening(transport, peer) as listener:
            async with _dialled(transport, listener.address) as channel:
                calling = asyncio.create_task(channel.call(_call("Wait.Echo"), b"kept"))
                await eventually(lambda: peer.calls)
                draining = asyncio.create_task(listener.drain(30))
                async with _dialled(transport, listener.address) as late:
                    await eventually(lambda: _refused(late))
                assert not draining.done()
                peer.release.set()
                assert (await calling).body == b"kept"
                await asyncio.wait_for(draining, 5)

    @pytest.mark.asyncio
    async def test_drain_ends_after_its_grace(self, transport: Transport, peer: _Peer) -> None:
        async with _listening(transport, peer) as listener:
            async with _dialled(transport, listener.address) as channel:
                calling = asyncio.create_task(channel.call(_call("Wait.Echo"), b""))
                await eventually(lambda: peer.calls)
                began = time.monotonic()
                await listener.drain(0.2)
                assert 0.19 <= time.monotonic() - began < 0.2 + 2.0
                await listener.aclose()
                with pytest.raises(Unavailable):
                    await calling

    @pytest.mark.asyncio
    async def test_address_in_use_is_told(self, transport: Transport, listener: Listener) -> None:
        with pytest.raises(ConfigError, match="in use"):
            await transport.listen(listener.address, _Peer(), Limits())

    @pytest.mark.asyncio
    async def test_channel_closed_twice_and_used_after(self, channel: Channel) -> None:
        await channel.aclose()
        await channel.aclose()
        with pytest.raises(Closed):
            await channel.call(_call(), b"")

    @pytest.mark.asyncio
    async def test_channel_closes_after_its_grace(self, channel: Channel, peer: _Peer) -> None:
        calling = asyncio.create_task(channel.call(_call("Wait.Echo"), b"kept"))
        await eventually(lambda: peer.calls)
        closing = asyncio.create_task(channel.aclose(grace=30))
        peer.release.set()
        assert (await calling).body == b"kept"
        await asyncio.wait_for(closing, 5)

    @pytest.mark.asyncio
    async def test_transport_closed_twice_and_used_after(self, url: str) -> None:
        connections = Plugins().connections()
        transport = self.backend(URL.parse(url, source="test"))
        await transport.connect(connections)
        await transport.aclose()
        await transport.aclose()
        await connections.aclose()
        with pytest.raises(Closed):
            await transport.dial("127.0.0.1:1", timeout=1)
        with pytest.raises(Closed):
            await transport.listen("127.0.0.1:0", _Peer(), Limits())


def _call(endpoint: str = "Echo.Call", **fields: object) -> Call:
    given = {"service": "suite", "endpoint": endpoint, "deadline": time.monotonic() + 30, **fields}
    return Call(**given)  # type: ignore[arg-type]


async def _refused(channel: Channel) -> bool:
    try:
        await channel.call(_call(), b"")
    except Unavailable as exc:
        return exc.sent is False
    except MicroError:
        return False
    return False


@asynccontextmanager
async def _listening(
    transport: Transport, handler: Handler, limits: Limits | None = None
) -> AsyncIterator[Listener]:
    listener = await transport.listen("127.0.0.1:0", handler, limits or Limits())
    try:
        yield listener
    finally:
        await listener.aclose()


@asynccontextmanager
async def _dialled(transport: Transport, address: str) -> AsyncIterator[Channel]:
    channel = await transport.dial(address, timeout=5)
    try:
        yield channel
    finally:
        await channel.aclose()
