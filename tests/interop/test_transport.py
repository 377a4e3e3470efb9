"""Unmodified Go Micro and ours: what does not depend on a registry."""

from __future__ import annotations

import asyncio

import pytest
from tests.interop.columns import Column
from tests.interop.gophers import Gopher
from tests.interop.ours import Helloworld, Request, Wire, caller, our_service

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.parametrize(
        "column", [Column("mdns", "v4.11.0")], ids=str, indirect=True, scope="module"
    ),
]


async def test_go_exchanges_bytes_with_our_service(column: Column, go: Gopher, name: str) -> None:
    async with our_service(name):
        assert await go.told("raw", name, "010002") == "00ff010002"


async def test_our_client_exchanges_bytes_with_a_go_service(column: Column, go: Gopher) -> None:
    async with caller(go.name) as (web, _):
        assert await web.client(go.name, Wire).raw(b"\x01\x00") == b"\x00\xff\x01\x00"


async def test_go_calls_us_while_it_handles_a_stream(column: Column, go: Gopher, name: str) -> None:
    """Its calls have the id of the stream, and are calls all the same."""
    async with our_service(name), caller(go.name) as (web, _):
        relay = web.client(go.name, Wire).relay(Request(name))
        assert [response.message async for response in relay] == ["Hello 1"]


async def test_go_server_loses_no_call_of_ours(column: Column, go: Gopher) -> None:
    """It loses about four in 10,000 requests of which it cannot tell the next from the last;
    its own clients lose them too."""
    async with caller(go.name) as (web, _):
        call = web.client(go.name, Helloworld).call
        numbers = iter(range(10_000))

        async def calls() -> None:
            for number in numbers:
                assert (await call(Request(f"{number}"))).message == f"Hello {number}"

        await asyncio.gather(calls(), calls())
