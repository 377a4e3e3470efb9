"""docs/native.md says what the native transport does; its snippet runs in test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from core.tests.native import (
    PREFACE,
    VECTORS,
    Acting,
    Frame,
    frames_in,
    hello,
    listening,
    raw,
)

from micro.backends import _tcp_client, _tcp_frames, _tcp_link, _tcp_server
from micro.errors import Code
from micro.transport import Limits

PAGE = (Path(__file__).parent.parent / "docs" / "native.md").read_text()
_HEX = re.compile(r"^```hex\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [[bytes.fromhex(line) for line in block.splitlines()] for block in _HEX.findall(PAGE)]
WORDS = " ".join(PAGE.split())


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose first column has that name."""
    table = PAGE.split(f"\n\n| {first} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_page_has_three_examples() -> None:
    assert [len(block) for block in BLOCKS] == [1, 2, 6]
    assert BLOCKS[0] == [PREFACE]


def test_each_line_of_an_example_is_one_frame() -> None:
    for line in [line for block in BLOCKS[1:] for line in block]:
        assert len(frames_in(line)) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("block", BLOCKS[1:], ids=["call", "stream"])
async def test_our_server_answers_as_the_examples_say(block: list[bytes]) -> None:
    half = len(block) // 2
    async with listening(Acting()) as listener, raw(listener.address) as peer:
        peer.write(PREFACE, hello(), *block[:half])
        await peer.read()
        expected = b"".join(block[half:])
        assert (await peer.exactly(len(expected))).hex() == expected.hex()


def test_examples_are_vectors() -> None:
    shown = {vector["hex"] for vector in VECTORS["frames"]}
    assert {line.hex() for line in BLOCKS[1]} <= shown
    assert BLOCKS[2][0] == Frame(5, 4, 1, 0, b"\x0fsuite/Echo.Call").encode()


def test_kinds_are_those_of_the_code() -> None:
    for kind, name, *_ in rows("kind"):
        assert getattr(_tcp_frames, name) == int(kind)
    assert len(rows("kind")) == 12


def test_numbers_come_twice_where_the_page_says_so() -> None:
    twice = {int(row[0]) for row in rows("kind") if row[4] == "the number again"}
    assert twice == _tcp_frames.NUMBERED_TWICE


def test_header_is_as_the_page_says() -> None:
    sizes = {"1": "B", "2": "H", "4": "I"}
    layout = ">" + "".join(sizes[size] for _, size, _ in rows("offset"))
    assert _tcp_frames.HEADER.format == layout


def test_flags_are_those_of_the_code() -> None:
    flags = {name: int(value.strip("`"), 16) for value, name, _ in rows("flags")}
    assert flags["METADATA"] == _tcp_frames.METADATA
    assert flags["MORE"] == _tcp_frames.MORE
    assert sum(flags.values()) == _tcp_frames.FLAGS
    for name, number in _tcp_frames._CODECS.items():
        assert f"{number} `{name}`" in rows("flags")[0][2]


@pytest.mark.parametrize(
    ("said", "so"),
    [
        ("a body up to 65,536", _tcp_frames.FRAGMENT == 65_536),
        ("exactly 65,536 bytes", _tcp_frames.FRAGMENT == 65_536),
        ("65,552 or more", _tcp_frames.FRAGMENT + _tcp_frames.SIZE == 65_552),
        ("262,144 where it is missing", _tcp_frames.WINDOW == 262_144),
        ("more than 300,000 ms count as so many", _tcp_frames._MAX_TIMEOUT == 300_000),
        ("may have 16 REQUESTs or REPLYs in pieces", _tcp_link._UNFINISHED == 16),
        ("longer than 60 seconds ends", Limits().body_timeout == 60),
        ("HELLO after 5 seconds is hung up", Limits().head_timeout == 5),
        ("more than 100 fields", Limits().fields == 100),
        ("by our client after 60 s", _tcp_client._LOOK * _tcp_client._IDLE == 60),
        ("by our server after 90 s", Limits().idle == 90),
        ("our client after 10 s", _tcp_client._LOOK * _tcp_client._ASK == 10),
        ("our server after 20 s", _tcp_server._SILENCE == 20),
        (
            "gives up 5 s and 10 s later",
            (_tcp_client._GIVE_UP - _tcp_client._ASK) * _tcp_client._LOOK == 5
            and _tcp_server._GIVE_UP - _tcp_server._SILENCE == 10,
        ),
        ("ERROR with code 8", int(Code.RESOURCE_EXHAUSTED) == 8),
    ],
)
def test_numbers_of_the_page_are_those_of_the_code(said: str, so: bool) -> None:
    assert said in WORDS
    assert so
