"""What stands in Consul: instances as Go Micro's, each with a check that lives by heartbeats."""

from __future__ import annotations

import json
import uuid
import zlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from micro.errors import ConfigError, DecodeError, InvalidArgument
from micro.record import without_nulls
from micro.registry import Endpoint, Node, Value
from micro.testing import eventually
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry
from micro_plugin_consul._entry import Instance, Namespace

Ask = Callable[..., Any]
Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]

VECTORS = Path(__file__).parent / "vectors"
ROOT = Namespace("", "--registry")
NODE = Node(
    service="greeter",
    id="greeter-1",
    address="127.0.0.1:9301",
    version="1.0.0",
    metadata={"zone": "eu", "dotted.key": "<&>"},
    service_metadata={"team": "a"},
    endpoints=(
        Endpoint(
            name="Greeter.Hello",
            request=Value(name="R", type="R", values=(Value(name="name", type="string"),)),
            metadata={"stream": "true"},
        ),
        Endpoint(name="Greeter.Other"),
    ),
)


def captured(name: str) -> list[Any]:
    """What Go Micro had registered, as Consul tells it."""
    found: list[Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return found


def request(name: str) -> tuple[str, Any]:
    """The path and the body of what Go Micro sent."""
    head, _, body = (VECTORS / f"{name}.req.http").read_bytes().partition(b"\r\n\r\n")
    return head.split()[1].decode(), json.loads(body or b"null")


def read(entry: Any) -> Node:
    return ROOT.node(msgspec.convert(entry["Service"], Instance), entry["Node"]["Address"])


def instance(**fields: Any) -> Instance:
    said = {"ID": "x", "Service": "greeter", "Address": "127.0.0.1", "Port": 80, **fields}
    return msgspec.convert(said, Instance)


def packed(letter: str, said: object) -> str:
    return f"{letter}-{zlib.compress(json.dumps(said).encode()).hex()}"


def unpacked(tags: list[str]) -> list[tuple[str, Any]]:
    """What tags say, the version as text."""
    found: list[tuple[str, Any]] = []
    for tag in tags:
        said = zlib.decompress(bytes.fromhex(tag[2:])).decode()
        found.append((tag[0], said if tag[0] == "v" else json.loads(said)))
    return found


# -- what Go Micro wrote --------------------------------------------------------------------------


def test_what_go_registered_is_read() -> None:
    (entry,) = captured("consul-health")
    name = Value(name="name", type="string")
    assert read(entry) == Node(
        service="helloworld",
        id="helloworld-demo1",
        address="127.0.0.1:9301",
        version="1.0.0",
        metadata={
            "transport": "http",
            "broker": "http",
            "server": "mucp",
            "registry": "consul",
            "protocol": "mucp",
            "zone": "eu",
        },
        endpoints=(
            Endpoint(
                name="Greeter.Chat",
                request=Value(name="Context", type="Context"),
                response=Value(name="Stream", type="Stream"),
                metadata={"stream": "true"},
            ),
            Endpoint(
                name="Greeter.Hello",
                request=Value(name="HelloReq", type="HelloReq", values=(name,)),
                response=Value(
                    name="HelloRep", type="HelloRep", values=(Value(name="msg", type="string"),)
                ),
            ),
            Endpoint(
                name="Func",
                request=Value(name="Event", type="Event", values=(name,)),
                metadata={"subscriber": "true", "topic": "events"},
            ),
        ),
    )


def test_what_gos_broker_registered_is_read() -> None:
    (entry,) = captured("consul-health-broker")
    node = read(entry)
    assert (node.service, node.version) == ("micro.http.broker", "ff.http.broadcast")
    assert node.metadata == {"broker": "http", "secure": "false", "topic": "events"}


def test_a_registration_is_gos_but_for_the_id_and_what_go_does_not_have() -> None:
    (entry,) = captured("consul-health")
    _, gos = request("consul-register")
    ours = ROOT.registration(read(entry), 60).body
    assert ours["ID"] == "helloworld/helloworld-demo1"
    for name in ("Name", "Address", "Port", "Meta"):
        assert ours[name] == gos[name]
    assert ours["Check"] == {
        "TTL": "60000ms",  # Go's 1m0s
        "DeregisterCriticalServiceAfter": "65000ms",  # 1m5s
        "Status": "passing",
        "Notes": "127.0.0.1:9301",
    }


def test_tags_say_what_gos_say() -> None:
    (entry,) = captured("consul-health")
    _, gos = request("consul-register")
    ours = unpacked(ROOT.registration(read(entry), 60).body["Tags"])
    expected = unpacked(gos["Tags"])
    assert [said for said in ours if said[0] != "e"] == [
        said for said in expected if said[0] != "e"
    ]
    known = msgspec.json.Decoder(Endpoint)
    ours_e, gos_e = (
        [known.decode(json.dumps(without_nulls(said))) for letter, said in tags if letter == "e"]
        for tags in (ours, expected)
    )
    assert ours_e == gos_e
    assert len(ours) == len(expected)


def test_the_tags_of_older_versions_are_read() -> None:
    endpoint = {"name": "A.B", "request": None, "response": None, "metadata": None}
    tags = [
        't={"zone":"eu"}',
        't={"rack":"1"}',
        f"e={json.dumps(endpoint)}",
        "v=1.2",
        packed("t", {"other form": "not read, as by Go"}),
    ]
    node = ROOT.node(instance(Tags=tags), "")
    assert node.metadata == {"zone": "eu", "rack": "1"}
    assert node.endpoints == (Endpoint(name="A.B"),)
    assert node.version == "1.2"


# -- what we write --------------------------------------------------------------------------------


def test_a_node_comes_back_as_it_was() -> None:
    for path in ("", "prod/eu"):
        namespace = Namespace(path, "--registry")
        body = namespace.registration(NODE, 30).body
        found = instance(**{**body, "Service": body["Name"]})
        assert namespace.node(found, "") == NODE


def test_metadata_of_the_service_is_in_tags_that_go_skips() -> None:
    tags = ROOT.registration(NODE, 30).body["Tags"]
    assert [said for letter, said in unpacked(tags) if letter == "s"] == [{"team": "a"}]
    assert {tag[0] for tag in tags} - {"t", "e", "v"} == {"s"}


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:80", "127.0.0.1", 80), ("[::1]:65535", "::1", 65535), ("a.b:1", "a.b", 1)],
)
def test_an_address_is_host_and_port(address: str, host: str, port: int) -> None:
    node = msgspec.structs.replace(NODE, address=address)
    body = ROOT.registration(node, 30).body
    assert (body["Address"], body["Port"]) == (host, port)
    assert ROOT.node(instance(**{**body, "Service": "greeter"}), "").address == address


def test_an_instance_without_an_address_has_that_of_its_agent() -> None:
    assert ROOT.node(instance(Address=""), "10.0.0.1").address == "10.0.0.1:80"


def test_a_socket_in_the_file_system_cannot_be_registered() -> None:
    with pytest.raises(InvalidArgument, match="Consul keeps host:port"):
        ROOT.registration(msgspec.structs.replace(NODE, address="unix:/run/a"), 30)


def test_ids_differ_though_consul_ignores_case_and_knows_no_service() -> None:
    services = [("a", "b-c"), ("a-b", "c"), ("a.b", "c"), ("A", "b-c"), ("a", "B-c"), ("a", "b-C")]
    nodes = [msgspec.structs.replace(NODE, service=name, id=id_) for name, id_ in services]
    namespaces = (ROOT, Namespace("a", ""), Namespace("A", ""))
    ids = {space.id(node).lower() for space in namespaces for node in nodes}
    assert len(ids) == 3 * len(nodes)
    for space in namespaces:
        for node in nodes:
            body = space.registration(node, 30).body
            assert space.node(instance(**{**body, "Service": body["Name"]}), "") == node


# -- names ----------------------------------------------------------------------------------------


def test_a_namespace_has_the_names_that_begin_with_it() -> None:
    prod = Namespace("prod/eu", "--registry")
    assert prod.name("greeter") == "prod/eu/greeter"
    assert prod.service("prod/eu/greeter") == "greeter"
    for name in ("greeter", "prod/greeter", "prod/eu/other/greeter", "prod/eu/", "prod/euro/a"):
        assert prod.service(name) is None
    assert ROOT.service("greeter") == "greeter"
    assert ROOT.service("prod/greeter") is None


@pytest.mark.parametrize("path", ["a//b", "../a", "a/..", "a b", "ü", 'a"b', "a/", "x" * 101])
def test_other_namespaces_are_config_errors_that_say_what_can_be(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^--registry: consul: namespace .*: write labels"):
        Namespace(path, "--registry")


# -- what others write ----------------------------------------------------------------------------


def test_tags_of_others_are_skipped() -> None:
    tags = ["v1", "e-mail", "t-shirt", "v", "e", "t", "", "t-", "e-00", "primary"]
    node = ROOT.node(instance(Tags=tags), "")
    assert (node.version, node.metadata, node.endpoints) == ("", {}, ())


@pytest.mark.parametrize(
    "said",
    [
        {"Address": "no host"},
        {"Port": 0},
        {"ID": "a/b c"},
        {"Tags": [packed("t", ["no pair"])]},
        {"Tags": [packed("t", {"a": 1})]},
        {"Tags": [packed("e", {"no": "name"})]},
        {"Tags": ["t=no JSON"]},
        {"Tags": ['t={"a":"' + "x" * 70_000 + '"}']},
        {"Tags": [f"v-{zlib.compress(bytes([255])).hex()}"]},
        {"Tags": [f"t-{zlib.compress(b'[' * 60_000).hex()}"]},
        {"Tags": [f"v-{zlib.compress(bytes(2**20)).hex()}"]},
        {"Tags": [packed("t", {"a": "x" * 40_000}), packed("t", {"b": "x" * 40_000})]},
    ],
)
def test_what_is_no_node_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        ROOT.node(instance(**said), "")


# -- what Consul takes in Meta --------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "metadata",
    [
        {"dotted.key": "a", "with blank": "b", "ü": "c", "": "d", "fits": "e"},
        {"x" * 129: "too long", "x" * 128: "fits"},
        {"long": "x" * 513, "fits": "x" * 512},
        {"long": "ü" * 257, "fits": "ü" * 256},
        {"consul-anything": "reserved", "fits": "a"},
        {f"key-{number}": "a" for number in range(65)},
    ],
    ids=["letters", "key", "value", "bytes", "reserved", "count"],
)
async def test_metadata_that_meta_does_not_take_is_registered_nevertheless(
    connected: Connected,
    ask: Ask,
    consul: ConsulServer,
    consul_url: str,
    metadata: dict[str, str],
) -> None:
    node = msgspec.structs.replace(NODE, metadata=metadata)
    async with connected(consul_url) as registry:
        await registry.register(node, ttl=60)
        assert await registry.get("greeter") == (node,)
        name = registry._names.name("greeter")
        (entry,) = ask(consul, "GET", f"health/service/{name}").said
        meta = entry["Service"]["Meta"]
        assert meta.items() < metadata.items()
        assert len(meta) == min(64, sum(key in ("x" * 128, "fits") for key in metadata) or 64)
        # And it is the limit: with all of it, Consul refuses.
        body = {"ID": uuid.uuid4().hex, "Name": name, "Meta": metadata}
        refused = ask(consul, "PUT", "agent/service/register", body=body)
        assert (refused.status, "Invalid Service Meta" in refused.said) == (400, True)


# -- what Go sends --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_go_sends_is_a_node_while_it_passes_and_none_once_it_is_deregistered(
    connected: Connected, ask: Ask, consul: ConsulServer, consul_url: str
) -> None:
    _, body = request("consul-register")
    passes, _ = request("consul-pass")
    leaves, _ = request("consul-deregister")
    async with connected(consul.url) as registry:
        ask(consul, "PUT", "agent/service/register", body=body)
        assert "helloworld" not in await registry.services()  # it has not passed yet
        ask(consul, "PUT", passes.removeprefix("/v1/"))
        await eventually(lambda: lists(registry, "helloworld"))
        assert await registry.get("helloworld") == (read(captured("consul-health")[0]),)
        ask(consul, "PUT", leaves.removeprefix("/v1/"))
        await eventually(lambda: lists(registry, "helloworld", no=True))


async def lists(registry: ConsulRegistry, service: str, *, no: bool = False) -> bool:
    return (service in await registry.services()) is not no
