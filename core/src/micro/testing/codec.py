"""What every codec promises, as tests."""

from __future__ import annotations

import math
import pickle
import struct
import time
import tracemalloc
from abc import ABC
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from micro.codec import MAX_DEPTH, MAX_ITEMS, Codec, codec_for
from micro.errors import DecodeError, InvalidArgument, UnsupportedContentType
from micro.testing.lifecycle import SLACK

_INT64 = (-(2**63), 2**63 - 1)
_LARGE = 4 * 1024 * 1024
_ZONE = timezone(timedelta(hours=5, minutes=30))


class Message(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What the suite sends, unless a codec has messages of its own with these fields."""

    number: int
    text: str = ""
    score: float = 0.0
    data: bytes = b""
    moment: datetime | None = None
    numbers: list[int] = []
    child: Message | None = None
    children: list[Message] = []


class Number(msgspec.Struct):
    """The first field of a message alone: it does not know the others."""

    number: int


class Wrong(msgspec.Struct, omit_defaults=True):
    """As a message, with another type of the first field."""

    number: str
    child: Wrong | None = None
    children: list[Wrong] = []


class Unnumbered(msgspec.Struct):
    """A message without its first field."""

    text: str


class CodecSuite(ABC):
    """The contract of ``Codec``: subclass it and name the ``codec``.

    A codec that does not take dataclasses and the like says so (``own``), and names classes of its
    own messages with the fields of ``Message``, ``Number``, ``Wrong`` and ``Unnumbered``; one whose
    messages have no fields has none. Each attribute that tells what a form can do is tested both
    ways: what it cannot hold has to be refused.
    """

    codec: Codec
    message: Any = Message
    number: Any = Number
    wrong: Any = Wrong
    unnumbered: Any = Unnumbered
    #: Its messages are of classes of its own, and it takes no others.
    own: ClassVar[bool] = False
    #: It holds times, and of those with a zone also the zone.
    times: ClassVar[bool] = True
    zones: ClassVar[bool] = False
    #: It holds NaN and infinity.
    nan: ClassVar[bool] = False
    #: It says of each field whether it must be there, and which type it has.
    checked: ClassVar[bool] = True
    #: What is twice, and what is in unknown fields, is read and has to be right.
    strict: ClassVar[bool] = True
    #: Bodies, each one message and bad: the field ``number`` twice; numbers that are none; lengths
    #: over what is there.
    twice: tuple[bytes, ...] = ()
    bad_numbers: tuple[bytes, ...] = ()
    claims: tuple[bytes, ...] = ()

    # -- helpers

    def make(self, **fields: Any) -> Any:
        """A message with these fields."""
        if self.message is None:
            pytest.skip("its messages have no fields")
        return self.message(**{"number": 1, **fields})

    def example(self) -> Any:
        """A message with something of everything."""
        if self.message is None:
            return b"\x00\xffbytes"
        times = {"moment": datetime(2024, 2, 29, 12, tzinfo=UTC)} if self.times else {}
        return self.make(
            number=-(2**40),
            text='Ali\u00e7e \U0001f600 "\\:{[',
            score=-1.5e-7,
            data=b"\x00\xff",
            numbers=[0, 300, 2**62],
            child=self.make(text="child"),
            children=[self.make(), self.make(number=2)],
            **times,
        )

    def messages(self) -> st.SearchStrategy[Any]:
        """All messages of the class."""
        if self.message is None:
            return st.binary()
        fields: dict[str, st.SearchStrategy[Any]] = {
            "number": st.integers(*_INT64),
            "text": st.text(),
            "score": st.floats(allow_nan=False, allow_infinity=self.nan),
            "data": st.binary(),
            "numbers": st.lists(st.integers(*_INT64)),
        }
        if self.times:
            moments = st.datetimes(timezones=st.sampled_from([UTC, _ZONE]))
            fields["moment"] = st.none() | moments.filter(lambda moment: 2 < moment.year < 9998)
        return st.recursive(
            st.builds(self.make, **fields),
            lambda inner: st.builds(self.make, child=inner, children=st.lists(inner, max_size=3)),
            max_leaves=5,
        )

    def shape(self) -> Any:
        """The class of the messages."""
        return bytes if self.message is None else self.message

    def decode(self, body: bytes, shape: Any = None) -> Any:
        """The message that these bytes are."""
        return self.codec.decoder(shape or self.shape())(body)

    def refused(self, body: bytes, shape: Any = None) -> str:
        """The text with which a body is refused."""
        with pytest.raises(DecodeError) as caught:
            self.decode(body, shape)
        return str(caught.value)

    def exact_or_refused(self, **fields: Any) -> Any:
        """What arrives of a message; None when it is refused, by whichever side."""
        self.make()
        try:
            return self.decode(self.codec.encode(self.make(**fields)))
        except (InvalidArgument, ValueError):  # the class of a message may refuse it itself
            return None

    def quietly(self, test: Callable[[Any], None], values: st.SearchStrategy[Any]) -> None:
        """Run a test for many values."""
        nested = [HealthCheck.nested_given, HealthCheck.too_slow]
        settings(deadline=None, suppress_health_check=nested)(given(values)(test))()

    # -- what is taken

    def test_roundtrip(self) -> None:
        def check(message: Any) -> None:
            assert self.decode(self.codec.encode(message)) == message

        self.quietly(check, self.messages())

    def test_stable_encoding(self) -> None:
        assert self.codec.encode(self.example()) == self.codec.encode(self.example())

    def test_value_that_it_cannot_hold_is_an_invalid_argument(self) -> None:
        holds_itself: list[object] = []
        holds_itself.append(holds_itself)
        for value in (object(), 1j, print, {1, object()}, {"a": iter(())}, "\udcff", holds_itself):
            with pytest.raises(InvalidArgument):
                self.codec.encode(value)

    def test_value_of_any_type_is_encoded_or_an_invalid_argument(self) -> None:
        values = (None, True, 5, 2**70, 0.5, "a", b"a", [1], {"a": 1}, {1: 2}, {(1,): 2}, Number(1))
        for value in (*values, timedelta(1), datetime(1, 1, 1, tzinfo=UTC), {1}, frozenset("a")):
            try:
                assert isinstance(self.codec.encode(value), bytes)
            except InvalidArgument:
                continue

    def test_what_is_not_its_own_is_refused(self) -> None:
        others = [shape for shape in (Number, str) if self.own]
        for shape in others:
            with pytest.raises(UnsupportedContentType):
                self.codec.decoder(shape)
        for value in (Number(1), "text", 5) if self.own else ():
            with pytest.raises(InvalidArgument):
                self.codec.encode(value)
        if not self.own:
            assert self.decode(self.codec.encode(Number(1)), Number) == Number(1)
            assert self.decode(self.codec.encode("text"), str) == "text"

    def test_empty_body_is_the_message_with_all_defaults(self) -> None:
        if self.message is None or not self.checked:
            assert self.decode(b"") == self.shape()()
        else:
            assert "number" in self.refused(b"")

    @pytest.mark.parametrize("number", [*_INT64, 2**53 + 1, -1, 0])
    def test_int64_edges(self, number: int) -> None:
        got = self.exact_or_refused(number=number, numbers=[number])
        assert (got.number, list(got.numbers)) == (number, [number])

    @pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400])
    def test_integer_over_64_bits_is_refused(self, number: int) -> None:
        assert self.exact_or_refused(number=number) is None
        assert self.exact_or_refused(numbers=[number]) is None

    @pytest.mark.parametrize("number", [-0.0, 5e-324, 1.7976931348623157e308, 0.1, 1 / 3])
    def test_float_specials(self, number: float) -> None:
        got = self.exact_or_refused(score=number)
        assert struct.pack(">d", got.score) == struct.pack(">d", number)

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_nan(self, number: float) -> None:
        got = self.exact_or_refused(score=number)
        if self.nan:
            assert struct.pack(">d", got.score) == struct.pack(">d", number)
        else:
            assert got is None
        for body in self.bad_numbers:
            self.refused(body)

    def test_bytes_exact(self) -> None:
        every = bytes(range(256))
        if self.message is None:
            assert self.decode(self.codec.encode(every)) == every
        else:
            assert self.exact_or_refused(data=every).data == every

    @pytest.mark.parametrize("zone", [UTC, _ZONE, timezone(-timedelta(hours=11))], ids=str)
    def test_datetime_tz(self, zone: timezone) -> None:
        moment = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=zone)
        got = self.exact_or_refused(moment=moment)
        if not self.times:
            assert got is None
            return
        assert got.moment == moment
        assert got.moment.utcoffset() == (moment.utcoffset() if self.zones else timedelta(0))

    # -- fields

    def test_unknown_field_is_ignored(self) -> None:
        body = self.codec.encode(self.make(number=7, text="unknown", child=self.make()))
        assert self.decode(body, self.number).number == 7

    def test_missing_field_is_named_or_has_its_default(self) -> None:
        self.make()
        body = self.codec.encode(self.unnumbered(text="a"))
        if self.checked:
            assert "number" in self.refused(body)
        else:
            assert self.decode(body).number == 0

    def test_wrong_field_is_named_with_its_path(self) -> None:
        self.make()
        good, bad = self.wrong(number="1"), self.wrong(number="x")
        for message, path in (
            (bad, "$.number"),
            (self.wrong(number="1", child=bad), "number"),
            (self.wrong(number="1", children=[good, bad]), "number"),
        ):
            body = self.codec.encode(message)
            if self.checked:
                assert path in self.refused(body)
            else:
                assert self.decode(body).number == 0  # to it, that is an unknown field

    def test_path_leads_through_fields_and_lists(self) -> None:
        if self.message is None or not self.checked:
            pytest.skip("it does not check types")
        rows = [{"number": 1}, {"number": 1, "child": {"number": "x"}}]
        body = self.codec.encode({"number": 1, "children": rows})
        assert "$.children[1].child.number" in self.refused(body)

    # -- damage

    def test_truncated_at_every_byte(self) -> None:
        body, decode = self.codec.encode(self.example()), self.codec.decoder(self.shape())
        for end in range(len(body)):
            self._gives_a_message_or_a_decode_error(decode, body[:end])

    def test_every_bit_flipped(self) -> None:
        body, decode = self.codec.encode(self.example()), self.codec.decoder(self.shape())
        for bit in range(len(body) * 8):
            damaged = bytearray(body)
            damaged[bit // 8] ^= 1 << bit % 8
            self._gives_a_message_or_a_decode_error(decode, bytes(damaged))
        assert decode(body) == self.example()

    def test_any_bytes_give_a_message_or_a_decode_error(self) -> None:
        decode = self.codec.decoder(self.shape())
        self.quietly(
            lambda body: self._gives_a_message_or_a_decode_error(decode, body), st.binary()
        )

    def _gives_a_message_or_a_decode_error(
        self, decode: Callable[[bytes], Any], body: bytes
    ) -> None:
        try:
            message = decode(body)
        except DecodeError:
            return
        assert isinstance(message, self.shape())

    @pytest.mark.parametrize("more", [b"\x00", b"\xff", b"x" * 9])
    def test_trailing(self, more: bytes) -> None:
        self.refused(self.codec.encode(self.make()) + more)

    @pytest.mark.parametrize(
        "bad", [b"\xff\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"]
    )
    def test_bad_utf8(self, bad: bytes) -> None:
        body = self.codec.encode(self.make(text="A" * len(bad)))
        damaged = body.replace(b"A" * len(bad), bad)
        assert damaged != body
        self.refused(damaged)
        if self.strict:
            self.refused(damaged, self.number)
        else:
            assert self.decode(damaged, self.number).number == 1

    def test_dup_keys(self) -> None:
        self.make()
        for body in self.twice:
            if self.strict:
                assert "twice" in self.refused(body)
                assert "twice" in self.refused(body, self.unnumbered)
            else:
                assert self.decode(body).number == 2  # as the form has it, the last counts

    # -- size

    def test_depth_65(self) -> None:
        message = self.make()
        for _ in range(MAX_DEPTH - 2):  # one level is left for lists that are written though empty
            message = self.make(child=message)
        assert self.decode(self.codec.encode(message)) == message
        self.refused(self.codec.encode(self.make(child=self.make(child=message))))

    def test_too_many_items(self) -> None:
        body = self.codec.encode(self.make(numbers=[1] * (MAX_ITEMS - 10)))
        assert len(self.decode(body).numbers) == MAX_ITEMS - 10
        assert f"{MAX_ITEMS:,} values" in self.refused(
            self.codec.encode(self.make(numbers=[1] * (MAX_ITEMS + 1)))
        )

    def test_size_is_settled_before_memory_grows(self) -> None:
        """At most 32 times the message, and within 2 seconds."""
        count = min(2 * MAX_ITEMS, _LARGE // len(self.codec.encode(self.make())))
        large = self.codec.encode(self.make(children=[self.make()] * count))
        for body in (large, *self.claims):
            tracemalloc.start()
            start = time.thread_time()  # what others do on a busy machine does not count
            try:
                self.refused(body)
            finally:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            assert time.thread_time() - start < 2.0 + SLACK
            assert peak < 32 * len(body) + 100_000

    # -- what it is not

    def test_no_object_construction(self) -> None:
        pickled = pickle.dumps(Number(1))
        if self.message is None:
            assert self.decode(pickled) == pickled
            return
        self.refused(pickled)
        for tag in ("!!python/object/apply:os.system", '{"py/object":"os.system"}', "cos\nsystem"):
            assert self.exact_or_refused(text=tag).text == tag

    def test_content_type_mismatch(self) -> None:
        name = self.codec.content_type
        for same in (name, name.upper(), f"{name}; charset=utf-8", f" {name} ;v=1;w=2"):
            assert codec_for(same).content_type == name
        for other in (f"{name}x", f"x{name}", name.replace("/", "-"), "text/plain", ""):
            with pytest.raises(UnsupportedContentType, match=name):
                codec_for(other)
