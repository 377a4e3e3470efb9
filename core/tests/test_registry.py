"""Nodes and their parts, and what names and addresses may be."""

from __future__ import annotations

import math
import re
import string
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import micro
from micro.registry import (
    NODE_SIZE,
    Change,
    Endpoint,
    Node,
    Registry,
    RegistryFeatures,
    Snapshot,
    Value,
    check_node,
    check_service,
    check_ttl,
    in_order,
)

NODE = Node(service="users", id="users-1", address="10.0.0.1:8080")
VALUES: list[msgspec.Struct] = [
    Value(name="name", type="string"),
    Endpoint(name="Users.Get"),
    NODE,
    Change(kind="create", node=NODE),
    Snapshot(nodes=(NODE,)),
    RegistryFeatures(min_ttl=1.0, converge=0.0),
]

every_value = pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)


def node(**fields: Any) -> Node:
    return msgspec.structs.replace(NODE, **fields)


# -- values ------------------------------------------------------------------------------------


@every_value
def test_value_is_frozen(value: msgspec.Struct) -> None:
    for name in value.__struct_fields__:
        with pytest.raises(AttributeError):
            setattr(value, name, None)


@every_value
def test_value_takes_keywords_only(value: msgspec.Struct) -> None:
    with pytest.raises(TypeError):
        type(value)("x")


@every_value
def test_value_is_equal_to_one_with_the_same_parts(value: msgspec.Struct) -> None:
    assert msgspec.convert(msgspec.to_builtins(value), type(value)) == value


def test_node_needs_a_service_an_id_and_an_address() -> None:
    for missing in ("service", "id", "address"):
        given: dict[str, Any] = {"service": "users", "id": "1", "address": "h:1"}
        del given[missing]
        with pytest.raises(TypeError, match=missing):
            Node(**given)


def test_node_has_go_micros_default_version() -> None:
    assert NODE.version == "latest"


def test_metadata_of_the_node_and_of_its_service_are_two() -> None:
    both = node(metadata={"zone": "eu"}, service_metadata={"owner": "a"})
    assert (both.metadata, both.service_metadata) == ({"zone": "eu"}, {"owner": "a"})


def test_nodes_do_not_share_their_metadata() -> None:
    one, other = (Node(service="x", id=name, address="h:1") for name in "ab")
    assert one.metadata is not other.metadata


@pytest.mark.parametrize("kind", ["create", "update", "delete"])
def test_change_is_one_of_three_kinds(kind: str) -> None:
    assert msgspec.convert({"kind": kind, "node": msgspec.to_builtins(NODE)}, Change).kind == kind


def test_registry_tells_case_apart_unless_it_says_otherwise() -> None:
    assert not RegistryFeatures(min_ttl=1.0, converge=0.0).ignores_case


def test_interface_has_five_methods_and_those_of_every_backend() -> None:
    own = {"register", "deregister", "get", "services", "follow"}
    assert Registry.__abstractmethods__ == own | {"connect", "aclose"}


def test_most_bytes_of_a_node_are_64_kib() -> None:
    assert NODE_SIZE == 65_536


def test_nodes_are_ordered_by_service_and_then_by_id() -> None:
    nodes = [node(service=name[0], id=name[1]) for name in ("bc", "ad", "ba", "ac")]
    assert [found.service + found.id for found in in_order(nodes)] == ["ac", "ad", "ba", "bc"]


# -- time to live ------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [2.0, 2.5, 1e9])
def test_time_to_live_from_the_least_on_is_taken(ttl: float) -> None:
    assert check_ttl(ttl, RegistryFeatures(min_ttl=2.0, converge=0.0)) == ttl


@pytest.mark.parametrize("ttl", [1.99, 0.0, -1.0, math.nan, math.inf])
def test_other_time_to_live_is_unsupported_and_the_least_is_told(ttl: float) -> None:
    with pytest.raises(micro.Unsupported, match=r"2 s is the least"):
        check_ttl(ttl, RegistryFeatures(min_ttl=2.0, converge=0.0))


def test_no_time_to_live_is_unsupported_whatever_the_least_is() -> None:
    with pytest.raises(micro.Unsupported):
        check_ttl(0.0, RegistryFeatures(min_ttl=0.0, converge=0.0))


# -- names of services -------------------------------------------------------------------------

_ALPHABET = string.ascii_letters + string.digits + "_-"
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")


@pytest.mark.parametrize(
    "name",
    ["a", "helloworld", "go.micro.srv.greeter", "A_b-9", "-", "a" * 63, ".".join(["a" * 49] * 4)],
)
def test_service_name_of_labels_is_taken(name: str) -> None:
    assert check_service(name) is name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a.",
        ".a",
        "a..b",
        "a b",
        "a/b",
        "../a",
        "a:b",
        "a\n",
        "a\0",
        "é",
        "\u0661",
        "*",
        "a" * 64,
        ".".join(["a" * 50] * 4),
    ],
)
def test_other_service_name_is_refused_with_what_can_be_written(name: str) -> None:
    with pytest.raises(micro.InvalidArgument, match=r"dot-separated labels of A-Z a-z 0-9 _ -"):
        check_service(name)


def test_error_of_a_long_service_name_is_short() -> None:
    with pytest.raises(micro.InvalidArgument) as caught:
        check_service("a" * 1_000_000)
    assert len(str(caught.value)) < 300


@given(st.text(st.sampled_from(_ALPHABET + ". é"), max_size=210))
def test_service_name_is_checked_as_documented(name: str) -> None:
    allowed = len(name) <= 200 and all(_LABEL.fullmatch(label) for label in name.split("."))
    if allowed:
        assert check_service(name) == name
    else:
        with pytest.raises(micro.InvalidArgument):
            check_service(name)


# -- nodes that can be registered --------------------------------------------------------------


@pytest.mark.parametrize("id", ["a", "a" * 46, "helloworld-8b2f", "A_-9"])
def test_node_id_of_one_label_is_taken(id: str) -> None:
    assert check_node(node(id=id)).id == id


@pytest.mark.parametrize("id", ["", "a" * 47, "a.b", "a b", "a/b", "a\n", "é", "\0"])
def test_other_node_id_is_refused_with_what_can_be_written(id: str) -> None:
    with pytest.raises(
        micro.InvalidArgument, match=r"node id .*: write 1 to 46 of A-Z a-z 0-9 _ -"
    ):
        check_node(node(id=id))


@pytest.mark.parametrize(
    "address", ["10.0.0.1:80", "host:1", "host.example:65535", "[::1]:8080", "memory:1"]
)
def test_node_address_of_host_and_port_is_taken(address: str) -> None:
    assert check_node(node(address=address)).address == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        ":80",
        "host:",
        "host:0",
        "host:65536",
        "host:-1",
        "host:+1",
        "host:1_0",
        "host: 1",
        "host:\u0661",
        "host:\u00b2",
        "host:" + "9" * 5_000,
    ],
    ids=lambda address: address[:12],
)
def test_other_node_address_is_refused_with_what_can_be_written(address: str) -> None:
    with pytest.raises(micro.InvalidArgument, match=r"node address .*: write host:port"):
        check_node(node(address=address))


def test_node_of_a_service_that_cannot_be_is_refused() -> None:
    with pytest.raises(micro.InvalidArgument, match="service name"):
        check_node(node(service="a b"))


@given(st.text(), st.text(), st.text())
def test_any_node_is_taken_or_an_invalid_argument(service: str, id: str, address: str) -> None:
    try:
        checked = check_node(node(service=service, id=id, address=address))
    except micro.InvalidArgument:
        return
    assert _LABEL.fullmatch(checked.id)
