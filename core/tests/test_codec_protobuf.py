"""Protobuf messages: in their own form, in JSON and in MessagePack."""

from __future__ import annotations

import contextlib
import json
import pickle
import time
from dataclasses import make_dataclass
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, message_factory, struct_pb2, timestamp_pb2
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from micro.codec import MAX_DEPTH, MAX_ITEMS, codec_for, is_protobuf
from micro.errors import DecodeError, InvalidArgument, UnsupportedContentType

PROTOBUF = codec_for("application/protobuf")
JSON = codec_for("application/json")
MSGPACK = codec_for("application/msgpack")
_OPTIONAL, _REPEATED = 1, 3
_INT32, _INT64, _MESSAGE, _STRING, _BYTES, _DOUBLE = 5, 3, 11, 9, 12, 1


def _field(name: str, number: int, kind: Any, of: str = "", label: Any = _OPTIONAL) -> Any:
    return descriptor_pb2.FieldDescriptorProto(
        name=name, number=number, type=kind, label=label, type_name=of or None
    )


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="micro/tests/codec.proto", package="micro.tests", syntax="proto3"
    )
    tree = file.message_type.add(name="Tree")
    tree.field.extend(
        [
            _field("full_name", 1, _STRING),
            _field("big", 2, _INT64),
            _field("photo", 3, _BYTES),
            _field("numbers", 4, _INT32, label=_REPEATED),
            _field("child", 5, _MESSAGE, ".micro.tests.Tree"),
            _field("children", 6, _MESSAGE, ".micro.tests.Tree", _REPEATED),
            _field("by_name", 7, _MESSAGE, ".micro.tests.Tree.ByNameEntry", _REPEATED),
            _field("score", 8, _DOUBLE),
        ]
    )
    entry = tree.nested_type.add(name="ByNameEntry")
    entry.options.map_entry = True
    entry.field.extend(
        [_field("key", 1, _STRING), _field("value", 2, _MESSAGE, ".micro.tests.Tree")]
    )
    flat = file.message_type.add(name="Flat")
    flat.field.extend([_field("name", 1, _STRING), _field("numbers", 2, _INT32, "", _REPEATED)])
    return message_factory.GetMessages([file])


Tree: Any = _messages()["micro.tests.Tree"]
Flat: Any = message_factory.GetMessageClass(Tree.DESCRIPTOR.file.message_types_by_name["Flat"])
decode_tree = PROTOBUF.decoder(Tree)
every_codec = pytest.mark.parametrize("codec", [PROTOBUF, JSON, MSGPACK], ids=["pb", "json", "mp"])
as_objects = pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=["json", "mp"])


def refused(body: bytes, shape: Any = Tree, codec: Any = PROTOBUF) -> str:
    """The text with which a body is refused."""
    with pytest.raises(DecodeError) as caught:
        codec.decoder(shape)(body)
    return str(caught.value)


_leaves = st.fixed_dictionaries(
    {},
    optional={
        "full_name": st.text(),
        "big": st.integers(-(2**63), 2**63 - 1),
        "photo": st.binary(),
        "numbers": st.lists(st.integers(-(2**31), 2**31 - 1)),
        "score": st.floats(allow_nan=False),
    },
)
_trees = st.recursive(
    _leaves.map(lambda fields: Tree(**fields)),
    lambda inner: st.builds(
        Tree,
        full_name=st.text(),
        child=inner,
        children=st.lists(inner, max_size=3),
        by_name=st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_leaves=5,
)


# -- what is taken -----------------------------------------------------------------------------


@every_codec
@given(tree=_trees)
def test_message_is_decoded_as_it_was_encoded(codec: Any, tree: Any) -> None:
    assert codec.decoder(Tree)(codec.encode(tree)) == tree


@every_codec
def test_same_message_is_the_same_bytes(codec: Any) -> None:
    names = [f"name{number}" for number in range(50)]
    one = Tree(by_name={name: Tree(full_name=name) for name in names})
    other = Tree(by_name={name: Tree(full_name=name) for name in reversed(names)})
    assert codec.encode(one) == codec.encode(one)
    if codec is PROTOBUF:
        assert codec.encode(one) == codec.encode(other)


@every_codec
def test_empty_body_is_the_message_with_all_defaults(codec: Any) -> None:
    assert codec.decoder(Tree)(b"") == Tree()


def test_message_and_nothing_may_have_no_bytes() -> None:
    assert PROTOBUF.encode(Tree()) == PROTOBUF.encode(None) == b""


def test_message_without_a_type_is_its_bytes() -> None:
    assert PROTOBUF.decoder(Any)(b"\x0a\x01a") == b"\x0a\x01a"


def test_unknown_field_is_kept() -> None:
    body = b"\x0a\x01a\xa0\x06\x05"
    assert decode_tree(body).full_name == "a"
    assert PROTOBUF.encode(decode_tree(body)) == body


@as_objects
def test_message_may_be_a_part_of_others(codec: Any) -> None:
    fields = [("one", Tree), ("many", list[Tree]), ("none", Tree | None)]
    Holder: Any = make_dataclass("Holder", fields)  # noqa: N806
    holder = Holder(one=Tree(full_name="a"), many=[Tree(big=1), Tree()], none=None)
    assert codec.decoder(Holder)(codec.encode(holder)) == holder


# -- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["text", 5, {"a": 1}, b"bytes", [Tree()]])
def test_protobuf_holds_nothing_but_its_messages(value: object) -> None:
    with pytest.raises(InvalidArgument, match="holds protobuf messages, not"):
        PROTOBUF.encode(value)


@pytest.mark.parametrize("shape", [str, dict[str, int], bytes, list[Tree], Message | None])
def test_protobuf_gives_nothing_but_its_messages_and_says_to_send_json(shape: Any) -> None:
    with pytest.raises(UnsupportedContentType, match="send JSON"):
        PROTOBUF.decoder(shape)


@pytest.mark.parametrize(
    "bad",
    [
        b"\x10" + b"\xff" * 10 + b"\x01",  # 24: a varint of 11 bytes
        b"\x9b\x06" * 101 + b"\x9c\x06" * 101,  # 24: groups
        b"\x9b\x06" * 100_000,
        b"\x0a\xff\xff\xff\xff\x07",  # 23: claims 2 GiB
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x01\xff",  # 19
        b"\x0a\x03\xed\xa0\x80",
        b"\x00",
        b"\x0c",
        b"\x0f",
        b"\x9b\x06",
    ],
    ids=lambda bad: repr(bad[:12]),
)
def test_bad_message_is_refused(bad: bytes) -> None:
    assert "not a Tree in protobuf" in refused(bad)


def nested(levels: int, field: str) -> Any:
    tree = Tree(full_name="a")
    for _ in range(levels - 1):
        if field == "by_name":
            tree = Tree(by_name={"": tree})
        else:
            tree = Tree(**{field: tree if field == "child" else [tree]})
    return tree


every_nesting = pytest.mark.parametrize("field", ["child", "children"])


@every_nesting
def test_64_levels_are_taken(field: str) -> None:
    tree = nested(MAX_DEPTH, field)
    assert decode_tree(PROTOBUF.encode(tree)) == tree


@every_nesting
@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 90, 101])
def test_65_levels_are_refused(field: str, levels: int) -> None:
    refused(nested(levels, field).SerializeToString())


def test_levels_of_empty_messages_count() -> None:
    body = b""
    for _ in range(MAX_DEPTH - 1):
        body = b"\x2a" + bytes([len(body)]) + body
    assert decode_tree(body)
    assert "more than 64 levels" in refused(b"\x2a\x7e" + body)


def test_levels_of_maps_count() -> None:
    assert decode_tree(nested(40, "by_name").SerializeToString())
    with pytest.raises(DecodeError):
        decode_tree(nested(MAX_DEPTH + 1, "by_name").SerializeToString())


@pytest.mark.parametrize("shape", [Tree, Flat])
def test_100_000_values_are_taken_and_one_more_is_refused(shape: Any) -> None:
    body = PROTOBUF.encode(shape(numbers=[0] * MAX_ITEMS))
    assert len(PROTOBUF.decoder(shape)(body).numbers) == MAX_ITEMS
    body = PROTOBUF.encode(shape(numbers=[0] * (MAX_ITEMS + 1)))
    assert "more than 100,000 values" in refused(body, shape)


def test_values_of_inner_messages_count() -> None:
    half = Tree(numbers=[0] * 50_000)
    assert "more than 100,000 values" in refused(PROTOBUF.encode(Tree(children=[half, half])))


def test_long_text_is_one_value() -> None:
    tree = Tree(full_name="a" * 1_000_000, photo=b"a" * 1_000_000)
    assert decode_tree(PROTOBUF.encode(tree)) == tree


@pytest.mark.parametrize(
    "body",
    [b"\x32\x00" * 2_000_000, b"\x22\x80\x89\x7a" + b"\x01" * 2_000_000, b"\x3a\x00" * 10**6],
)
def test_hostile_message_is_settled_within_2_seconds(body: bytes) -> None:
    start = time.thread_time()  # what others do on a busy machine does not count
    with contextlib.suppress(DecodeError):
        decode_tree(body)
    assert time.thread_time() - start < 2


# -- damage ------------------------------------------------------------------------------------

MESSAGE = Tree(
    full_name="Ali\u00e7e",
    big=-5,
    photo=b"\x00\xff",
    numbers=[1, 2, 300],
    child=Tree(full_name="b"),
    children=[Tree(), Tree(big=2**62)],
    by_name={"a": Tree(score=0.5)},
)


@every_codec
def test_message_cut_at_any_byte_is_never_another_error_than_decode_error(codec: Any) -> None:
    body = codec.encode(MESSAGE)
    for end in range(1, len(body)):
        try:
            codec.decoder(Tree)(body[:end])
        except DecodeError:
            continue
        assert codec is PROTOBUF  # where a field ends, a message may


@every_codec
def test_any_bit_of_a_message_flipped_gives_a_message_or_a_decode_error(codec: Any) -> None:
    body, decode = codec.encode(MESSAGE), codec.decoder(Tree)
    for bit in range(len(body) * 8):
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert isinstance(decode(bytes(damaged)), Tree)
        except DecodeError:
            continue


@given(st.binary())
@settings(max_examples=300)
def test_any_bytes_give_a_message_or_a_decode_error(body: bytes) -> None:
    for shape in (Tree, Flat, struct_pb2.Struct, descriptor_pb2.FileDescriptorProto):
        try:
            message = PROTOBUF.decoder(shape)(body)
        except DecodeError:
            continue
        assert isinstance(message, shape)


def test_pickle_is_no_message() -> None:
    refused(pickle.dumps({"x": 1}))


# -- as JSON -----------------------------------------------------------------------------------


def test_json_has_camel_case_and_64_bits_as_text() -> None:
    tree = Tree(full_name="a", big=2**63 - 1, photo=b"\xff", by_name={"x": Tree(score=1)})
    assert json.loads(JSON.encode(tree)) == {
        "fullName": "a",
        "big": "9223372036854775807",
        "photo": "/w==",
        "byName": {"x": {"score": 1.0}},
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"fullName":"a","big":5}',
        b'{"full_name":"a","big":"5"}',
        b'{"fullName":"a","big":5,"z":[{}]}',
    ],
)
def test_json_is_taken_with_both_names_both_integers_and_unknown_fields(body: bytes) -> None:
    assert JSON.decoder(Tree)(body) == Tree(full_name="a", big=5)


def test_well_known_types_are_in_json_as_protobuf_has_them() -> None:
    moment = timestamp_pb2.Timestamp(seconds=5)
    assert JSON.encode(moment) == b'"1970-01-01T00:00:05Z"'
    assert JSON.decoder(timestamp_pb2.Timestamp)(JSON.encode(moment)) == moment
    value = struct_pb2.Struct()
    value.update({"a": [1, {"b": None}]})
    assert JSON.decoder(struct_pb2.Struct)(JSON.encode(value)) == value


def test_message_that_json_cannot_hold_is_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="not a JSON message"):
        JSON.encode(timestamp_pb2.Timestamp(seconds=2**60))


_wrong = [
    {"child": "text"},
    {"child": ["a"]},
    {"child": 5},
    {"children": ["a"]},
    {"children": {"a": {}}},
    {"byName": {"a": ["b"]}},
    {"byName": ["a"]},
    {"fullName": 5},
    {"big": "x"},
    {"big": 5.5},
    {"big": "1_0"},
    {"big": "\u0661"},
    {"big": 2**63 - 1, "numbers": ["1_0"]},
    {"big": True},
    {"big": []},
    {"fullName": []},
    {"child": []},
    {"children": [[]]},
    {"numbers": [2**40]},
    {"numbers": 5},
    {"photo": "?"},
    {"fullName": "a", "full_name": "b"},
    ["fullName"],
    "fullName",
    5,
    None,
    [],
]


@as_objects
@pytest.mark.parametrize("value", _wrong, ids=str)
def test_object_that_does_not_fit_the_message_is_refused(codec: Any, value: Any) -> None:
    refused(codec.encode(value) if value is not None else b"\xc0", Tree, codec)


@as_objects
def test_object_has_the_limits_of_its_form(codec: Any) -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH - 1):
        deep = {"child": deep}
    assert codec.decoder(Tree)(codec.encode(deep))
    assert "more than 64 levels" in refused(codec.encode({"child": deep}), Tree, codec)
    many = codec.encode({"numbers": [0] * (MAX_ITEMS + 1)})
    assert "more than 100,000 values" in refused(many, Tree, codec)


def test_name_twice_in_json_is_refused() -> None:
    assert "twice" in refused(b'{"big":1,"big":2}', Tree, JSON)


def test_only_classes_of_messages_are_protobuf() -> None:
    assert is_protobuf(Tree)
    assert not any(is_protobuf(shape) for shape in (Tree(), dict, Any, None, list[Tree]))
