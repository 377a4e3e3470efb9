"""What every transport promises of calls with one message each way, as tests."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time

import pytest

from micro.call import Body, Call, Reply
from micro.errors import BY_NAME, Internal, InvalidArgument, MicroError, ResourceExhausted
from micro.testing._calls import (
    CANCELLED,
    MIB,
    Peer,
    TransportClients,
    dialled,
    listening,
    new_call,
)
from micro.testing._leaks import blocks, given_back, held
from micro.testing.lifecycle import SLACK
from micro.testing.waiting import eventually
from micro.transport import Channel, Listener, Transport

_OF_CALLER: contextvars.ContextVar[str] = contextvars.ContextVar("of the caller", default="nothing")


class UnaryCases(TransportClients):
    """The part of the contract that ``Channel.call`` is."""

    @pytest.mark.asyncio
    @pytest.mark.parametrize("size", [0, 1, 100, 65_536, 65_537, 3 * MIB], ids=str)
    async def test_body_arrives_exact_both_ways(self, channel: Channel, size: int) -> None:
        body = random.Random(size).randbytes(size)
        assert (await channel.call(new_call(), body)).body == body

    @pytest.mark.asyncio
    async def test_call_arrives_as_it_was_sent(self, channel: Channel, peer: Peer) -> None:
        deadline = time.monotonic() + 30
        sent = new_call(content_type="application/octet-stream", deadline=deadline)
        await channel.call(sent, b"")
        (got,) = peer.calls
        assert (got.service, got.endpoint, got.kind) == (sent.service, sent.endpoint, "unary")
        assert got.content_type == sent.content_type
        assert got.deadline == pytest.approx(deadline, abs=0.5)
        assert got.peer

    @pytest.mark.asyncio
    async def test_calls_have_ids_of_their_own(self, channel: Channel, peer: Peer) -> None:
        await asyncio.gather(*(channel.call(new_call("Slow.Echo"), b"") for _ in range(5)))
        for _ in range(5):
            await channel.call(new_call(), b"")
        assert all(call.id for call in peer.calls)
        if self.multiplexed:
            assert len({call.id for call in peer.calls}) == 10

    @pytest.mark.asyncio
    async def test_call_without_deadline_has_none(self, channel: Channel, peer: Peer) -> None:
        await channel.call(new_call(deadline=None), b"")
        assert peer.calls[0].deadline is None

    @pytest.mark.asyncio
    async def test_deadline_of_the_second_hop_is_what_is_left(
        self, transport: Transport, listener: Listener, peer: Peer
    ) -> None:
        left: list[float] = []

        async def forward(call: Call, _: Body) -> Reply:
            assert call.deadline is not None
            left.append(call.deadline - time.monotonic())
            await asyncio.sleep(0.1)
            async with dialled(transport, listener.address) as second:
                return await second.call(new_call(deadline=call.deadline), b"")

        async with (
            listening(transport, forward) as first,
            dialled(transport, first.address) as channel,
        ):
            await channel.call(new_call(deadline=time.monotonic() + 10), b"")
        (got,) = peer.calls
        assert got.deadline is not None
        assert left[0] < 10.01
        assert got.deadline - time.monotonic() < left[0] - 0.09

    @pytest.mark.asyncio
    async def test_metadata_roundtrip(self, channel: Channel, peer: Peer) -> None:
        metadata = {"tenant": "acme", "x.y_z-1": "ünï 漢字", "long": "v" * 8000, "empty": ""}
        reply = await channel.call(new_call(metadata=metadata), b"{}")
        assert peer.calls[0].metadata == metadata
        assert reply.metadata == metadata
        assert (await channel.call(new_call(), b"{}")).metadata == {}

    @pytest.mark.asyncio
    @pytest.mark.parametrize("name", ["micro-endpoint", "content-type", "micro-id", "te"])
    async def test_reserved_metadata_changes_nothing(
        self, channel: Channel, peer: Peer, name: str
    ) -> None:
        try:
            await channel.call(new_call(metadata={name: "Spoof.Ed"}), b"{}")
        except InvalidArgument:
            assert not peer.calls
        else:
            (got,) = peer.calls
            assert name not in got.metadata
            assert (got.endpoint, got.content_type) == ("Echo.Call", "application/json")
            assert got.id != "Spoof.Ed"

    @pytest.mark.asyncio
    @pytest.mark.parametrize("kind", sorted(BY_NAME))
    async def test_status_codes(self, channel: Channel, kind: str) -> None:
        with pytest.raises(BY_NAME[kind]) as caught:
            await channel.call(new_call(f"Fail.{kind}"), b"")
        as_asked(caught.value, kind)

    @pytest.mark.asyncio
    async def test_call_that_was_not_executed_is_told_so(self, channel: Channel) -> None:
        with pytest.raises(ResourceExhausted) as caught:
            await channel.call(new_call("Shed.It"), b"")
        assert caught.value.remote
        assert caught.value.sent is False
        assert caught.value.retry_after == 0.5

    @pytest.mark.asyncio
    async def test_handler_that_breaks_is_internal_and_tells_nothing(
        self, channel: Channel, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(Internal) as caught:
            await channel.call(new_call("Break.Down"), b"")
        assert caught.value.remote
        assert "secret" not in str(caught.value)
        assert "secret" in caplog.text
        assert (await channel.call(new_call(), b"after")).body == b"after"

    @pytest.mark.asyncio
    async def test_handler_has_a_context_of_its_own(self, transport: Transport) -> None:
        async def tell(_: Call, __: Body) -> Reply:
            return Reply(body=_OF_CALLER.get().encode())

        async with (
            listening(transport, tell) as listener,
            dialled(transport, listener.address) as channel,
        ):
            _OF_CALLER.set("a credential")
            assert (await channel.call(new_call(), b"")).body == b"nothing"

    @pytest.mark.asyncio
    async def test_1000_concurrent(self, channel: Channel) -> None:
        bodies = [b"%d" % number for number in range(1000)]
        calls = (channel.call(new_call("Slow.Echo"), body) for body in bodies)
        replies = await asyncio.gather(*calls)
        assert [reply.body for reply in replies] == bodies

    @pytest.mark.asyncio
    @pytest.mark.parametrize("steps", [0, 1, 2, 5], ids=str)
    async def test_cancel_before_the_handler_began(
        self, channel: Channel, peer: Peer, steps: int
    ) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b""))
        for _ in range(steps):
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert (await channel.call(new_call(), b"after")).body == b"after"
        await eventually(lambda: not peer.running, within=CANCELLED + SLACK)
        assert len(peer.calls) == 1 + peer.cancelled

    @pytest.mark.asyncio
    async def test_cancel_reaches_the_handler(self, channel: Channel, peer: Peer) -> None:
        calling = asyncio.create_task(channel.call(new_call("Wait.Echo"), b""))
        await eventually(lambda: peer.running)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)
        assert (await channel.call(new_call(), b"after")).body == b"after"

    @pytest.mark.asyncio
    async def test_deadline_on_sleeping_server(self, channel: Channel, peer: Peer) -> None:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await channel.call(new_call("Wait.Echo", deadline=began + 0.2), b"")
        assert time.monotonic() - began < 0.2 + 0.05 + SLACK
        await eventually(lambda: peer.cancelled == 1, within=CANCELLED + SLACK)

    @pytest.mark.asyncio
    async def test_cancel_storm_mixes_no_replies_and_leaks_nothing(
        self, transport: Transport, chance: random.Random
    ) -> None:
        peer = Peer()
        async with listening(transport, peer) as listener:
            await self._storm(transport, listener, chance, cancels=200)
            before, memory = held(), blocks()
            await self._storm(transport, listener, chance, cancels=10_000)
            await eventually(lambda: not peer.running, within=CANCELLED + SLACK)
            await given_back(before)
            peer.calls.clear()
            assert blocks() - memory < 5_000

    async def _storm(
        self, transport: Transport, listener: Listener, chance: random.Random, *, cancels: int
    ) -> None:
        async with dialled(transport, listener.address) as channel:
            while cancels > 0:
                cancels -= await _cancel_some(channel, chance)
            assert (await channel.call(new_call(), b"after")).body == b"after"


async def _cancel_some(channel: Channel, chance: random.Random) -> int:
    """Make 50 calls and cancel most of them at some moment; how many that hit."""
    bodies = [chance.randbytes(8) for _ in range(50)]
    calls = [channel.call(new_call("Slow.Echo"), body) for body in bodies]
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(chance.random() / 500)
    for task in tasks:
        if chance.random() < 0.9:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for body, outcome in zip(bodies, outcomes, strict=True):
        if not isinstance(outcome, asyncio.CancelledError):
            assert isinstance(outcome, Reply)
            assert outcome.body == body
    return sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


def as_asked(error: MicroError, kind: str) -> None:
    """Check that an error is what the peer was asked for."""
    assert type(error) is BY_NAME[kind]
    assert error.remote
    assert error.id == "suite"
    assert error.detail == f'as asked: {kind} ünï \\ "quoted" \n second line'
    assert error.details == {"kind": kind, "list": [1, None, "ü"]}
    assert error.retry_after == 0.5
    assert error.sent is None
