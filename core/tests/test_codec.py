"""Codecs: what they take, what they refuse, and what it costs."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypedDict

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import micro
from micro.codec import JSON, MAX_DEPTH, MAX_ITEMS, Raw, codec_for
from micro.errors import DecodeError, InvalidArgument, UnsupportedContentType

CODEC = JSON()
decode_any = CODEC.decoder(Any)


@dataclass
class Address:
    street: str
    zip: str | None = None


@dataclass
class User:
    id: int
    name: str
    score: float = 0.0
    admin: bool = False
    photo: bytes = b""
    tags: list[str] = field(default_factory=list)
    address: Address | None = None
    limits: dict[str, int] = field(default_factory=dict)
    born: datetime | None = None


class Empty(msgspec.Struct):
    """Every name of a message is unknown to it."""


class Point(msgspec.Struct):
    x: int
    y: int = 0


class Row(TypedDict):
    point: Point


decode_user = CODEC.decoder(User)
decode_empty = CODEC.decoder(Empty)


def refused(body: bytes, shape: Any = Any) -> str:
    """The text with which a body is refused."""
    with pytest.raises(DecodeError) as caught:
        CODEC.decoder(shape)(body)
    return str(caught.value)


# -- what is taken -----------------------------------------------------------------------------

_int64 = st.integers(-(2**63), 2**63 - 1)
_float = st.floats(allow_nan=False, allow_infinity=False)
_zones = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
    lambda delta: timezone(timedelta(minutes=delta // timedelta(minutes=1)))
)
_users = st.builds(
    User,
    id=_int64,
    name=st.text(),
    score=_float,
    admin=st.booleans(),
    photo=st.binary(),
    tags=st.lists(st.text()),
    address=st.none() | st.builds(Address, street=st.text(), zip=st.none() | st.text()),
    limits=st.dictionaries(st.text(), _int64),
    born=st.none() | st.datetimes(timezones=_zones).filter(lambda moment: 2 < moment.year < 9998),
)
_values = st.recursive(
    st.none() | st.booleans() | _int64 | _float | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(_users)
def test_message_is_decoded_as_it_was_encoded(user: User) -> None:
    assert decode_user(CODEC.encode(user)) == user


@given(_values)
def test_value_is_decoded_as_it_was_encoded(value: object) -> None:
    if value is not None:
        assert decode_any(CODEC.encode(value)) == value


@given(value=_values, ascii_only=st.booleans())
def test_json_of_the_standard_library_is_understood(value: object, *, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert decode_any(body) == value


@given(_users)
def test_same_message_is_the_same_bytes(user: User) -> None:
    assert CODEC.encode(user) == CODEC.encode(user) == JSON().encode(user)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63), 2**53 + 1, 0, -1])
@pytest.mark.parametrize("shape", [Point, Any])
def test_64_bit_integer_is_exact(number: int, shape: Any) -> None:
    got = CODEC.decoder(shape)(b'{"x":%d}' % number)
    assert (got if isinstance(got, dict) else msgspec.to_builtins(got))["x"] == number


@pytest.mark.parametrize("number", [1e308, 5e-324, -0.0, 0.1, 1 / 3])
def test_float_is_exact(number: float) -> None:
    got = CODEC.decoder(float)(CODEC.encode(number))
    assert got.hex() == number.hex()


def test_bytes_are_exact() -> None:
    every = bytes(range(256))
    assert CODEC.decoder(bytes)(CODEC.encode(every)) == every


def test_time_keeps_its_zone() -> None:
    moment = datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    got = CODEC.decoder(datetime)(CODEC.encode(moment))
    assert (got, got.utcoffset()) == (moment, moment.utcoffset())
    assert got.astimezone(UTC).hour == 6


def test_typed_dict_and_struct_are_messages() -> None:
    assert CODEC.decoder(Row)(b'{"point":{"x":1}}') == {"point": Point(1)}


@pytest.mark.parametrize("body", [b"", b"{}", b" {} ", b"\r\n\t{}\n"])
def test_empty_body_is_an_empty_object(body: bytes) -> None:
    assert decode_any(body) == {}


def test_empty_body_is_the_message_with_all_defaults() -> None:
    assert decode_empty(b"") == Empty()
    assert "`x`" in refused(b"", Point)


def test_nothing_is_encoded_as_an_empty_object() -> None:
    assert CODEC.encode(None) == b"{}"


@pytest.mark.parametrize(
    "extra", [b'"z":1', b'"z":{"a":[{}],"b":null}', b'"z":"\\u0061\\n\\"}"', b'"":""', b'"X":5']
)
def test_unknown_field_is_ignored(extra: bytes) -> None:
    assert CODEC.decoder(Point)(b'{"x":1,' + extra + b"}") == Point(1)


# -- errors ------------------------------------------------------------------------------------


def test_error_names_the_missing_field() -> None:
    assert refused(b'{"y":1}', Point) == "Object missing required field `x`"


@pytest.mark.parametrize(
    ("body", "shape", "text"),
    [
        (b'{"id":1,"name":5}', User, "Expected `str`, got `int` - at `$.name`"),
        (b'{"point":{"x":"1"}}', Row, "Expected `int`, got `str` - at `$.point.x`"),
        (b'[{"x":1},{"x":null}]', list[Point], "Expected `int`, got `null` - at `$[1].x`"),
        (b'{"point":{}}', Row, "Object missing required field `x` - at `$.point`"),
        (b'{"id":1,"name":"","admin":1}', User, "Expected `bool`, got `int` - at `$.admin`"),
        (b'{"x":1.5}', Point, "Expected `int`, got `float` - at `$.x`"),
        (b"[]", Point, "Expected `object`, got `array`"),
        (b"null", Point, "Expected `object`, got `null`"),
    ],
)
def test_error_names_the_path_and_the_expected_type(body: bytes, shape: Any, text: str) -> None:
    assert refused(body, shape) == text


def test_error_of_a_truncated_message_says_after_how_many_bytes() -> None:
    assert refused(b'{"x":') == "Input data was truncated (after 5 bytes)"


@pytest.mark.parametrize("value", [object(), {1, object()}, {"a": print}, {(1, 2): 3}, 1j])
def test_value_that_json_cannot_hold_is_an_invalid_argument(value: object) -> None:
    with pytest.raises(InvalidArgument, match="not a JSON message"):
        CODEC.encode(value)


def test_value_that_holds_itself_is_an_invalid_argument() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(InvalidArgument):
        CODEC.encode(value)


def test_text_with_a_lone_surrogate_is_not_encoded() -> None:
    with pytest.raises(InvalidArgument):
        CODEC.encode({"name": "\udcff"})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("value", "path"),
    [
        (lambda number: number, "$"),
        (lambda number: {"a": [None, {"b": number}], "c": 2**70}, "$.a[1].b"),
        (lambda number: User(1, "", score=number), "$.score"),
        (lambda number: [Point(1), (0.5, number)], "$[1][1]"),
    ],
)
def test_float_that_json_cannot_hold_is_an_invalid_argument(
    value: Callable[[float], Any], path: str, number: float
) -> None:
    with pytest.raises(InvalidArgument, match="NaN and infinity have no form") as caught:
        CODEC.encode(value(number))
    assert f"`{path}`" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        [None, "null"],
        {"null": None, "number": 1.5, "text": "nan"},
        User(1, "null", photo=b"\xcb\x7f\xf8\x00" * 3),
        {"long": 2**70, "a": None},
        {1: None},
    ],
)
def test_null_that_has_been_no_float_is_encoded(value: object) -> None:
    assert CODEC.encode(value) == msgspec.json.encode(value)


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, -(2**63) - 1])
def test_integer_over_64_bits_never_arrives(number: int) -> None:
    try:
        body = CODEC.encode({"x": number})
    except InvalidArgument:
        return
    refused(body)


# -- strict JSON, by the rows of the table of bad inputs ---------------------------------------

_DEEP = 100_000
_BAD_VALUES: list[tuple[str, bytes]] = [
    ("10-arrays", b"[" * _DEEP + b"]" * _DEEP),
    ("10-objects", b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    ("10-mixed", b'[{"a":' * _DEEP + b"1" + b"}]" * _DEEP),
    ("10-open", b"[" * _DEEP),
    ("12-keys", b"{" + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}"),
    ("12-items", b"[" + b"0," * 1_000_000 + b"0]"),
    ("12-objects", b"[" + b"{}," * 1_000_000 + b"{}]"),
    ("13-twice", b'{"a":1,"a":2}'),
    ("13-equal", b'{"a":1,"a":1}'),
    ("13-nested", b'{"b":[1,{"c":{"a":1,"x":0,"a":2}}]}'),
    ("13-escaped", b'{"a":1,"\\u0061":2}'),
    ("13-both-escaped", b'{"\\u0061":1,"\\u0061":2}'),
    ("13-empty", b'{"":1,"":2}'),
    ("13-escaped-quote", b'{"\\"":1,"\\u0022":2}'),
    ("13-slash", b'{"/":1,"\\/":2}'),
    ("13-surrogates", '{"\U0001f600":1,"\\ud83d\\ude00":2}'.encode()),
    ("13-blanks", b'{"a" : 1 , "a"\n:2}'),
    ("13-in-dropped", b'{"a":{"b":1,"b":2},"c":{"d":0}}'),
    ("14-nan", b"NaN"),
    ("14-infinity", b"Infinity"),
    ("14-minus-infinity", b"-Infinity"),
    ("14-nan-lower", b"nan"),
    ("15-float", b"1e999"),
    ("15-negative", b"-1E+999"),
    ("15-digits", b"1" + b"0" * 400 + b".0"),
    ("15-both", b"1" + b"0" * 250 + b"e99"),
    ("16-digits", b"9" * 5_000),
    ("16-negative", b"-" + b"9" * 5_000),
    ("16-thirty", b"9" * 30),
    ("17-int64+1", b"9223372036854775808"),
    ("17-int64-1", b"-9223372036854775809"),
    ("17-uint64", b"18446744073709551615"),
    ("17-uint64+1", b"18446744073709551616"),
    ("18-high", b'"\\ud800"'),
    ("18-low", b'"\\udc00"'),
    ("18-swapped", b'"\\udc00\\ud800"'),
    ("18-then-text", b'"\\ud800abcdef"'),
    ("18-name", b'{"\\ud800":1,"b":2}'),
    ("18-utf-8", b'"\xed\xa0\x80"'),
    ("19-bare", b'"\xff"'),
    ("19-cut", b'"\xe2\x82"'),
    ("19-overlong", b'"\xc0\xaf"'),
    ("19-over-10ffff", b'"\xf4\x90\x80\x80"'),
    ("19-name", b'{"\xff":1}'),
]
_BAD_BODIES: list[tuple[str, bytes]] = [
    ("19-outside", b'{"x":1}\xff'),
    ("20-bom", b'\xef\xbb\xbf{"x":1}'),
    *((f"20-{name}", '{"x":1}'.encode(name)) for name in ("utf-16", "utf-16-le", "utf-16-be")),
    *((f"20-{name}", '{"x":1}'.encode(name)) for name in ("utf-32", "utf-32-le", "utf-32-be")),
    ("20-latin-1", '{"x":"é"}'.encode("latin-1")),
    ("21-text", b'{"x":1}x'),
    ("21-second", b'{"x":1}{"x":1}'),
    ("21-comma", b'{"x":1},'),
    ("21-nul", b'{"x":1}\0'),
    ("21-brace", b'{"x":1}}'),
]


def _rows(rows: list[tuple[str, bytes]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "bad", [row[1] for row in rows], ids=[f"row{r[0]}" for r in rows]
    )


@_rows(_BAD_VALUES)
def test_bad_value_is_refused(bad: bytes) -> None:
    refused(bad)


@_rows(_BAD_VALUES)
def test_bad_value_of_a_field_is_refused(bad: bytes) -> None:
    refused(b'{"x":' + bad + b',"y":[true]}')


@_rows(_BAD_VALUES)
def test_bad_value_of_an_unknown_field_is_refused(bad: bytes) -> None:
    refused(b'{"z":' + bad + b"}", Empty)


@_rows(_BAD_BODIES)
@pytest.mark.parametrize("shape", [Any, Point, Empty])
def test_bad_body_is_refused(bad: bytes, shape: Any) -> None:
    refused(bad, shape)


@pytest.mark.parametrize(
    "body",
    [
        b"{'a':1}",
        b'{"a":1,}',
        b"[1,]",
        b"{a:1}",
        b"[01]",
        b"[+1]",
        b"[.5]",
        b"[1.]",
        b"[0x10]",
        b"[1_0]",
        b"[True]",
        b"// a\n{}",
        b'"\n"',
        b'"\\x41"',
        b"\x0c{}",
        b"   ",
        "[\u0661]".encode(),
        "\u00a0{}".encode(),
    ],
)
def test_what_only_some_parsers_take_is_refused(body: bytes) -> None:
    refused(body)


# -- depth -------------------------------------------------------------------------------------


def arrays(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def objects(depth: int) -> bytes:
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


def mixed(depth: int) -> bytes:
    opened = b'[{"a":' * (depth // 2) + (b"[]" if depth % 2 else b"1")
    return opened + b"}]" * (depth // 2)


every_nesting = pytest.mark.parametrize("nested", [arrays, objects, mixed])


@every_nesting
def test_64_levels_are_taken(nested: Any) -> None:
    assert decode_any(nested(MAX_DEPTH))


@every_nesting
def test_65_levels_are_refused(nested: Any) -> None:
    assert "more than 64 levels" in refused(nested(MAX_DEPTH + 1))


@every_nesting
def test_65_levels_of_an_unknown_field_are_refused(nested: Any) -> None:
    assert decode_empty(b'{"z":' + nested(MAX_DEPTH - 1) + b"}") == Empty()
    assert "more than 64 levels" in refused(b'{"z":' + nested(MAX_DEPTH) + b"}", Empty)


@every_nesting
def test_65_levels_among_many_values_are_refused(nested: Any) -> None:
    wide = b"[" + b"{}," * 20_000
    assert decode_any(wide + nested(MAX_DEPTH - 1) + b"]")
    assert "more than 64 levels" in refused(wide + nested(MAX_DEPTH) + b"]")


@pytest.mark.parametrize(
    "text",
    ["[" * 100, "]" * 100, "{" * 100, '\\"[{' * 100, "\\\\", "\\n" + " " * 80, '\\"' * 3, "]}[{"],
)
def test_brackets_inside_strings_are_no_levels(text: str) -> None:
    inner = f'["{text}",{{"{text}":"{text}"}}]'.encode()
    levels = MAX_DEPTH - 2
    assert decode_any(b"[" * levels + inner + b"]" * levels)
    refused(b"[" * (levels + 1) + inner + b"]" * (levels + 1))


def test_many_brackets_side_by_side_are_no_levels() -> None:
    assert len(decode_any(b"[" + b"[],{}," * 5_000 + b"[]]")) == 10_001


def deep(value: object) -> int:
    inner = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if inner is None else 1 + max(map(deep, inner), default=0)


@given(st.integers(55, 75), st.lists(st.booleans(), min_size=75, max_size=75), _values)
def test_message_is_refused_exactly_when_it_is_deeper_than_64(
    levels: int, kinds: list[bool], leaf: object
) -> None:
    value = leaf
    for is_array in kinds[:levels]:
        value = [1, value, {}] if is_array else {"[": [], "a": value}
    body = json.dumps(value, indent=1).encode()
    if deep(value) > MAX_DEPTH:
        refused(body)
    else:
        assert decode_any(body) == value


# -- the number of values ----------------------------------------------------------------------


def test_100_000_values_are_taken() -> None:
    assert len(decode_any(b"[" + b"0," * (MAX_ITEMS - 1) + b"0]")) == MAX_ITEMS


def test_100_001_values_are_refused() -> None:
    assert "more than 100,000 values" in refused(b"[" + b"0," * MAX_ITEMS + b"0]")


@pytest.mark.parametrize("empty", [b"{}", b"[]", b"{ }", b"[\n]"])
def test_empty_value_is_one_value(empty: bytes) -> None:
    body = b"[" + (empty + b",") * (MAX_ITEMS - 1) + empty + b"]"
    assert len(decode_any(body)) == MAX_ITEMS


def test_commas_inside_strings_are_no_values() -> None:
    body = b'{"text":"' + b",[{\\\\" * 60_000 + b'"}'
    assert len(decode_any(body)["text"]) == 240_000


# -- names that are twice in one object --------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'[{"a":1},{"a":2}]',
        b'{"a":{"a":{"a":1}}}',
        b'{"a":1,"A":2}',
        b'{"a":"a","b":"a"}',
        b'{"a":":","b":"\\":\\"","c":1}',
        b'{"\\"a\\":1,\\"a\\"":1,"b":"{\\"a\\":1,\\"a\\":2}"}',
        b'{"\\u0061":1,"b":"\\u0061"}',
        b'{"a":"\\u003a","b":"\\u003A"}',
        b'{"a:b":1,"a":2}',
        b'{"{":1,"}":2,"[":3,"]":4,",":5,":":6}',
        '{"\u00e9":1,"e\u0301":2}'.encode(),
        b'{"a":1,"a ":2,"":3}',
    ],
)
def test_names_that_differ_are_taken(body: bytes) -> None:
    assert decode_any(body) == json.loads(body)


def test_error_of_a_name_that_is_twice_names_it() -> None:
    assert "'a' twice" in refused(b'{"x":[{"a":1,"a":2}]}')


def test_name_that_is_twice_is_refused_whatever_the_type() -> None:
    assert "'x' twice" in refused(b'{"x":1,"x":1}', Point)
    assert "'z' twice" in refused(b'{"x":1,"z":1,"z":1}', Point)


_names = st.text(st.sampled_from('ab:"{}[],\\/\n\u00e9'), max_size=2)
_escapes = st.sampled_from(["as it is", "ascii", "all"])
Pairs = list[tuple[str, str, Any]]
_trees: st.SearchStrategy[Any] = st.recursive(
    st.tuples(st.just("leaf"), st.none() | st.integers(0, 9) | _names),
    lambda inner: (
        st.tuples(st.just("array"), st.lists(inner, max_size=4))
        | st.tuples(st.just("object"), st.lists(st.tuples(_escapes, _names, inner), max_size=4))
    ),
)


def written(escape: str, text: str) -> str:
    if escape == "all":
        return '"' + "".join(f"\\u{ord(character):04x}" for character in text) + '"'
    return json.dumps(text, ensure_ascii=escape == "ascii")


def rendered(tree: tuple[str, Any]) -> str:
    kind, inner = tree
    if kind == "leaf":
        return json.dumps(inner)
    if kind == "array":
        return "[" + ",".join(map(rendered, inner)) + "]"
    return "{" + ",".join(f"{written(e, n)}:{rendered(value)}" for e, n, value in inner) + "}"


def has_twice(tree: tuple[str, Any]) -> bool:
    kind, inner = tree
    if kind == "leaf":
        return False
    if kind == "array":
        return any(map(has_twice, inner))
    names = [name for _, name, _ in inner]
    return len(set(names)) < len(names) or any(has_twice(value) for _, _, value in inner)


@given(_trees)
def test_message_is_refused_exactly_when_a_name_is_twice(tree: tuple[str, Any]) -> None:
    body = rendered(tree).encode()
    if has_twice(tree):
        assert "twice in one object" in refused(body)
    else:
        assert decode_any(body) == json.loads(body)


# -- damage ------------------------------------------------------------------------------------

MESSAGE = CODEC.encode(
    User(
        id=-7,
        name='Ali\u00e7e "\\" \U0001f600\n:{[',
        score=-1.5e-7,
        admin=True,
        photo=b"\x00\xff",
        tags=["a", "", "\u20ac"],
        address=Address("Main: 1"),
        limits={"a": 2**63 - 1, "b": 0},
        born=datetime(2000, 1, 1, tzinfo=UTC),
    )
)


@pytest.mark.parametrize(
    "decode", [decode_user, decode_any, decode_empty], ids=["user", "any", "empty"]
)
def test_message_cut_at_any_byte_is_refused(decode: Any) -> None:
    for end in range(1, len(MESSAGE)):
        with pytest.raises(DecodeError):
            decode(MESSAGE[:end])


@pytest.mark.parametrize(
    "decode", [decode_user, decode_any, decode_empty], ids=["user", "any", "empty"]
)
def test_any_bit_of_a_message_flipped_gives_a_value_or_a_decode_error(decode: Any) -> None:
    for bit in range(len(MESSAGE) * 8):
        damaged = bytearray(MESSAGE)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decode(bytes(damaged))
        except DecodeError:
            continue


@given(st.binary() | st.text().map(str.encode) | _values.map(msgspec.json.encode), st.data())
def test_any_bytes_give_what_json_says_or_a_decode_error(body: bytes, data: st.DataObject) -> None:
    if body:
        place = data.draw(st.integers(0, len(body) - 1))
        body = body[:place] + data.draw(st.binary(max_size=4)) + body[place:]
    for decode in (decode_user, decode_empty):
        try:
            decode(body)
        except DecodeError:
            continue
    try:
        value = decode_any(body)
    except DecodeError:
        return
    assert value == (json.loads(body) if body else {})


@given(st.text(st.sampled_from('{}[]",:\\u0123456789aedE+-. \n'), max_size=60))
@example('{"a":1,"\\u0061":"\\ud800"}')
@settings(max_examples=500)
def test_text_like_json_gives_what_json_says_or_a_decode_error(text: str) -> None:
    try:
        value = decode_any(text.encode())
    except DecodeError:
        return
    assert value == (json.loads(text) if text else {})


# -- no objects are made -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b'{"__class__":"os.system","args":["true"]}',
        b'{"py/object":"os.system"}',
        b'{"__reduce__":["os.system",["true"]]}',
        b'{"$type":"System.Object"}',
        b'"!!python/object/apply:os.system"',
    ],
)
def test_tags_of_other_formats_are_plain_values(body: bytes) -> None:
    assert decode_any(body) == json.loads(body)


def test_pickle_is_no_message() -> None:
    refused(pickle.dumps({"x": 1}))
    with pytest.raises(UnsupportedContentType):
        codec_for("application/x-python-pickle")


# -- cost --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}",
        b"[" * 4_000_000,
        b'{"a":' * 800_000,
        b"," * 4_000_000,
        b'"' * 4_000_000,
        b'"",' * 1_300_000,
        b"[{}," * 1_000_000,
        b"," * 100_001 + b'"' + b'\\"' * 40_000,
        b"," * 100_001 + b'"' + b"\\" * 40_001,
        b"[" + b"9" * 4_000_000 + b"]",
        b'{"a":"\\u0061' + b'\\"' * 40_000,
        b"\xff" * 4_000_000,
    ],
    ids=lambda body: repr(body[:8]) + repr(body[-6:]),
)
def test_hostile_message_is_refused_within_2_seconds(body: bytes) -> None:
    start = time.thread_time()  # what others do on a busy machine does not count
    refused(body, Empty)
    assert time.thread_time() - start < 2


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 900 + b"1," * 90_000 + b"1" + b"]" * 900,
        b"[" * 60 + b"[1,[]]," * 12_000 + b"[]" + b"]" * 60,
        b"{" + b",".join(b'"%d":1' % n for n in range(1_000_000)) + b"}",
        arrays(100_000),
    ],
    ids=["deep and wide", "wide at 60 levels", "keys", "deep"],
)
def test_hostile_message_is_settled_before_memory_grows(body: bytes) -> None:
    """At most 32 times the message: a list of small values is already that in Python."""
    tracemalloc.start()
    try:
        decode_empty(b'{"z":' + body + b"}")
    except DecodeError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 * len(body)


# -- raw bytes ---------------------------------------------------------------------------------


@given(st.binary())
def test_raw_bytes_travel_as_they_are(body: bytes) -> None:
    assert Raw().decoder(bytes)(Raw().encode(body)) == body
    assert Raw().decoder(Any)(body) == body


@pytest.mark.parametrize("value", ["text", None, 5, {"a": 1}, bytearray(b"x")])
def test_raw_holds_nothing_but_bytes(value: object) -> None:
    text = f"application/octet-stream holds bytes, not {type(value).__name__}"
    with pytest.raises(InvalidArgument, match=text):
        Raw().encode(value)


@pytest.mark.parametrize("shape", [str, Point, dict[str, int]])
def test_raw_gives_nothing_but_bytes_and_says_to_send_json(shape: Any) -> None:
    with pytest.raises(UnsupportedContentType, match="send JSON"):
        Raw().decoder(shape)


# -- content types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8;v=1",
        "Application/JSON",
        " application/json ",
    ],
)
def test_parameters_and_case_of_a_content_type_are_ignored(content_type: str) -> None:
    assert codec_for(content_type).content_type == "application/json"


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("application/x-msgpack", "application/msgpack"),
        ("application/vnd.msgpack", "application/msgpack"),
        ("application/x-protobuf", "application/protobuf"),
        ("application/proto; v=1", "application/protobuf"),
    ],
)
def test_codec_has_several_names(name: str, codec: str) -> None:
    assert codec_for(name) is codec_for(codec)
    assert codec_for(name).content_type == codec


def test_codec_costs_nothing_until_it_is_used() -> None:
    code = """
import sys, micro
from micro.codec import codec_for
late = "micro.codec._msgpack", "micro.codec._protobuf", "google.protobuf"
print([name for name in late if name in sys.modules])
codec_for("application/protobuf"), codec_for("application/msgpack").decoder(dict)(b"")
print([name for name in late if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n")[:2] == [
        "[]",
        str(["micro.codec._msgpack", "micro.codec._protobuf"]),
    ]


def test_octet_stream_is_raw_bytes() -> None:
    assert codec_for("application/octet-stream").encode(b"\0") == b"\0"


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/jsonx", "json", "application/xml; a=b", "\0"]
)
def test_unknown_content_type_is_refused_with_those_that_are_known(content_type: str) -> None:
    text = (
        "is not one of application/json, application/octet-stream, "
        "application/msgpack, application/protobuf"
    )
    with pytest.raises(UnsupportedContentType, match=text) as caught:
        codec_for(content_type)
    assert repr(content_type) in str(caught.value)
    assert isinstance(caught.value, micro.Unsupported)
