"""The suite of codecs on every codec; test_codec_pydantic.py has it on models of pydantic."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, message_factory

from micro.codec import codec_for
from micro.testing import CodecSuite

_TWICE_MSGPACK = b"\x82\xa6number\x01\xa6number\x02"
_CLAIMS_MSGPACK = tuple(
    head + claim
    for head in (b"", b"\x82\xa6number\x01\xa7numbers", b"\x81\xa7unknown")
    for claim in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
)
_NOT_NUMBERS = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" + b"0" * 400 + b".0")


class TestJSON(CodecSuite):
    codec = codec_for("application/json")
    zones = True
    twice = (b'{"number":1,"number":2}', b'{"number":2,"\\u006eumber":2,"text":""}')
    bad_numbers = tuple(b'{"number":1,"score":%s}' % text for text in _NOT_NUMBERS)
    claims = (b"[" * 1_000_000, b'{"child":' * 400_000, b'{"number":1,"numbers":[' + b"," * 10**6)


class TestMessagePack(CodecSuite):
    codec = codec_for("application/msgpack")
    nan = True
    twice = (_TWICE_MSGPACK, _TWICE_MSGPACK.replace(b"\xa6", b"\xd9\x06"))
    claims = _CLAIMS_MSGPACK


def _messages() -> dict[str, Any]:
    """The messages of the suite in protobuf, with the same numbers for the same fields."""
    kinds = {"int64": 3, "string": 9, "double": 1, "bytes": 12, "message": 11}
    file = descriptor_pb2.FileDescriptorProto(
        name="micro/tests/suite.proto", package="micro.tests.suite", syntax="proto3"
    )

    def add(message: str, *fields: tuple[str, int, str, int]) -> None:
        of = f".micro.tests.suite.{message}"
        file.message_type.add(name=message).field.extend(
            descriptor_pb2.FieldDescriptorProto(
                name=name,
                number=number,
                type=kinds[kind],  # type: ignore[arg-type]  # an enum of the generator's
                label=label,  # type: ignore[arg-type]
                type_name=of if kind == "message" else None,
            )
            for name, number, kind, label in fields
        )

    inner = (("child", 7, "message", 1), ("children", 8, "message", 3))
    add(
        "Message",
        ("number", 1, "int64", 1),
        ("text", 2, "string", 1),
        ("score", 3, "double", 1),
        ("data", 4, "bytes", 1),
        ("numbers", 6, "int64", 3),
        *inner,
    )
    add("Number", ("number", 1, "int64", 1))
    add("Wrong", ("number", 1, "string", 1), *inner)
    add("Unnumbered", ("text", 2, "string", 1))
    return message_factory.GetMessages([file])


_PROTOBUF = {name.rpartition(".")[2]: message for name, message in _messages().items()}


class TestProtobuf(CodecSuite):
    codec = codec_for("application/protobuf")
    message = _PROTOBUF["Message"]
    number = _PROTOBUF["Number"]
    wrong = _PROTOBUF["Wrong"]
    unnumbered = _PROTOBUF["Unnumbered"]
    own = True
    times = False
    nan = True
    checked = False
    strict = False
    twice = (b"\x08\x01\x08\x02",)
    claims = (b"\x12\xff\xff\xff\xff\x07", b"\x32\xff\xff\xff\xff\x0f", b"\x43" * 1_000_000)


class TestRaw(CodecSuite):
    codec = codec_for("application/octet-stream")
    message = None
    own = True
