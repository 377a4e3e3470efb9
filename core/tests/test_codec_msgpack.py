"""MessagePack: what it takes, what it refuses, and what it costs."""

from __future__ import annotations

import pickle
import struct
import time
import tracemalloc
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from micro.codec import MAX_DEPTH, MAX_ITEMS, codec_for
from micro.errors import DecodeError, InvalidArgument

CODEC = codec_for("application/msgpack")
decode_any = CODEC.decoder(Any)
pack = msgspec.msgpack.encode


@dataclass
class User:
    id: int
    name: str
    score: float = 0.0
    photo: bytes = b""
    tags: list[str] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    born: datetime | None = None


class Empty(msgspec.Struct):
    """Every name of a message is unknown to it."""


decode_user = CODEC.decoder(User)
decode_empty = CODEC.decoder(Empty)


def refused(body: bytes, shape: Any = Any) -> str:
    """The text with which a body is refused."""
    with pytest.raises(DecodeError) as caught:
        CODEC.decoder(shape)(body)
    return str(caught.value)


def inside(value: bytes) -> bytes:
    """A message with this value of a field that Empty does not know."""
    return b"\x81\xa1z" + value


_int64 = st.integers(-(2**63), 2**63 - 1)
_users = st.builds(
    User,
    id=_int64,
    name=st.text(),
    score=st.floats(allow_nan=False),
    photo=st.binary(),
    tags=st.lists(st.text()),
    limits=st.dictionaries(st.text(), _int64),
    born=st.none() | st.datetimes(timezones=st.just(UTC)),
)
_values = st.recursive(
    st.none()
    | st.booleans()
    | _int64
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(UTC)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | _int64, inner),
)


# -- what is taken -----------------------------------------------------------------------------


@given(_users)
def test_message_is_decoded_as_it_was_encoded(user: User) -> None:
    assert decode_user(CODEC.encode(user)) == user


@given(_values)
@example([0] * 70)
@example([[0] * 20] * 70)
@example({"a": [{"b": 1}] * 20})
def test_value_is_decoded_as_it_was_encoded(value: object) -> None:
    if value is not None:
        assert decode_any(CODEC.encode(value)) == value


@given(_users)
def test_same_message_is_the_same_bytes(user: User) -> None:
    assert CODEC.encode(user) == CODEC.encode(user)


@pytest.mark.parametrize("value", [[1, "a", None], "text", 5, True, 1.5, []])
def test_list_and_scalar_are_messages(value: Any) -> None:
    assert CODEC.decoder(type(value))(CODEC.encode(value)) == value


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"\xd3" + bytes(7) + b"\x05", 5),
        (b"\xcf" + bytes(7) + b"\x05", 5),
        (b"\xcf\x7f" + b"\xff" * 7, 2**63 - 1),
        (b"\xca\x3f\xc0\x00\x00", 1.5),
        (b"\xdb\x00\x00\x00\x01a", "a"),
        (b"\xda\x00\x01a", "a"),
        (b"\xc6\x00\x00\x00\x01a", b"a"),
        (b"\xdd\x00\x00\x00\x01\xdc\x00\x00", [[]]),
        (b"\xdf\x00\x00\x00\x01\xd9\x01a\xde\x00\x00", {"a": {}}),
        (b"\x81\x91\x01\x02", {(1,): 2}),
    ],
)
def test_value_in_a_longer_form_than_needed_is_taken(body: bytes, value: object) -> None:
    assert decode_any(body) == value


@pytest.mark.parametrize("body", [b"", b"\x80"])
def test_empty_body_is_the_message_with_all_defaults(body: bytes) -> None:
    assert decode_empty(body) == Empty()
    assert "`id`" in refused(body, User)


def test_nothing_is_encoded_as_an_empty_map() -> None:
    assert CODEC.encode(None) == b"\x80"


def test_unknown_field_is_ignored() -> None:
    assert decode_empty(inside(pack({"a": [1, None, b""]}))) == Empty()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.0, 5e-324])
def test_float_is_exact(number: float) -> None:
    assert struct.pack(">d", decode_any(CODEC.encode(number))) == struct.pack(">d", number)


# -- timestamps --------------------------------------------------------------------------------


def test_time_is_exact_and_becomes_utc() -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    moment = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=zone)
    got = CODEC.decoder(datetime)(CODEC.encode(moment))
    assert (got, got.utcoffset()) == (moment, timedelta(0))


@pytest.mark.parametrize(
    "body",
    [
        b"\xd7\xff" + struct.pack(">Q", 1001 << 34 | 5),
        b"\xc7\x0c\xff" + struct.pack(">Iq", 1001, 5),
    ],
)
def test_time_finer_than_a_microsecond_is_refused(body: bytes) -> None:
    for shape, whole in ((Any, body), (datetime, body), (Empty, inside(body))):
        assert "finer than a microsecond" in refused(whole, shape)


@pytest.mark.parametrize(
    "body",
    [
        b"\xd7\xff\xff\xff\xff\xff\x00\x00\x00\x01",
        b"\xc7\x0c\xff" + struct.pack(">Iq", 0, 2**62),
        b"\xc7\x03\xff\x00\x00\x00",
        b"\xd4\xff\x00",
    ],
)
def test_time_that_is_none_is_refused(body: bytes) -> None:
    refused(body)
    refused(inside(body), Empty)


@pytest.mark.parametrize(
    "body",
    [b"\xd4\x05\x00", b"\xd8\x80" + bytes(16), b"\xc7\x00\x01", b"\xc9\x00\x00\x00\x01\x02a"],
)
def test_extension_is_refused(body: bytes) -> None:
    for shape, whole in ((Any, body), (msgspec.msgpack.Ext, body), (Empty, inside(body))):
        assert "extension of type" in refused(whole, shape)


# -- errors ------------------------------------------------------------------------------------


def test_error_names_the_path_and_the_expected_type() -> None:
    body = pack({"id": 1, "name": "", "tags": ["a", 5]})
    assert refused(body, User) == "Expected `str`, got `int` - at `$.tags[1]`"


@pytest.mark.parametrize("value", [object(), {"a": print}, 1j, 2**64, "\udcff"])
def test_value_that_it_cannot_hold_is_an_invalid_argument(value: object) -> None:
    with pytest.raises(InvalidArgument, match="not a MessagePack message"):
        CODEC.encode(value)


def test_value_that_holds_itself_is_an_invalid_argument() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(InvalidArgument):
        CODEC.encode(value)


_BAD: list[tuple[str, bytes]] = [
    ("22-lists", b"\x91" * 100_000),
    ("22-maps", b"\x81\xa1a" * 100_000),
    ("22-names", b"\x81" * 100_000),
    ("12-keys", b"\xdf\x00\x0f\x42\x40" + b"".join(map(pack, map(str, range(1_000_000))))),
    ("13-twice", b"\x82\xa1a\x01\xa1a\x02"),
    ("13-equal", b"\x82\xa1a\x01\xa1a\x01"),
    ("13-forms", b"\x82\xa1a\x01\xd9\x01a\x02"),
    ("13-numbers", b"\x82\x01\x01\xcc\x01\x02"),
    ("13-nested", b"\x91\x81\xa1b\x82\xa1a\x01\xa1a\x02"),
    ("13-in-dropped", b"\x82\xa1a\x82\xa1b\x01\xa1b\x02\xa1c\xc0"),
    ("17-uint64", b"\xcf" + b"\xff" * 8),
    ("17-int64+1", b"\xcf\x80" + bytes(7)),
    ("19-bare", b"\xa1\xff"),
    ("19-surrogate", b"\xa3\xed\xa0\x80"),
    ("19-overlong", b"\xa2\xc0\xaf"),
    ("19-name", b"\x81\xa1\xff\x01"),
    ("19-walked", b"\x92\xdc\x00\x00\xa1\xff"),
    ("23-list32", b"\xdd\xff\xff\xff\xff"),
    ("23-list16", b"\xdc\xff\xff"),
    ("23-map32", b"\xdf\xff\xff\xff\xff"),
    ("23-bin32", b"\xc6\xff\xff\xff\xff"),
    ("23-str32", b"\xdb\xff\xff\xff\xff"),
    ("23-ext32", b"\xc9\xff\xff\xff\xff\x05"),
    ("23-nested", b"\xdc\xff\xff" * 60),
    ("none", b"\xc1"),
    ("name-is-a-map", b"\x81\x80\x01"),
]


@pytest.mark.parametrize("bad", [row[1] for row in _BAD], ids=[f"row{row[0]}" for row in _BAD])
def test_bad_value_is_refused(bad: bytes) -> None:
    refused(bad)
    refused(inside(bad), Empty)


@pytest.mark.parametrize("message", [b"\x80", pack({"x": 1}), b"\xdc\x00\x00", b"\x01"])
@pytest.mark.parametrize("more", [b"\x00", b"\xc1", b"\x80"])
def test_bytes_after_the_message_are_refused(message: bytes, more: bytes) -> None:
    refused(message + more)


@pytest.mark.parametrize("body", [row[1] for row in _BAD], ids=[f"row{row[0]}" for row in _BAD])
def test_bad_message_is_refused_soon_and_before_memory_grows(body: bytes) -> None:
    tracemalloc.start()
    start = time.thread_time()  # what others do on a busy machine does not count
    try:
        refused(body)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.thread_time() - start < 2
    assert peak < 32 * len(body) + 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"\xdc\xff\xff" * 1_300_000,
        b"\x9f" * 4_000_000,
        b"\xdd\x00\x01\x86\xa0" + b"\x80" * 4_000_000,
        (b"\x81" + b"\x91" * 60 + b"\x01") * 60_000,
        b"\x00" * 4_000_000,
        b"\xdb\x00\x3d\x09\x00" + b"\xff" * 4_000_000,
    ],
    ids=lambda body: repr(body[:6]),
)
def test_hostile_message_is_refused_within_2_seconds(body: bytes) -> None:
    start = time.thread_time()
    refused(body, Empty)
    assert time.thread_time() - start < 2


# -- depth and number --------------------------------------------------------------------------


def lists(depth: int) -> bytes:
    return b"\x91" * (depth - 1) + b"\x90"


def maps(depth: int) -> bytes:
    return b"\x81\xa1a" * (depth - 1) + b"\x80"


def long_forms(depth: int) -> bytes:
    return b"\xdc\x00\x01" * (depth - 1) + b"\xdd" + bytes(4)


every_nesting = pytest.mark.parametrize("nested", [lists, maps, long_forms])


@every_nesting
def test_64_levels_are_taken(nested: Any) -> None:
    assert decode_any(nested(MAX_DEPTH))
    assert decode_empty(inside(nested(MAX_DEPTH - 1))) == Empty()


@every_nesting
def test_65_levels_are_refused(nested: Any) -> None:
    assert "more than 64 levels" in refused(nested(MAX_DEPTH + 1))
    assert "more than 64 levels" in refused(inside(nested(MAX_DEPTH)), Empty)


def test_100_000_values_are_taken_and_one_more_is_refused() -> None:
    assert len(decode_any(pack([0] * MAX_ITEMS))) == MAX_ITEMS
    assert "more than 100,000 values" in refused(pack([0] * (MAX_ITEMS + 1)))
    halves = [[0] * (MAX_ITEMS // 2), [0] * (MAX_ITEMS // 2)]
    assert "more than 100,000 values" in refused(pack(halves))


def test_long_text_is_one_value() -> None:
    assert decode_any(pack("a" * 4_000_000)) == "a" * 4_000_000


# -- damage ------------------------------------------------------------------------------------

MESSAGE = CODEC.encode(
    User(
        id=-(2**40),
        name="Ali\u00e7e \U0001f600",
        score=-1.5e-7,
        photo=b"\x00\xff",
        tags=["a", "", "\u20ac"] * 6,
        limits={"a": 2**63 - 1, "b": 0},
        born=datetime(2000, 1, 1, 0, 0, 0, 5, tzinfo=UTC),
    )
)
every_shape = pytest.mark.parametrize(
    "decode", [decode_user, decode_any, decode_empty], ids=["user", "any", "empty"]
)


@every_shape
def test_message_cut_at_any_byte_is_refused(decode: Any) -> None:
    for end in range(1, len(MESSAGE)):
        with pytest.raises(DecodeError):
            decode(MESSAGE[:end])


@every_shape
def test_any_bit_of_a_message_flipped_gives_a_value_or_a_decode_error(decode: Any) -> None:
    for bit in range(len(MESSAGE) * 8):
        damaged = bytearray(MESSAGE)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decode(bytes(damaged))
        except DecodeError:
            continue


@given(st.binary() | _values.map(pack), st.data())
@settings(max_examples=300)
def test_any_bytes_give_what_they_are_encoded_as_or_a_decode_error(
    body: bytes, data: st.DataObject
) -> None:
    if body:
        place = data.draw(st.integers(0, len(body) - 1))
        body = body[:place] + data.draw(st.binary(max_size=4)) + body[place:]
    for decode in (decode_user, decode_empty, decode_any):
        try:
            value = decode(body)
        except DecodeError:
            continue
        if decode is decode_any:
            assert pack(decode_any(pack(value))) == pack(value)


@given(
    pairs=st.lists(st.tuples(st.text("ab", max_size=2), _values), max_size=6), longer=st.booleans()
)
def test_message_is_refused_exactly_when_a_name_is_twice(
    pairs: list[tuple[str, Any]], *, longer: bool
) -> None:
    head = b"\xde\x00" + bytes([len(pairs)]) if longer else bytes([0x80 + len(pairs)])
    body = head + b"".join(pack(name) + pack(value) for name, value in pairs)
    if len(dict(pairs)) < len(pairs):
        assert "twice in one object" in refused(body)
    else:
        assert decode_any(body) == dict(pairs)


# -- no objects are made -----------------------------------------------------------------------


def test_tags_of_other_formats_are_plain_values() -> None:
    value = {"__class__": "os.system", "py/object": "os.system", "__reduce__": ["os.system"]}
    assert decode_any(pack(value)) == value


def test_pickle_is_no_message() -> None:
    refused(pickle.dumps({"x": 1}))
