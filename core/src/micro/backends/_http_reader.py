"""Cuts what comes in on an HTTP connection into messages; the same on both sides."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Generic, Protocol, TypeAlias, TypeVar

from micro.backends._http_head import (
    CHUNKED,
    UNTIL_CLOSE,
    bad_request,
    too_large,
    too_many_headers,
)
from micro.transport import Limits

#: What differs between two calls that are otherwise the same: the length of the body, Micro-Id and
#: Timeout; empty where there is none.
Numbers: TypeAlias = tuple[int, bytes, bytes]

#: A head whose numbers stand in the order in which Go Micro has them, in pieces: what stands
#: before Content-Length, before Micro-Id, before Timeout, and after that.
_PIECES = re.compile(
    rb"(.*\r\nContent-Length: )[0-9]+"
    rb"(\r\n(?:.*\r\n)?Micro-Id: )[0-9]+"
    rb"(?:(\r\n(?:.*\r\n)?Timeout: )[0-9]+)?"
    rb"(\r\n(?:.*\r\n)?\r\n)",
    re.DOTALL,
)
#: Content-Length has fewer digits; whoever has more means no good.
_DIGITS = 12
#: How many heads a connection remembers, of which length at most, and one of how many it parses.
_KNOWN = 8
_KNOWN_SIZE = 2048
_OFTEN = 4
#: Most bytes of the line before a chunk, and most chunks of a body: each of them costs time.
_CHUNK_LINE = 256
_CHUNKS = 16 * 1024
_TOKEN = rb"[0-9A-Za-z!#$%&'*+.^_`|~-]+"
_QUOTED = rb'"(?:[\t !#-\[\]-~]|\\[\t -~])*"'
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;%b(?:=(?:%b|%b))?)*" % (_TOKEN, _TOKEN, _QUOTED))
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")


class _Meaning(Protocol):
    """What a head is turned into: a request or an answer."""

    @property
    def length(self) -> int: ...

    @property
    def numbers(self) -> Numbers: ...


T = TypeVar("T", bound=_Meaning)


class Reader(Generic[T]):
    """Cuts the bytes of one connection into messages: what a head means, its numbers, a body.

    Peers repeat themselves. A head that is byte for byte a former one, but for the digits of
    Content-Length, Micro-Id and Timeout, is not parsed again: such digits change nothing about how
    the rest is read.
    """

    __slots__ = (
        "_begins",
        "_body",
        "_known",
        "_limits",
        "_numbers",
        "_parse",
        "_parsed",
        "meaning",
        "rest",
    )

    def __init__(
        self, parse: Callable[[bytes, Limits], T], limits: Limits, *, begins: bytes = b""
    ) -> None:
        #: What has come and is no whole head.
        self.rest = b""
        #: What the head of the message means whose body is still coming.
        self.meaning: T | None = None
        self._begins = begins
        self._parse = parse
        self._limits = limits
        self._known: list[_Known[T]] = []
        self._parsed = 0
        self._numbers: Numbers = (0, b"", b"")
        self._body: _Body | None = None

    def read(self, data: bytes) -> tuple[T, Numbers, bytes] | None:
        """The next message, of what came before and ``data``; None: it is not all here.

        Raises:
            Refused: it is none that is taken; there is no way to read on.
        """
        if self._body is not None:
            return self._more(self._body, data)
        if self.rest:
            data = self.rest + data
        for known in self._known:
            if data.startswith(known.beginning):
                split = known.split(data)
                if split is not None:
                    numbers, body = split
                    meaning = known.meaning
                    break
        else:
            head, end, body = data.partition(b"\r\n\r\n")
            if not end:
                self._wait_for_head(data)
                return None
            meaning = self._learn(head + end)
            numbers = meaning.numbers
        if numbers[0] == len(body) <= self._limits.message:
            self.rest = b""
            return meaning, numbers, body
        self.meaning, self._numbers = meaning, numbers
        self._body = _body(numbers[0], self._limits)
        return self._more(self._body, body)

    def end(self) -> tuple[T, Numbers, bytes] | None:
        """The message that the end of the connection makes whole."""
        if not isinstance(self._body, _UntilClose) or self.meaning is None:
            return None
        return self.meaning, self._numbers, self._body.value()

    def _wait_for_head(self, data: bytes) -> None:
        if len(data) > self._limits.headers:
            raise too_many_headers(self._limits)
        if not data.startswith(self._begins[: len(data)]):
            raise bad_request(f"not HTTP: it begins with {data[:20]!r}")
        self.rest = data

    def _more(self, body: _Body, data: bytes) -> tuple[T, Numbers, bytes] | None:
        rest = body.feed(data)
        if rest is None:
            self.rest = b""
            return None
        meaning, self.meaning, self._body, self.rest = self.meaning, None, None, rest
        assert meaning is not None
        return meaning, self._numbers, body.value()

    def _learn(self, head: bytes) -> T:
        if len(head) > self._limits.headers:
            raise too_many_headers(self._limits)
        if not head.startswith(self._begins):
            raise bad_request(f"not HTTP: it begins with {head[:20]!r}")
        meaning = self._parse(head, self._limits)
        self._parsed += 1
        if self._parsed % _OFTEN == 2 and len(head) <= _KNOWN_SIZE:
            del self._known[_KNOWN - 1 :]
            self._known.insert(0, _Known(meaning, head))
        return meaning


class _Known(Generic[T]):
    """A head that was parsed, and how others are told that differ from it in numbers alone."""

    __slots__ = ("_after", "_numbers", "_to_number", "_to_timeout", "beginning", "meaning")

    def __init__(self, meaning: T, head: bytes) -> None:
        self.meaning = meaning
        #: What such a head begins with; where its numbers stand otherwise, all of it.
        self.beginning = head
        self._numbers = meaning.numbers
        self._to_number = self._to_timeout = self._after = b""
        pieces = _PIECES.fullmatch(head)
        if pieces is not None:
            self.beginning, self._to_number, self._to_timeout, self._after = pieces.groups(b"")
            if self.split(head) != (self._numbers, b""):  # one of them means something else here
                self.beginning, self._to_number = head, b""

    def split(self, data: bytes) -> tuple[Numbers, bytes] | None:
        """The numbers of a head that begins so, and what follows it; None: it is another one."""
        rest = data[len(self.beginning) :]
        if not self._to_number:
            return self._numbers, rest
        length, _, rest = rest.partition(self._to_number)
        timeout = b""
        if self._to_timeout:
            number, _, rest = rest.partition(self._to_timeout)
            timeout, end, rest = rest.partition(self._after)
            if not timeout.isdigit():
                return None
        else:
            number, end, rest = rest.partition(self._after)
        if end and length.isdigit() and number.isdigit() and len(length) < _DIGITS:
            return (int(length), number, timeout), rest
        return None


class _Body(Protocol):
    """A body that comes in several pieces."""

    def feed(self, data: bytes) -> bytes | None:
        """Take a piece; what came after the body, or None when that has not ended."""

    def value(self) -> bytes: ...


def _body(length: int, limits: Limits) -> _Body:
    """How a body is read, by the length that its head gives.

    Raises:
        Refused: it is over the limit.
    """
    if length > limits.message:
        raise too_large(limits)
    if length == CHUNKED:
        return _Chunks(limits)
    return _UntilClose(limits) if length == UNTIL_CLOSE else _Sized(length)


class _Sized:
    def __init__(self, length: int) -> None:
        self._left = length
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> bytes | None:
        if len(data) < self._left:
            self._left -= len(data)
            self._parts.append(data)
            return None
        self._parts.append(data[: self._left])
        return data[self._left :]

    def value(self) -> bytes:
        return b"".join(self._parts)


class _UntilClose:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._size = 0
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> bytes | None:
        self._size += len(data)
        if self._size > self._limits.message:
            raise too_large(self._limits)
        self._parts.append(data)
        return None

    def value(self) -> bytes:
        return b"".join(self._parts)


class _Chunks:
    """A body in chunks; what stands beside their sizes, and after the last, means nothing here.

    Source: RFC 9112, 7.1.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._parts: list[bytes] = []
        self._size = 0
        self._chunks = 0
        self._left = 0
        self._line_end_due = False
        self._ended = False
        self._trailers = 0
        self._held = b""

    def feed(self, data: bytes) -> bytes | None:
        data, at = self._held + data, 0
        self._held = b""
        while True:
            if self._left:
                part = data[at : at + self._left]
                self._parts.append(part)
                self._left -= len(part)
                at += len(part)
            end = data.find(b"\r\n", at, at + _CHUNK_LINE)
            if end < 0:
                self._held = data[at:]
                if len(self._held) >= _CHUNK_LINE:
                    raise bad_request("a line of the chunked body is too long")
                return None
            line, at = data[at:end], end + 2
            if self._ended and not line:
                return data[at:]
            self._read_line(line)

    def value(self) -> bytes:
        return b"".join(self._parts)

    def _read_line(self, line: bytes) -> None:
        if self._line_end_due:
            if line:
                raise bad_request("a chunk is longer than its size")
            self._line_end_due = False
        elif self._ended:
            self._trailers += 1
            if self._trailers > self._limits.fields or not _TRAILER.fullmatch(line):
                raise bad_request("what follows the chunked body are no header fields")
        else:
            self._begin_chunk(line)

    def _begin_chunk(self, line: bytes) -> None:
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise bad_request(f"{line[:40]!r} is no size of a chunk")
        self._left = int(match[1], 16)
        self._size += self._left
        self._chunks += 1
        if self._size > self._limits.message:
            raise too_large(self._limits)
        if self._chunks > _CHUNKS:
            raise bad_request(f"the body is in more than {_CHUNKS} chunks")
        self._line_end_due = self._left > 0
        self._ended = self._left == 0
