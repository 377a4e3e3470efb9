"""Models of pydantic as messages; without pydantic these tests are skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from micro.codec import MAX_DEPTH, MAX_ITEMS, codec_for, is_pydantic
from micro.errors import DecodeError, InvalidArgument, UnsupportedContentType
from micro.testing import CodecSuite

pydantic = pytest.importorskip("pydantic")
from pydantic import BaseModel, ConfigDict, Field, RootModel, field_validator  # noqa: E402

JSON = codec_for("application/json")
MSGPACK = codec_for("application/msgpack")
every_codec = pytest.mark.parametrize("codec", [JSON, MSGPACK], ids=["json", "msgpack"])


class Line(BaseModel):
    id: int
    tags: list[str] = []


class Order(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    name: Annotated[str, Field(min_length=1)]
    lines: list[Line] = []
    score: float = 0.0
    at: datetime | None = None
    photo: bytes = b""
    key: UUID | None = None


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    count: int
    at: datetime | None = None


class Aliased(BaseModel):
    full_name: str = Field(alias="fullName")


class Checked(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def lower(cls, name: str) -> str:
        if name == "bad":
            raise ValueError("not this one")
        return name.lower()


class Whatever(BaseModel):
    model_config = ConfigDict(extra="forbid")

    value: Any = None


@dataclass
class Holder:
    one: Order
    many: list[Line] | None = None


class Struct(msgspec.Struct):
    by_name: dict[str, Line]


def refused(body: bytes, shape: Any, codec: Any = JSON) -> str:
    """The text with which a body is refused."""
    with pytest.raises(DecodeError) as caught:
        codec.decoder(shape)(body)
    return str(caught.value)


_lines = st.builds(Line, id=st.integers(-(2**63), 2**63 - 1), tags=st.lists(st.text()))
_orders = st.builds(
    Order,
    name=st.text(min_size=1),
    lines=st.lists(_lines, max_size=3),
    score=st.floats(allow_nan=False, allow_infinity=False),
    at=st.none() | st.datetimes(timezones=st.just(UTC)),
    photo=st.binary(),
    key=st.none() | st.uuids(),
)


# -- what is taken -----------------------------------------------------------------------------


@every_codec
@given(order=_orders)
def test_model_is_decoded_as_it_was_encoded(codec: Any, order: Order) -> None:
    assert codec.decoder(Order)(codec.encode(order)) == order


@every_codec
@given(order=_orders)
def test_model_may_be_a_part_of_others(codec: Any, order: Order) -> None:
    holder = Holder(order, order.lines)
    assert codec.decoder(Holder)(codec.encode(holder)) == holder
    struct = Struct({"a": Line(id=1)})
    assert codec.decoder(Struct)(codec.encode(struct)) == struct
    assert codec.decoder(list[Line])(codec.encode(order.lines)) == order.lines
    assert codec.decoder(Line | None)(codec.encode(Line(id=1))) == Line(id=1)


@every_codec
def test_same_model_is_the_same_bytes(codec: Any) -> None:
    order = Order(name="a", lines=[Line(id=1)])
    assert codec.encode(order) == codec.encode(order.model_copy(deep=True))


@every_codec
def test_strict_model_takes_what_json_has_no_type_for(codec: Any) -> None:
    model = Strict(count=1, at=datetime(2024, 2, 29, tzinfo=UTC))
    assert codec.decoder(Strict)(codec.encode(model)) == model
    assert "valid integer" in refused(codec.encode({"count": "1"}), Strict, codec)


@every_codec
def test_model_travels_under_its_aliases(codec: Any) -> None:
    model = Aliased(fullName="Alice")
    body = codec.encode(model)
    assert codec.decoder(dict)(body) == {"fullName": "Alice"}
    assert codec.decoder(Aliased)(body) == model


@every_codec
def test_validators_of_a_model_run(codec: Any) -> None:
    assert codec.decoder(Checked)(codec.encode({"name": "Alice"})).name == "alice"
    assert "not this one - at `$.name`" in refused(codec.encode({"name": "bad"}), Checked, codec)


@every_codec
def test_unknown_field_is_ignored_unless_the_model_forbids_it(codec: Any) -> None:
    assert codec.decoder(Line)(codec.encode({"id": 1, "z": [{}]})) == Line(id=1)
    assert "$.z" in refused(codec.encode({"z": 1}), Whatever, codec)


@every_codec
def test_empty_body_is_the_model_with_all_defaults(codec: Any) -> None:
    assert codec.decoder(Whatever)(b"") == Whatever()
    assert refused(b"", Line, codec) == "Field required - at `$.id`"


def test_json_of_a_model_is_that_of_pydantic() -> None:
    order = Order(
        name="a", lines=[Line(id=1)], at=datetime(2024, 2, 29, tzinfo=UTC), key=UUID(int=1)
    )
    assert json.loads(JSON.encode(order)) == json.loads(order.model_dump_json())


def test_messagepack_of_others_may_hold_bytes_and_timestamps() -> None:
    class Plain(BaseModel):
        at: datetime
        text: bytes

    moment = datetime(2024, 2, 29, tzinfo=UTC)
    got = MSGPACK.decoder(Plain)(msgspec.msgpack.encode({"at": moment, "text": b"abc"}))
    assert got == Plain(at=moment, text=b"abc")


# -- errors ------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize(
    ("value", "shape", "text"),
    [
        ({"lines": []}, Order, "Field required - at `$.name`"),
        ({"name": "a", "lines": [{"id": 1}, {"id": "x"}]}, Order, "at `$.lines[1].id`"),
        ({"one": {"name": "a", "lines": [{}]}}, Holder, "Field required - at `$.one.lines[0].id`"),
        ({"one": {"name": ""}}, Holder, "at least 1 character - at `$.one.name`"),
        ([{"id": 1}, {"id": 1.5}], list[Line], "at `$[1].id`"),
        ([{"id": 1}, 5], list[Line], "an object - at `$[1]`"),
        ({"by_name": {"a": {"id": None}}}, Struct, "valid integer - at `$.by_name[...].id`"),
        ({"one": 5}, Holder, "- at `$.one`"),
        ("text", Order, "- at `$`"),
    ],
)
def test_error_names_the_path(codec: Any, value: Any, shape: Any, text: str) -> None:
    assert text in refused(codec.encode(value), shape, codec)


def test_error_does_not_repeat_what_was_sent() -> None:
    assert "geheim" not in refused(b'{"id":"geheim"}', Line)


@every_codec
def test_model_that_has_no_form_is_an_invalid_argument(codec: Any) -> None:
    class Plain(BaseModel):
        photo: bytes

    with pytest.raises(InvalidArgument):
        codec.encode(Plain(photo=b"\xff"))
    with pytest.raises(InvalidArgument):
        codec.encode(Whatever(value=object()))


def test_nan_in_a_model_is_refused_by_json() -> None:
    with pytest.raises(InvalidArgument, match="NaN"):
        JSON.encode(Order(name="a", score=float("nan")))


@pytest.mark.parametrize("content_type", ["application/protobuf", "application/octet-stream"])
def test_other_forms_hold_no_model(content_type: str) -> None:
    with pytest.raises(InvalidArgument):
        codec_for(content_type).encode(Line(id=1))
    with pytest.raises(UnsupportedContentType):
        codec_for(content_type).decoder(Line)


# -- as strict as any JSON ---------------------------------------------------------------------

_BAD = [
    b'{"value":1,"value":2}',
    b'{"value":{"a":1,"\\u0061":2}}',
    b'{"value":9223372036854775808}',
    b'{"value":NaN}',
    b'{"value":1e999}',
    b'{"value":"\\ud800"}',
    b'{"value":"\xff"}',
    b'{"value":1}x',
    b'{"value":1',
    b'\xef\xbb\xbf{"value":1}',
    b'{"value":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    b'{"value":[' + b"0," * MAX_ITEMS + b"0]}",
    b'{"value":' + b"[" * 100_000,
]


@pytest.mark.parametrize("bad", _BAD, ids=lambda bad: repr(bad[:24]))
def test_bad_json_is_refused_for_models_too(bad: bytes) -> None:
    refused(bad, Whatever)
    refused(b"[" + bad + b"]", list[Whatever])


@pytest.mark.parametrize("bad", [b"NaN", b"-Infinity", b"[NaN]", b'"\\udc00"', b"9" * 30])
def test_bad_scalar_is_refused_for_models_too(bad: bytes) -> None:
    refused(bad, RootModel[Any])


@pytest.mark.parametrize(
    "bad",
    [
        b"\x82\xa5value\x01\xa5value\x02",
        b"\x81\xa5value\xcf" + b"\xff" * 8,
        b"\x81\xa5value\xd4\x05\x00",
        b"\x81\xa5value" + b"\x91" * MAX_DEPTH + b"\x01",
    ],
)
def test_bad_messagepack_is_refused_for_models_too(bad: bytes) -> None:
    refused(bad, Whatever, MSGPACK)


@every_codec
def test_model_cut_or_damaged_anywhere_gives_a_model_or_a_decode_error(codec: Any) -> None:
    order = Order(name="Ali\u00e7e", lines=[Line(id=-5, tags=["a"])], score=0.5, photo=b"\xff")
    body, decode = codec.encode(order), codec.decoder(Order)
    for end in range(1, len(body)):
        with pytest.raises(DecodeError):
            decode(body[:end])
    for bit in range(len(body) * 8):
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert isinstance(decode(bytes(damaged)), Order)
        except DecodeError:
            continue


# -- the suite ---------------------------------------------------------------------------------


class Message(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    number: int
    text: str = ""
    score: float = 0.0
    data: bytes = b""
    moment: datetime | None = None
    numbers: list[int] = []
    child: Message | None = None
    children: list[Message] = []


class Number(BaseModel):
    number: int


class Unnumbered(BaseModel):
    text: str


class TestModelsInJSON(CodecSuite):
    codec = JSON
    message, number, unnumbered = Message, Number, Unnumbered
    zones = True
    twice = (b'{"number":1,"number":2}',)
    bad_numbers = (b'{"number":1,"score":NaN}', b'{"number":1,"score":1e999}')


class TestModelsInMessagePack(CodecSuite):
    codec = MSGPACK
    message, number, unnumbered = Message, Number, Unnumbered
    zones = True
    nan = True
    twice = (b"\x82\xa6number\x01\xa6number\x02",)


# -- without pydantic --------------------------------------------------------------------------


def test_only_classes_of_models_are_pydantic() -> None:
    assert is_pydantic(Line)
    assert not any(is_pydantic(shape) for shape in (Line(id=1), dict, Any, None, list[Line]))


def test_pydantic_is_imported_by_nobody_but_the_user() -> None:
    code = """
import sys
from micro.codec import codec_for, is_pydantic
for name in "application/json", "application/msgpack":
    codec_for(name).decoder(dict)(codec_for(name).encode({"a": [1]}))
assert not is_pydantic(dict)
print([name for name in sys.modules if "pydantic" in name])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
