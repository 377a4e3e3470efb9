"""What is said over NATS, against messages of Go Micro 4.11 with its registry nats 1.2.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from micro.errors import DecodeError
from micro.record import encode_node
from micro.registry import Node
from micro_plugin_nats import _wire

VECTORS = Path(__file__).parent / "vectors"


def vector(name: str) -> tuple[str, bytes]:
    said: dict[str, str] = json.loads((VECTORS / f"nats-registry-{name}.json").read_text())
    return said["subject"], said["data"].encode()


def the_node() -> Node:
    """The node of Go's answer."""
    (node,) = _wire.read_answer(vector("reply")[1]).nodes
    return node


def without(data: bytes, *ours: str) -> bytes:
    """A message as Go writes it, without the names that are ours alone."""

    def stripped(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name not in ours}

    said = json.loads(data, object_pairs_hook=stripped)
    return json.dumps(said, separators=(",", ":")).encode()


def test_subjects_are_go_micros() -> None:
    assert _wire.subjects("") == (vector("query-get")[0], vector("watch-create")[0])


def test_a_namespace_stands_before_them() -> None:
    questions, changes = _wire.subjects("prod/eu")
    assert questions == "prod.eu.micro.registry.nats.query"
    assert changes == "prod.eu.micro.registry.nats.watch"


def test_a_question_is_go_micros_byte_for_byte() -> None:
    assert _wire.question("helloworld") == vector("query-get")[1]


def test_gos_question_is_read() -> None:
    assert _wire.read_question(vector("query-get")[1]) == _wire.Question("helloworld")
    assert _wire.read_question(b'{"Service":null,"Action":"list"}') == _wire.Question(None)


def test_gos_answer_is_read() -> None:
    told = _wire.read_answer(vector("reply")[1])
    assert [(node.service, node.id, node.version) for node in told.nodes] == [
        ("helloworld", "helloworld-demo1", "1.0.0")
    ]
    assert told.ttl is None
    assert len(told.nodes[0].endpoints) == 3


def test_an_answer_is_go_micros_but_for_the_time_to_live() -> None:
    answer = _wire.answer(encode_node(the_node()), 29.5)
    assert without(answer, "ttl") == vector("reply")[1]
    assert _wire.read_answer(answer) == _wire.Told((the_node(),), 29.5)


def test_a_create_is_go_micros_but_for_our_names() -> None:
    create = _wire.create(encode_node(the_node()), 30, "us")
    assert without(create, "ttl", "from") == vector("watch-create")[1]
    assert _wire.read_change(create) == _wire.Told((the_node(),), 30, origin="us")
    assert _wire.read_change(vector("watch-create")[1]) == _wire.Told((the_node(),), None)


def test_a_delete_is_go_micros_but_for_our_name() -> None:
    delete = _wire.delete(the_node(), "us")
    assert without(delete, "from") == vector("watch-delete")[1]
    told = _wire.read_change(vector("watch-delete")[1])
    assert told.is_delete
    assert [node.id for node in told.nodes] == ["helloworld-demo1"]


def test_several_nodes_in_one_message_are_several() -> None:
    said = json.loads(vector("reply")[1])
    said["nodes"].append({"id": "two", "address": "127.0.0.1:2", "metadata": None})
    told = _wire.read_answer(json.dumps(said).encode())
    assert [node.id for node in told.nodes] == ["helloworld-demo1", "two"]


def test_the_case_of_names_does_not_matter() -> None:
    data = vector("watch-create")[1].replace(b'"Service"', b'"service"')
    assert _wire.read_change(data.replace(b'"Action"', b'"ACTION"')).nodes == (the_node(),)


@pytest.mark.parametrize(
    ("ttl", "expected"), [("1e9", 3600), ("0", None), ("-1", None), ('"30"', None), ("true", None)]
)
def test_a_time_to_live_is_believed_within_reason(ttl: str, expected: float | None) -> None:
    data = vector("reply")[1][:-1] + b',"ttl":' + ttl.encode() + b"}"
    assert _wire.read_answer(data).ttl == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"Service":null,"Action":"create"}',
        b'{"Service":{"name":"a","nodes":[{"id":"x","address":"nowhere"}]},"Action":"create"}',
        b'{"Service":{"name":"a"},"Action":"explode"}',
        b"[" * 100_000,
        b'{"a":"' + b"x" * 1024 * 1024 + b'"}',
    ],
    ids=lambda data: data[:30].decode(),
)
def test_what_is_no_change_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        _wire.read_change(data)


@pytest.mark.parametrize("data", [b"", b"7", b'{"Service":{"name":7},"Action":"get"}', b"{}"])
def test_what_is_no_question_is_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        _wire.read_question(data)
