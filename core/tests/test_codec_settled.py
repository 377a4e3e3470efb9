"""What is settled by its type alone is what a slow, plain parser says: of damaged messages too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from micro.codec import JSON, MAX_DEPTH, MAX_ITEMS, codec_for
from micro.codec._msgpack import _Walk
from micro.errors import DecodeError

MSGPACK = codec_for("application/msgpack")


class Text(msgspec.Struct):
    a: str


class Empty(msgspec.Struct):
    pass


class Number(msgspec.Struct):
    a: int


class Defaulted(msgspec.Struct):
    a: str = ""


class Flat(msgspec.Struct):
    a: int
    b: str
    c: float
    d: bool


class Partly(msgspec.Struct):
    a: int
    b: str = "b"
    c: float = 0.5
    d: bool = False


class Renamed(msgspec.Struct, rename="upper"):
    a: str
    b: str


class Tagged(msgspec.Struct, tag=True):
    a: str


class Other(msgspec.Struct, tag=True):
    b: int


class Row(msgspec.Struct, array_like=True):
    a: str
    b: int = 0


class Whole(TypedDict):
    a: str
    b: float


class Loose(TypedDict):
    a: str
    b: NotRequired[int]


class Pair(NamedTuple):
    a: str
    b: int = 0


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Data:
    a: str
    b: int


@dataclass
class Grown:
    """It has more in its list than was sent."""

    a: list[Data]

    def __post_init__(self) -> None:
        self.a.append(Data("", 0))


@dataclass
class Order:
    a: list[Flat]
    b: str


@dataclass
class Deep:
    a: dict[str, Data]
    b: Data | None
    c: list[list[Partly]]
    d: dict[str, int] = field(default_factory=dict)


class Tree(msgspec.Struct):
    a: list[Tree] = []
    b: Tree | None = None


class Mixed(msgspec.Struct):
    a: Any
    b: Tagged | Other | None
    c: tuple[Data, int]
    d: datetime | None = None


class Either(msgspec.Struct):
    a: Tagged | Other | None


class Held(msgspec.Struct):
    a: msgspec.Raw
    b: int = 0


class Kinds(msgspec.Struct):
    a: Color
    b: Literal["x", 1]
    c: bytes
    d: Annotated[int, msgspec.Meta(ge=0, title="d")]


_integers = st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 99)
_texts = st.text(st.sampled_from('ab:,"{}[]\\/ \n\u00e9\u03c0\U0001f600'), max_size=5)
_floats = st.floats(allow_nan=False, allow_infinity=False)
_any = st.recursive(
    st.none() | st.booleans() | _integers | _floats | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_flat = st.builds(Flat, a=_integers, b=_texts, c=_floats, d=st.booleans())
_partly = st.builds(Partly, a=_integers, b=_texts, c=_floats, d=st.booleans())
_data = st.builds(Data, a=_texts, b=_integers)
_tagged = st.builds(Tagged, a=_texts) | st.builds(Other, b=_integers)
_trees = st.recursive(
    st.just(Tree()), lambda inner: st.builds(Tree, a=st.lists(inner, max_size=3), b=inner)
)
_deep = st.builds(
    Deep,
    a=st.dictionaries(_texts, _data, max_size=3),
    b=st.none() | _data,
    c=st.lists(st.lists(_partly, max_size=2), max_size=2),
    d=st.dictionaries(_texts, _integers, max_size=2),
)
_mixed = st.builds(
    Mixed,
    a=_any,
    b=st.none() | _tagged,
    c=st.tuples(_data, _integers),
    d=st.none() | st.datetimes(datetime(2, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
_kinds = st.builds(
    Kinds,
    a=st.sampled_from(Color),
    b=st.sampled_from(["x", 1]),
    c=st.binary(max_size=4),
    d=st.integers(0, 2**63 - 1),
)
_order = st.builds(Order, a=st.lists(_flat, max_size=3), b=_texts)
#: Types, and values that they may have.
_MESSAGES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Text, st.builds(Text, a=_texts)),
    (Empty, st.just(Empty())),
    (Number, st.builds(Number, a=_integers)),
    (Defaulted, st.builds(Defaulted, a=_texts)),
    (Flat, _flat),
    (Partly, _partly),
    (Renamed, st.builds(Renamed, a=_texts, b=_texts)),
    (Tagged, st.builds(Tagged, a=_texts)),
    (Row, st.builds(Row, a=_texts, b=_integers)),
    (Whole, st.fixed_dictionaries({"a": _texts, "b": _floats})),
    (Loose, st.fixed_dictionaries({"a": _texts}, optional={"b": _integers})),
    (Pair, st.builds(Pair, a=_texts, b=_integers)),
    (Data, _data),
    (Grown, st.builds(Grown, a=st.lists(_data, max_size=2))),
    (Order, _order),
    (Deep, _deep),
    (Tree, _trees),
    (Mixed, _mixed),
    (Either, st.builds(Either, a=st.none() | _tagged)),
    (Kinds, _kinds),
    (list[Partly], st.lists(_partly, max_size=3)),
    (dict[str, Text], st.dictionaries(_texts, st.builds(Text, a=_texts), max_size=3)),
    (dict[int, float], st.dictionaries(_integers, _floats, max_size=3)),
    (Data | None, st.none() | _data),
    (set[str], st.sets(_texts, max_size=3)),
    (Any, _any),
    (str, _texts),
    (int | str, _integers | _texts),
    (float, _floats),
    (bytes, st.binary(max_size=5)),
]
_messages = st.sampled_from(_MESSAGES).flatmap(lambda one: st.tuples(st.just(one[0]), one[1]))


# -- JSON --------------------------------------------------------------------------------------


def plain_json(body: bytes, shape: Any) -> Any:
    """What the standard library's parser lets pass, as msgspec alone decodes it."""
    tree = json.loads(
        body.decode() or "{}", object_pairs_hook=_distinct, parse_int=_int64, parse_float=_finite
    )
    if _levels(tree) > MAX_DEPTH:
        raise ValueError("too deep")
    return msgspec.json.decode(body or b"{}", type=shape)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _int64(digits: str) -> int:
    if not -(2**63) <= int(digits) < 2**63:
        raise ValueError("over 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError("infinite")
    return float(digits)


def _levels(tree: Any) -> int:
    if isinstance(tree, str):
        tree.encode()  # no lone surrogates
    if isinstance(tree, dict):
        return 1 + max(
            (max(_levels(name), _levels(inner)) for name, inner in tree.items()), default=0
        )
    return 1 + max(map(_levels, tree), default=0) if isinstance(tree, list) else 0


Node = Any  # a scalar, a list of nodes, or ("object", a list of names and nodes)
_HOSTILE: list[Any] = [
    2**63,
    -(2**63) - 1,
    10**30,
    1e18,
    float("nan"),
    [],
    {},
    {"a": ["x"]},
    {"z": {"a": 1, "b": 2}},
    None,
    0,
    "text",
    [[[1]]],
]


def _opened(tree: Any) -> Node:
    if isinstance(tree, dict):
        return ("object", [[name, _opened(inner)] for name, inner in tree.items()])
    return [_opened(inner) for inner in tree] if isinstance(tree, list) else tree


def _objects(node: Node) -> list[list[Any]]:
    if isinstance(node, tuple):
        return [node[1]] + [one for _, inner in node[1] for one in _objects(inner)]
    return [one for inner in node for one in _objects(inner)] if isinstance(node, list) else []


_names = st.sampled_from(["a", "b", "c", "d", "A", "z", "type", "", "a:"])
_edits = st.tuples(
    st.sampled_from(["again", "unknown", "drop", "replace", "hostile", "swap"]),
    st.integers(0, 20),
    st.integers(0, 20),
    _names,
    st.sampled_from(_HOSTILE) | _any,
)


def _edit(node: Node, edit: tuple[str, int, int, str, Any]) -> None:
    what, which, at, name, value = edit
    objects = _objects(node)
    if not objects:
        return
    pairs = objects[which % len(objects)]
    place = at % (len(pairs) + 1)
    if what == "unknown" or not pairs:
        pairs.insert(place, [name, _opened(value)])
    elif what == "again":
        pairs.insert(place, list(pairs[at % len(pairs)]))
    elif what == "drop":
        del pairs[at % len(pairs)]
    elif what == "swap":
        pairs.append(pairs.pop(0))
    else:
        pairs[at % len(pairs)][1] = _opened(value)


def _rendered(node: Node, *, blank: str, ascii_only: bool, escaped: bool) -> str:
    def text(value: str) -> str:
        if escaped and value:
            return (
                f'"\\u{ord(value[0]):04x}' + json.dumps(value[1:])[1:] if value < "\uffff" else '""'
            )
        return json.dumps(value, ensure_ascii=ascii_only)

    def write(node: Node) -> str:
        if isinstance(node, tuple):
            inner = f"{blank},".join(
                f"{text(name)}{blank}:{blank}{write(one)}" for name, one in node[1]
            )
            return f"{{{blank}{inner}}}"
        if isinstance(node, list):
            return f"[{blank}" + f",{blank}".join(map(write, node)) + "]"
        return text(node) if isinstance(node, str) else json.dumps(node)

    return write(node)


_TOKENS = [
    *(b"", b":", b",", b'"', b"\\", b"\xff", b"{", b"]", b" ", b"0" * 20, b"1e999", b"NaN"),
    *(b"\\u003a", b"\\ud800", b'"a":1,', b',"z":{"a":1,"a":2}', b"\xed\xa0\x80", b"\xef\xbb\xbf"),
    *(b"[" * 70, b',"":0', b"-", b".", b"9223372036854775808", b"null", b"\n"),
]
_damage = st.tuples(st.integers(0, 2000), st.integers(0, 2), st.sampled_from(_TOKENS))


@given(
    message=_messages,
    edits=st.lists(_edits, max_size=3),
    blank=st.sampled_from(["", "", " ", "\n"]),
    ascii_only=st.booleans(),
    escaped=st.booleans(),
    damage=st.none() | _damage,
)
@settings(max_examples=600)
def test_json_is_settled_as_a_plain_parser_settles_it(
    message: tuple[Any, Any],
    edits: list[Any],
    blank: str,
    damage: tuple[int, int, bytes] | None,
    *,
    ascii_only: bool,
    escaped: bool,
) -> None:
    shape, value = message
    body = msgspec.json.encode(value)
    if edits or blank or ascii_only or escaped:
        node = _opened(json.loads(body))
        for edit in edits:
            _edit(node, edit)
        text = _rendered(node, blank=blank, ascii_only=ascii_only, escaped=escaped)
        body = text.encode(errors="surrogatepass")
    agree_on_json(_damaged(body, damage), shape)


def _damaged(body: bytes, damage: tuple[int, int, bytes] | None) -> bytes:
    if damage is None:
        return body
    place, gone, put = damage
    place %= len(body) + 1
    return body[:place] + put + body[place + gone :]


def agree_on_json(body: bytes, shape: Any) -> None:
    _agree(JSON().decoder(shape), lambda: plain_json(body, shape), body)


def _agree(decode: Callable[[bytes], Any], plain: Callable[[], Any], body: bytes) -> None:
    try:
        expected = plain()
    except (ValueError, RecursionError, DecodeError):
        with pytest.raises(DecodeError):
            decode(body)
        return
    got = decode(body)
    assert got == expected or repr(got) == repr(expected)  # NaN is not equal to itself


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"x","a":"y"}',
        b'{"a":1,"a":1}',
        b'{"a":1,"b":":","z":2}',
        b'{"a":1,"b":"x","c":1.5,"d":true}',
        b'{"a":1,"b":"x","c":1.5,"d":true,"a":1}',
        b'{"a":1,"a":2,"c":1.5,"d":true}',
        b'{"a":1,"b":"\\u003a","c":1.5,"c":1.5,"d":true}',
        b'{"a":1,"b":"x","c":18446744073709551617,"d":true}',
        b'{"a":1,"b":"x","c":9223372036854775808,"d":true}',
        b'{"a":9223372036854775808}',
        b'{"a":"x","z":"\xff"}',
        b'{"a":"x","z":"\\ud800"}',
        b'{"z":1e999,"a":"x"}',
        b'{"z":' + b"[" * 64 + b"]" * 64 + b',"a":"x"}',
        b'{"a":null,"a":null}',
        b'{"a":{"a":"","a":""}}',
        b'{"a":{"a":"","z":"\xff"}}',
        b'{"a":[{"a":"","b":1,"b":2}]}',
        b'{"a":[{"a":1,"b":"","c":1,"d":true,"d":true},{"a":1,"b":"","c":1}],"b":""}',
        b'{"a":[{"a":1,"b":"","c":1,"d":true}],"b":"","z":1}',
        b'{"a":{"x":{"a":"","b":1},"x":{"a":"","b":1}},"b":null,"c":[]}',
        b'["x",1,"\xff"]',
        b'["x",1,{"a":1,"a":2}]',
        b'{"type":"Tagged","a":"x"}',
        b'{"type":"Tagged","type":"Tagged","a":"x"}',
        b'{"a":"2024-01-01T00:00:00+0530","a":1}',
        b"{}",
        b"",
        b"[]",
        b"5",
        b'""',
        b'"\\ud800"',
    ],
)
def test_json_that_hides_something_is_found_out_whatever_the_type(body: bytes) -> None:
    for shape, _ in _MESSAGES:
        agree_on_json(body, shape)


def test_time_without_a_colon_hides_no_name() -> None:
    """It is written with one more colon than it was read with."""
    body = b'{"a":1,"b":null,"c":[{"a":"","b":1},1],"z":0,"d":"2024-01-01T00:00:00+0530"}'
    agree_on_json(body, Mixed)
    agree_on_json(body.replace(b'"z"', b'"d"'), Mixed)


def test_what_a_class_adds_hides_no_name() -> None:
    agree_on_json(b'{"a":[{"a":"","b":1,"z":1,"y":{"x":1,"x":2}}]}', Grown)
    agree_on_json(b'{"a":[{"a":"","b":1,"b":1,"z":"\xff"}]}', Grown)


def test_what_is_kept_raw_is_read() -> None:
    agree_on_json(b'{"a":{"b":1,"b":1}}', Held)
    agree_on_json(b'{"a":"\xff"}', Held)


@pytest.mark.parametrize("count", [MAX_ITEMS // 2 - 1, MAX_ITEMS // 2, MAX_ITEMS // 2 + 1])
def test_values_of_a_typed_message_are_counted(count: int) -> None:
    body = b"[" + b",".join([b'{"a":""}'] * count) + b"]"
    decode = JSON().decoder(list[Text])
    if 2 * count <= MAX_ITEMS:
        assert len(decode(body)) == count
    else:
        with pytest.raises(DecodeError, match="100,000 values"):
            decode(body)


def test_levels_of_a_type_that_holds_itself_are_counted() -> None:
    def tree(levels: int) -> bytes:
        return b'{"a":[],"b":' * (levels - 1) + b"null" + b"}" * (levels - 1)

    decode = JSON().decoder(Tree)
    assert decode(tree(MAX_DEPTH))
    with pytest.raises(DecodeError, match="64 levels"):
        decode(tree(MAX_DEPTH + 1))


# -- MessagePack -------------------------------------------------------------------------------


def plain_msgpack(body: bytes, shape: Any) -> Any:
    """What the walk through all values lets pass, as msgspec alone decodes it."""
    _Walk(body or b"\x80").through()
    untyped = msgspec.msgpack.Decoder(ext_hook=_no_extension)
    untyped.decode(body or b"\x80")
    return msgspec.msgpack.decode(body or b"\x80", type=shape)


def _no_extension(code: int, _: memoryview) -> Any:
    raise ValueError(code)


def _packed(node: Node, *, long: bool) -> bytes:
    if isinstance(node, tuple):
        head = bytes([0x80 + len(node[1])]) if not long else b"\xde\x00" + bytes([len(node[1])])
        pairs = (msgspec.msgpack.encode(name) + _packed(one, long=long) for name, one in node[1])
        return head + b"".join(pairs)
    if isinstance(node, list):
        return bytes([0x90 + len(node)]) + b"".join(_packed(one, long=long) for one in node)
    if isinstance(node, int) and not -(2**63) <= node < 2**64:
        return b"\xcf" + b"\xff" * 8
    return msgspec.msgpack.encode(node)


_FORMS = [
    *(b"", b"\x80", b"\x81", b"\x90", b"\xc0", b"\xc1", b"\xff", b"\xa1a", b"\xa1a\x01"),
    *(b"\xcf" + b"\xff" * 8, b"\xd7\xff" + bytes(8), b"\xd4\x05\x00", b"\xdf\x00\x00\x00\x01"),
    *(b"\xd7\xff\x00\x00\x00\x04\x00\x00\x00\x00", b"\xc4\x01a", b"\xd9\x01a", b"\x91" * 70),
    *(b"\xdc\x00\x01", b"\xcf\x00\x00\x00\x00\x00\x00\x00\x01"),
]


@given(
    message=_messages,
    edits=st.lists(_edits, max_size=3),
    long=st.booleans(),
    damage=st.none() | st.tuples(st.integers(0, 2000), st.integers(0, 2), st.sampled_from(_FORMS)),
)
@settings(max_examples=600)
@example(message=(Flat, Flat(1, "\u03c0", 2.0, True)), edits=[], long=False, damage=None)
def test_messagepack_is_settled_as_a_walk_through_it_settles_it(
    message: tuple[Any, Any],
    edits: list[Any],
    damage: tuple[int, int, bytes] | None,
    *,
    long: bool,
) -> None:
    shape, value = message
    body = msgspec.msgpack.encode(value)
    if edits or long:
        node = _opened(msgspec.msgpack.decode(body))
        for edit in edits:
            _edit(node, edit)
        try:
            body = _packed(node, long=long)
        except ValueError:  # more than fits a short head
            return
    body = _damaged(body, damage)
    _agree(MSGPACK.decoder(shape), lambda: plain_msgpack(body, shape), body)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (b"\x81\xa1a\xcf" + b"\xff" * 8, Number),
        (b"\x84\xa1a\x01\xa1b\xa1x\xa1c\xcf" + b"\xff" * 8 + b"\xa1d\xc3", Flat),
        (b"\x84\xa1a\x01\xa1b\xa2\xcf\x80\xa1c\xcb" + bytes(8) + b"\xa1d\xc3", Flat),
        (b"\x84\xa1a\x01\xa1a\x01\xa1c\xcb" + bytes(8) + b"\xa1d\xc3", Partly),
        (b"\x82\xa1a\xa1x\xa1z\xa1\xff", Text),
        (b"\x82\xa1a\xa1x\xa1a\xa1x", Text),
        (b"\x81\xa1a\xd7\xff" + (1001 << 34 | 5).to_bytes(8, "big"), Mixed),
        (b"\x81\xa1a\xd7\xff" + (1001 << 34 | 5).to_bytes(8, "big"), Defaulted),
        (b"\x92\xa1x\x01", Row),
        (b"\x93\xa1x\x01\xa1\xff", Row),
        (b"\x81\xa1a\x82\xa1b\x01\xa1b\x01", Held),
    ],
)
def test_messagepack_that_hides_something_is_found_out(body: bytes, shape: Any) -> None:
    _agree(MSGPACK.decoder(shape), lambda: plain_msgpack(body, shape), body)


def test_time_that_is_not_exact_is_found_in_a_flat_message() -> None:
    class Moment(msgspec.Struct):
        a: datetime

    body = b"\x81\xa1a\xd7\xff" + (1001 << 34 | 5).to_bytes(8, "big")
    with pytest.raises(DecodeError, match="finer than a microsecond"):
        MSGPACK.decoder(Moment)(body)
