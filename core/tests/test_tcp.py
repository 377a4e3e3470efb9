"""The native transport, client and server together, where the suite has no promise of its own."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from micro.backends.tcp import TCPTransport
from micro.call import Body, Call, Reply
from micro.errors import Closed, ConfigError, DeadlineExceeded, InvalidArgument, Unavailable
from micro.plugins import Plugins
from micro.server import Server
from micro.testing import FaultProxy, eventually
from micro.transport import Limits
from micro.url import URL

from .native import (
    KIB,
    MIB,
    MORE,
    Acting,
    Peer,
    acting,
    connected_transport,
    dialled,
    greeted,
    listening,
    reply,
    request,
)

SLACK = 2.0


def new_call(endpoint: str = "Echo.Call", **fields: Any) -> Call:
    fields.setdefault("content_type", "application/octet-stream")
    return Call(service="suite", endpoint=endpoint, **fields)


# -- its URL and its life -------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("url", ["tcp://127.0.0.1:8080", "tcp:///path"])
async def test_url_says_no_address(url: str) -> None:
    transport = TCPTransport(URL.parse(url, source="--transport"))
    with pytest.raises(ConfigError, match="--server_address"):
        await transport.connect(Plugins().connections())
    await transport.aclose()


@pytest.mark.asyncio
async def test_url_has_no_options() -> None:
    with pytest.raises(ConfigError, match="colour"):
        await TCPTransport(URL.parse("tcp?colour=red")).connect(Plugins().connections())


@pytest.mark.asyncio
async def test_dialling_does_no_io() -> None:
    async with connected_transport() as transport:
        channel = await transport.dial("127.0.0.1:1", Limits(), timeout=1)
        await channel.aclose()
        with pytest.raises(Closed):
            await channel.call(new_call(), b"")
        with pytest.raises(InvalidArgument):
            await transport.dial("nowhere", Limits(), timeout=1)


# -- large and small ------------------------------------------------------------------------------


#: Of a peer whose own kernel buffers nothing worth speaking of.
NARROW = 128 * KIB


@pytest.mark.asyncio
async def test_small_request_waits_for_little_of_16_mib() -> None:
    """On a line on which these take a second: for what the kernel holds, a part of them."""
    at_call = passed = -1

    async def slow(peer: Peer) -> None:
        nonlocal passed
        large = 0
        began = time.monotonic()
        while True:
            frame = await peer.read()
            large += len(frame.body)
            if frame.stream == 2:
                passed = large
                peer.write(reply(2))
            elif not frame.flags & MORE:
                peer.write(reply(1))
            else:
                await asyncio.sleep(max(0.0, large / (16 * MIB) - (time.monotonic() - began)))

    async with (
        acting(slow, receives=NARROW, message=16 * MIB) as address,
        dialled(address, message=16 * MIB) as channel,
    ):
        large = asyncio.create_task(channel.call(new_call(), bytes(16 * MIB)))
        began = time.monotonic()
        await asyncio.sleep(0.2)
        at_call = int((time.monotonic() - began) * 16 * MIB)
        await channel.call(new_call(), b"a")
        assert not large.done()
        await large
    assert passed - at_call < 4 * MIB


@pytest.mark.asyncio
async def test_small_reply_waits_for_little_of_16_mib() -> None:
    async with (
        listening(Acting(), message=16 * MIB) as listener,
        greeted(listener.address, receives=NARROW, message=16 * MIB) as peer,
    ):
        peer.write(request(1, f"Large.{16 * MIB}"))
        await peer.read()
        await asyncio.sleep(0.1)
        peer.write(request(2))
        await asyncio.sleep(0.1)
        before = 0
        while (frame := await peer.read()).stream == 1:
            before += len(frame.body)
        assert frame == reply(2)
        assert before < 4 * MIB


@pytest.mark.asyncio
async def test_large_calls_and_streams_share_a_connection() -> None:
    """None waits for all of another: a stream goes on, and large replies come side by side."""
    handler = Acting()

    async def ticks(stop: asyncio.Event) -> AsyncIterator[bytes]:
        while not stop.is_set():
            yield b"tick"
            await asyncio.sleep(0.02)

    async with (
        listening(handler) as listener,
        FaultProxy(listener.address) as proxy,
        dialled(proxy.address) as channel,
    ):
        await channel.call(new_call(), b"")
        proxy.bandwidth(16 * MIB)
        stop = asyncio.Event()
        async with channel.stream(new_call(kind="bidi"), ticks(stop)) as reply:
            large = [
                asyncio.create_task(channel.call(new_call(f"Large.{3 * MIB}"), b""))
                for _ in range(4)
            ]
            heard = 0
            assert not isinstance(reply.body, bytes)
            async for _ in reply.body:
                if all(call.done() for call in large):
                    stop.set()
                else:
                    heard += 1
        assert heard >= 3
        assert {len((await call).body) for call in large} == {3 * MIB}  # type: ignore[arg-type] # bytes


@pytest.mark.asyncio
async def test_64_callers_with_4_mib_each_are_all_answered() -> None:
    async with (
        listening(Acting(), message=4 * MIB) as listener,
        dialled(listener.address, message=4 * MIB) as channel,
    ):
        body = bytes(4 * MIB)

        async def ask() -> bool:
            return (await channel.call(new_call(), body)).body == body

        assert all(await asyncio.gather(*(ask() for _ in range(64))))


@pytest.mark.asyncio
async def test_path_of_a_socket_is_an_address(tmp_path: Path) -> None:
    async with connected_transport() as transport:
        address = f"unix:{tmp_path / 'socket'}"
        listener = await transport.listen(address, Acting(), Limits())
        channel = await transport.dial(address, Limits(), timeout=1)
        for size in (0, 1, 3 * MIB):
            assert (await channel.call(new_call(), bytes(size))).body == bytes(size)
        await channel.aclose()
        await listener.aclose()
        channel = await transport.dial(address, Limits(), timeout=1)
        with pytest.raises(Unavailable) as caught:
            await channel.call(new_call(), b"")
        assert caught.value.sent is False
        await channel.aclose()


# -- handlers -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_each_call_has_a_task_and_a_context_of_its_own() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("of a call", default=0)
    seen: list[int] = []
    tasks: set[object] = set()

    async def handler(call: Call, body: Body) -> Reply:
        seen.append(variable.get())
        variable.set(7)
        tasks.add(asyncio.current_task())
        if body:
            await asyncio.sleep(0)
        return Reply(body=b"")

    async with listening(handler) as listener, dialled(listener.address) as channel:
        for body in (b"", b"waits", b"", b""):
            await channel.call(new_call(), body)
        await asyncio.gather(*(channel.call(new_call(), b"") for _ in range(5)))
    assert seen == [0] * 9
    assert len(tasks) == 9
    assert None not in tasks


@pytest.mark.asyncio
async def test_call_that_failed_further_on_was_executed() -> None:
    """Whoever repeats what was not sent must not repeat a handler that ran half."""
    ran = 0

    class Front:
        async def call(self) -> None:
            nonlocal ran
            ran += 1
            async with dialled("127.0.0.1:1") as channel:
                await channel.call(new_call(), b"")

        async def stream(self) -> AsyncIterator[int]:
            yield 1
            await self.call()

    server = Server("suite")
    server.handle(Front())
    async with listening(server.handler(())) as listener, dialled(listener.address) as channel:
        call = new_call("Front.Call", content_type="application/json")
        with pytest.raises(Unavailable) as caught:
            await channel.call(call, b"{}")
        assert caught.value.remote
        assert caught.value.sent is None
        call = new_call("Front.Stream", content_type="application/json", kind="server")

        async def body() -> AsyncIterator[bytes]:
            yield b"{}"

        with pytest.raises(Unavailable) as caught:
            async with channel.stream(call, body()) as reply:
                assert not isinstance(reply.body, bytes)
                async for _ in reply.body:
                    pass
        assert caught.value.sent is None
    assert ran == 2
    server.close()


@pytest.mark.asyncio
async def test_call_that_expired_on_its_way_was_not_executed() -> None:
    class Never:
        async def call(self) -> None:
            raise AssertionError

    server = Server("suite")
    server.handle(Never())
    handler = server.handler(())

    async def late(call: Call, body: Body) -> Reply:
        call.deadline = time.monotonic() - 1
        return await handler(call, body)

    async with listening(late) as listener, dialled(listener.address) as channel:
        with pytest.raises(DeadlineExceeded) as caught:
            await channel.call(new_call("Never.Call", content_type="application/json"), b"{}")
        assert caught.value.sent is False
    server.close()


# -- ends -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_drain_under_load_loses_no_call() -> None:
    """Each call is answered, or was provably not executed; none is in between."""
    executed: set[bytes] = set()

    async def handler(call: Call, body: Body) -> Reply:
        assert isinstance(body, bytes)
        executed.add(body[:8])
        await asyncio.sleep(0.01)
        return Reply(body=body)

    answered: set[bytes] = set()
    refused: set[bytes] = set()

    async with listening(handler) as listener, AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(dialled(listener.address)) for _ in range(5)]

        async def caller(number: int) -> None:
            for one in range(10_000):
                name = b"%3d %4d" % (number, one)
                body = name + bytes(200_000 if number % 10 == 0 else 0)
                try:
                    await channels[number % 5].call(new_call(), body)
                except Unavailable as exc:
                    assert exc.sent is False
                    refused.add(name)
                    return
                answered.add(name)

        callers = [asyncio.create_task(caller(number)) for number in range(50)]
        await eventually(lambda: len(answered) > 200)
        await listener.drain(5)
        await asyncio.gather(*callers)
    assert answered == executed
    assert len(refused) == 50


@pytest.mark.asyncio
async def test_idle_connection_of_a_client_costs_little_memory() -> None:
    async with listening(Acting()) as listener, AsyncExitStack() as stack:
        transport = await stack.enter_async_context(connected_transport())
        await _used(transport, listener.address, stack)
        gc.collect()
        tracemalloc.start()
        for _ in range(50):
            await _used(transport, listener.address, stack)
        gc.collect()
        files = ("_tcp_channel.py", "_tcp_client.py", "_tcp_link.py")
        filters = [tracemalloc.Filter(inclusive=True, filename_pattern=f"*{one}") for one in files]
        taken = tracemalloc.take_snapshot().filter_traces(filters).statistics("filename")
        tracemalloc.stop()
    assert sum(one.size for one in taken) / 50 < 5 * KIB  # uvloop its own transport included


async def _used(transport: TCPTransport, address: str, stack: AsyncExitStack) -> None:
    """A channel over which one call was made."""
    channel = await transport.dial(address, Limits(), timeout=5)
    stack.push_async_callback(channel.aclose)
    await channel.call(new_call(), b"")


@pytest.mark.asyncio
async def test_every_cut_of_a_conversation_is_told_and_leaves_nothing() -> None:
    """The connection ends after each byte that the server says; both sides notice."""
    handler = Acting()
    async with listening(handler) as listener, greeted(listener.address) as peer:
        del peer
        async with FaultProxy(listener.address) as proxy:
            for cut in range(0, 110, 3):
                proxy.reset_after(cut, direction="down")
                async with dialled(proxy.address) as channel:
                    with suppress(Unavailable):
                        async with asyncio.timeout(SLACK):
                            await channel.call(new_call(), b"a" * 20)
            proxy.heal()
        await eventually(lambda: not handler.running)
