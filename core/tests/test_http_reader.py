"""How HTTP messages are cut out of what comes in, against httptools and against itself."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations, zip_longest
from typing import Any

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from micro.backends._http_head import Head, Refused, request_head
from micro.backends._http_reader import Numbers, Reader
from micro.backends._http_wire import Answer, read_answer
from micro.transport import Limits

from .http_peer import VECTORS

LIMITS = Limits(message=10_000, headers=4_000)
#: Names of headers whose digits may differ in a head that is known.
NUMBERS = ("content-length", "micro-id", "timeout")


class Meaning:
    """All that a request's head says."""

    def __init__(self, head: Head) -> None:
        given = {name: head.headers.get(name, "") for name in NUMBERS[1:]}
        self.length = head.length
        self.numbers: Numbers = (
            head.length, given["micro-id"].encode(), given["timeout"].encode(),
        )  # fmt: skip
        self.rest = (
            *(head.method, head.path, head.version, head.keep_alive),
            {name: text for name, text in head.headers.items() if name not in NUMBERS},
        )


def read_meaning(data: bytes, limits: Limits) -> Meaning:
    return Meaning(request_head(data, limits))


def read_all(reader: Reader[Meaning], *pieces: bytes) -> Iterator[tuple[object, ...]]:
    """The messages in ``pieces``, up to the first that is refused."""
    for data in pieces:
        try:
            message = reader.read(data)
            while message is not None:
                meaning, numbers, body = message
                yield meaning.rest, numbers, body
                message = reader.read(b"") if reader.rest else None
        except Refused as exc:
            yield exc.status, type(exc.error)
            return


def fresh() -> Reader[Meaning]:
    return Reader(read_meaning, LIMITS)


# -- requests, good and bad --------------------------------------------------------------------

digits = st.integers(0, 10**12).map(str)
values = st.text('aZ0:, \t"=Content-Length', max_size=20).map(str.strip)
lines = st.lists(
    st.one_of(
        *(st.tuples(st.just(name), digits) for name in ("Micro-Id", "Timeout")),
        st.tuples(st.sampled_from(["Accept", "Micro-Endpoint", "X-A", "x-a", "X-B"]), values),
        st.tuples(st.sampled_from(["Content-Type", "Connection", "Expect"]), values),
    ),
    max_size=7,
    unique_by=lambda line: line[0],
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    body = draw(st.binary(max_size=40))
    given = draw(lines)
    where = draw(st.integers(0, len(given)))
    if draw(st.booleans()):
        given.insert(where, ("Content-Length", str(len(body))))
    elif draw(st.booleans()):
        given.insert(where, ("Transfer-Encoding", "chunked"))
        body = chunked(body, draw(st.integers(1, 10)), draw(st.sampled_from([b"", b";a=b"])))
    else:
        body = b""
    head = "".join(f"{name}: {value}\r\n" for name, value in given)
    return f"POST / HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body


def chunked(body: bytes, size: int, extension: bytes) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return chunks + b"0\r\n\r\n"


@st.composite
def changed(draw: st.DrawFn, given: bytes) -> bytes:
    """Bytes with one place that is another."""
    at = draw(st.integers(0, len(given)))
    cut = draw(st.integers(0, 3))
    put = draw(
        st.one_of(st.binary(max_size=3), st.sampled_from([b"\r\n", b"\n", b"0", b" ", b":"]))
    )
    return given[:at] + put + given[at + cut :]


others = st.lists(
    st.tuples(st.sampled_from(["Accept", "X-A", "X-B", "X-C", "X-D"]), values), max_size=1
)
odd = st.sampled_from(["", "x", "1x", "x1", "-1", "1 2", "1,2", "1\r\nX-E: 2", "0" * 30, "1\r\n"])


@st.composite
def repeated(draw: st.DrawFn) -> list[bytes]:
    """Requests of one peer: in a few forms, with other numbers, and now and then a fault."""
    names = ["Content-Length", "Micro-Id", "Timeout"][: draw(st.integers(1, 3))]
    if draw(st.integers(0, 4)) == 0:
        names = draw(st.permutations(names))
    forms = [[(draw(others), name) for name in names] for _ in range(draw(st.integers(1, 2)))]
    ends = draw(others)
    sent: list[bytes] = []
    for _ in range(draw(st.integers(4, 12))):
        body = draw(st.binary(max_size=12))
        given: list[tuple[str, str]] = []
        for before, name in draw(st.sampled_from(forms)):
            given += before
            good = str(len(body)) if name == "Content-Length" else draw(digits)
            given.append((name, draw(odd) if draw(st.integers(0, 9)) == 0 else good))
        head = "".join(f"{name}: {value}\r\n" for name, value in given + ends)
        whole = f"POST / HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body
        sent.append(draw(changed(whole)) if draw(st.integers(0, 15)) == 0 else whole)
    return sent


# -- the promises ------------------------------------------------------------------------------


@settings(max_examples=300)
@given(repeated(), st.lists(st.integers(0, 200)))
def test_known_head_is_read_as_if_it_were_new(sent: list[bytes], cuts: list[int]) -> None:
    remembering = fresh()
    for data, cut in zip_longest(sent, cuts[: len(sent)], fillvalue=0):
        assert isinstance(data, bytes)
        anew = fresh()
        expected = list(read_all(anew, data))
        assert list(read_all(remembering, data[:cut], data[cut:])) == expected
        if len(expected) != 1 or len(expected[0]) != 3 or anew.rest or anew.meaning is not None:
            return  # it was refused, or its end is still to come


@pytest.mark.parametrize("names", [*permutations(["Content-Length", "Micro-Id", "Timeout"])])
def test_numbers_in_any_order_are_told_apart(names: tuple[str, ...]) -> None:
    remembering = fresh()
    for number in range(5, 15):
        lines = [f"{name}: {0 if name == 'Content-Length' else number * 7}\r\n" for name in names]
        data = f"POST / HTTP/1.1\r\nHost: x\r\n{''.join(lines)}\r\n".encode()
        for cut in range(len(data)):
            assert list(read_all(remembering, data[:cut], data[cut:])) == list(
                read_all(fresh(), data)
            )


def test_heads_are_remembered() -> None:
    """Else the promise above would promise nothing."""
    parsed: list[bytes] = []

    def read(data: bytes, limits: Limits) -> Meaning:
        parsed.append(data)
        return read_meaning(data, limits)

    for path in sorted(VECTORS.glob("unary-*.req.http")):
        parsed.clear()
        reader, data = Reader(read, LIMITS), path.read_bytes()
        if b"chunked" in data:
            continue
        for number in range(20):
            ours = data.replace(b"Micro-Id: 0", b"Micro-Id: %d" % number)
            message = reader.read(ours)
            assert message is not None
            assert message[1][1] == b"%d" % number or b"Micro-Id: 0" not in data
        assert len(parsed) == 2


@given(requests(), st.lists(st.integers(0, 400), max_size=12))
def test_message_in_pieces_is_the_same_message(data: bytes, cuts: list[int]) -> None:
    data *= 2
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges)]
    assert list(read_all(fresh(), *pieces)) == list(read_all(fresh(), data))


class Httptools:
    """What httptools says of one message."""

    def __init__(self, data: bytes) -> None:
        self.url = self.body = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.whole = False
        self._in_head = True
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            self.headers.append((name.lower(), value.strip(b" \t")))  # which it leaves there

    def on_headers_complete(self) -> None:
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.whole = True


@given(requests().flatmap(lambda data: st.one_of(st.just(data), changed(data))))
@example(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nX: Content-Length: 5\r\n\r\nabc")
@example(
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;,a=b\r\n\0\r\n0\r\n\r\n"
)
def test_what_is_read_is_what_httptools_reads(data: bytes) -> None:
    reader = fresh()
    try:
        message = reader.read(data)
    except Refused:
        return  # it may be stricter
    if message is None or reader.rest:
        return
    meaning, numbers, body = message
    method, path, version, keep_alive, headers = meaning.rest
    seen = Httptools(data)
    assert seen.whole
    assert (seen.parser.get_method(), seen.url) == (method.encode(), path.encode())
    assert (seen.parser.get_http_version(), seen.body) == (version, body)
    assert seen.parser.should_keep_alive() == keep_alive
    told = {name.decode(): value.decode() for name, value in seen.headers if len(name) > 0}
    assert {name for name in told if name not in NUMBERS} == set(headers)
    assert told.get("micro-id", "").encode() == numbers[1]
    assert told.get("timeout", "").encode() == numbers[2]


@given(st.one_of(st.binary(max_size=200), requests().flatmap(changed)))
def test_whatever_comes_is_a_message_or_refused(data: bytes) -> None:
    list(read_all(fresh(), data))


answers = st.sampled_from(
    [path.read_bytes() for path in sorted(VECTORS.glob("*.rsp.http"))]
    + [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"]
)


@given(st.one_of(st.binary(max_size=200), answers.flatmap(changed)))
def test_whatever_a_server_says_is_an_answer_or_refused(data: bytes) -> None:
    reader: Reader[Answer] = Reader(read_answer, LIMITS, begins=b"HTTP/1.")
    try:
        message: Any = reader.read(data) or reader.end()
    except Refused:
        return
    if message is not None:
        message[0].error(message[2])


@pytest.mark.parametrize("length", [0, 1, 9_999, 10_000])
def test_body_up_to_the_limit_is_taken_and_no_longer_one(length: int) -> None:
    for framing, body in (
        (b"Content-Length: %d", b"x"),
        (b"Transfer-Encoding: chunked", b""),
    ):
        for more, taken in ((0, True), (10_001 - length, False)):
            size = length + more
            head = b"POST / HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % (
                framing % size if body else framing
            )
            whole = b"x" * size if body else chunked(b"x" * size, 700, b"")
            (outcome,) = read_all(fresh(), head + whole)
            assert (len(outcome) == 3) is taken
