"""Nodes as Go Micro's JSON: what was captured from it is read, and written again byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro
from micro.record import check_found, decode_node, encode_node, without_nulls
from micro.registry import NODE_SIZE, Endpoint, Node, Value

VECTORS = Path(__file__).parent / "vectors"
NODE = Node(service="users", id="users-1", address="10.0.0.1:8080")


def captured(name: str) -> bytes:
    record: str = json.loads((VECTORS / f"{name}.json").read_text())["value"]
    return record.encode()


def changed(**fields: Any) -> bytes:
    """The captured record of a service, with other fields."""
    return json.dumps({**json.loads(captured("etcd-service")), **fields}).encode()


# -- as Go writes ----------------------------------------------------------------------------------


def test_record_of_go_is_read() -> None:
    node = decode_node(captured("etcd-service"))
    assert (node.service, node.id, node.address) == (
        "helloworld",
        "helloworld-demo1",
        "127.0.0.1:9301",
    )
    assert node.version == "1.0.0"
    assert node.metadata["zone"] == "eu"
    assert [endpoint.name for endpoint in node.endpoints] == [
        "Greeter.Chat",
        "Greeter.Hello",
        "Func",
    ]
    assert node.endpoints[1].request == Value(
        name="HelloReq", type="HelloReq", values=(Value(name="name", type="string"),)
    )
    assert node.endpoints[2].response is None


@pytest.mark.parametrize("name", ["etcd-service", "etcd-broker"])
def test_record_of_go_is_written_byte_for_byte(name: str) -> None:
    node = decode_node(captured(name))
    assert encode_node(node) == captured(name)


def test_id_of_go_may_be_longer_than_ours_and_have_dots() -> None:
    id_ = "go.micro.server-" + "a8c753ec-2457-47c3-82ac-fd30afeb76b3"
    found = decode_node(changed(nodes=[{"id": id_, "address": "h:1", "metadata": None}]))
    assert found.id == id_


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_metadata = st.dictionaries(_text, _text, max_size=3)
_values = st.recursive(
    st.builds(Value, name=_text, type=_text),
    lambda inner: st.builds(Value, name=_text, type=_text, values=st.lists(inner).map(tuple)),
    max_leaves=4,
)
_endpoints = st.builds(
    Endpoint,
    name=_text,
    request=st.none() | _values,
    response=st.none() | _values,
    metadata=_metadata,
)


@given(
    st.builds(
        Node,
        service=st.from_regex(r"[a-z0-9_-]{1,9}(\.[a-z]{1,9})?", fullmatch=True),
        id=st.from_regex(r"[A-Za-z0-9_-]{1,46}", fullmatch=True),
        address=st.sampled_from(["h:1", "10.0.0.1:65535", "[::1]:80"]),
        version=_text,
        metadata=_metadata,
        service_metadata=_metadata,
        endpoints=st.lists(_endpoints, max_size=3).map(tuple),
    )
)
def test_what_is_written_is_read(node: Node) -> None:
    assert decode_node(encode_node(node)) == node


@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"sort_keys": True}])
@pytest.mark.parametrize("name", ["etcd-service", "etcd-broker"])
def test_record_that_is_written_otherwise_is_the_same_node(
    name: str, options: dict[str, Any]
) -> None:
    record = captured(name)
    otherwise = json.dumps(json.loads(record), **options).encode()
    assert otherwise != record
    assert decode_node(otherwise) == decode_node(record)


def test_record_may_have_names_that_we_do_not_know_and_lack_those_that_may_be_left_out() -> None:
    node = decode_node(captured("etcd-service"))
    assert decode_node(changed(later={"a": 1})) == node
    said = json.loads(captured("etcd-service"))
    del said["metadata"], said["endpoints"]
    assert decode_node(json.dumps(said).encode()) == msgspec.structs.replace(node, endpoints=())


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ['"name":"helloworld"', '"zone":"eu"', '"id":"helloworld-demo1"', '"type":"HelloReq"']
)
def test_record_with_a_name_twice_is_refused_wherever_it_stands(name: str) -> None:
    record = captured("etcd-service")
    assert decode_node(record).metadata["zone"] == "eu"
    with pytest.raises(micro.DecodeError, match="twice"):
        decode_node(record.replace(name.encode(), f"{name},{name}".encode(), 1))


def test_node_that_cannot_be_registered_has_no_record() -> None:
    with pytest.raises(micro.InvalidArgument):
        encode_node(Node(service="a/b", id="1", address="h:1"))


def test_record_over_64_kib_is_neither_written_nor_read() -> None:
    large = Node(service="s", id="1", address="h:1", metadata={"a": "x" * NODE_SIZE})
    with pytest.raises(micro.TooLarge, match="65536 at most"):
        encode_node(large)
    with pytest.raises(micro.DecodeError, match="65536 at most"):
        decode_node(b" " * (NODE_SIZE + 1))


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"null",
        b"[]",
        b"not json",
        b'{"name":"x"}',
        b"\xff\xfe",
        b"[" * 60_000,
        changed(name="a/b"),
        changed(name=""),
        changed(name=5),
        changed(nodes=[]),
        changed(nodes=None),
        changed(nodes=[{"id": "1", "address": "h:1"}] * 2),
        changed(nodes=[{"id": "", "address": "h:1"}]),
        changed(nodes=[{"id": "a/b", "address": "h:1"}]),
        changed(endpoints={"a": 1}),
        changed(metadata={"a": 1}),
    ],
    ids=lambda record: record[:40].decode(errors="replace"),
)
def test_what_is_no_record_of_one_node_is_a_decode_error(record: bytes) -> None:
    with pytest.raises(micro.DecodeError):
        decode_node(record)


@pytest.mark.parametrize(
    "address",
    ["", "h", "h:", ":1", "h:0", "h:65536", "h:x", "a b:1", "h\n:1", "[h]:1", "h/..:1", "u@h:1"],
)
def test_address_that_cannot_be_called_is_refused(address: str) -> None:
    with pytest.raises(micro.DecodeError, match="address"):
        check_found(Node(service="s", id="1", address=address))


@pytest.mark.parametrize("address", ["h:1", "a.example.com:443", "10.0.0.1:65535", "[::1]:80"])
def test_address_that_can_be_called_is_kept(address: str) -> None:
    node = Node(service="s", id="1", address=address)
    assert check_found(node) is node


# -- null --------------------------------------------------------------------------------------


def test_nulls_of_go_are_left_out() -> None:
    go = {
        "name": "x",
        "metadata": None,
        "nodes": [{"id": "1", "metadata": None}],
        "endpoints": None,
    }
    assert without_nulls(go) == {"name": "x", "nodes": [{"id": "1"}]}


@pytest.mark.parametrize("value", [{}, [], [{}], {"a": {}}, "", 0, False, "null"])
def test_what_is_not_null_is_kept(value: object) -> None:
    assert without_nulls(value) == value
