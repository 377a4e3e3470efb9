"""The records of mDNS, against packets captured from unmodified Go Micro processes (v4.11.0)."""

from __future__ import annotations

import binascii
import json
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from micro.backends._mdns_wire import PACKET_SIZE, Card, Packet, Question, Zone, node_of, parse
from micro.errors import ConfigError, DecodeError, InvalidArgument, TooLarge
from micro.registry import Endpoint, Node, Value

VECTORS = Path(__file__).parent / "vectors"
MICRO = Zone("", "host1")

GREETER = Node(
    service="helloworld",
    id="helloworld-demo1",
    address="127.0.0.1:9301",
    version="1.0.0",
    metadata={
        "broker": "http",
        "protocol": "mucp",
        "registry": "mdns",
        "server": "mucp",
        "transport": "http",
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
            request=Value(
                name="HelloReq",
                type="HelloReq",
                values=(Value(name="name", type="string"),),
            ),
            response=Value(
                name="HelloRep", type="HelloRep", values=(Value(name="msg", type="string"),)
            ),
        ),
        Endpoint(
            name="Func",
            request=Value(name="Event", type="Event", values=(Value(name="name", type="string"),)),
            metadata={"subscriber": "true", "topic": "events"},
        ),
    ),
)
BROKER = Node(
    service="micro.http.broker",
    id="events-46cbfb49-a7bd-4dda-b917-d6bdaa33818c",
    address="127.0.0.1:9302",
    version="ff.http.broadcast",
    metadata={"broker": "http", "secure": "false", "topic": "events"},
)


def go(name: str) -> bytes:
    return bytes.fromhex(json.loads((VECTORS / f"mdns-{name}.json").read_text())["hex"])


def heard(wire: bytes, zone: Zone = MICRO) -> tuple[Node, int]:
    """The one node in a packet, and its time to live."""
    (instance,) = zone.instances(parse(wire))
    return node_of(instance)[0], instance.ttl


def asked(wire: bytes) -> Question:
    return parse(wire).questions[0]


def text_of(packet: Packet) -> Any:
    """The JSON in TXT, without what Go does not tell apart: null and empty."""
    (data,) = [record.data for record in packet.records if record.kind == 16]
    strings = b""
    while data:
        strings, data = strings + data[1 : data[0] + 1], data[data[0] + 1 :]
    return lean(json.loads(zlib.decompress(binascii.unhexlify(strings))))


def lean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: lean(item) for name, item in value.items() if item}
    return [lean(item) for item in value] if isinstance(value, list) else value


def without_text(packet: Packet) -> list[Any]:
    return [record[:5] if record.kind == 16 else record for record in packet.records]


@pytest.mark.parametrize(
    ("name", "node", "ttl"),
    [
        ("service-announce", GREETER, 120),
        ("service-response", GREETER, 120),
        ("service-goodbye", GREETER, 0),
        ("broker-announce", BROKER, 120),
        ("broker-response", BROKER, 120),
        ("broker-goodbye", BROKER, 0),
    ],
)
def test_what_go_says_of_a_node_is_read(name: str, node: Node, ttl: int) -> None:
    assert heard(go(name)) == (node, ttl)


@pytest.mark.parametrize("name", ["service-probe", "broker-probe"])
def test_the_claim_in_a_probe_of_go_is_no_answer(name: str) -> None:
    packet = parse(go(name))
    assert not packet.is_answer
    assert not list(MICRO.instances(packet))


def test_the_list_of_go_is_read_though_its_text_is_empty() -> None:
    packet = parse(go("list-response"))
    assert list(MICRO.listed(packet)) == ["micro.http.broker"]
    assert not list(MICRO.instances(packet))


@pytest.mark.parametrize(("name", "node"), [("service", GREETER), ("broker", BROKER)])
def test_our_answer_has_what_the_answer_of_go_has(name: str, node: Node) -> None:
    theirs = go(f"{name}-response")
    ours = MICRO.answer(asked(theirs), MICRO.card(node), ttl=120)
    assert ours[:12] == theirs[:12]  # id 0, flags 0x8400, one question, four answers
    assert parse(ours).questions == parse(theirs).questions
    assert without_text(parse(ours)) == without_text(parse(theirs))
    assert text_of(parse(ours)) == text_of(parse(theirs))


@pytest.mark.parametrize("kind", ["announce", "goodbye"])
def test_our_announcement_has_what_the_announcement_of_go_has(kind: str) -> None:
    theirs = parse(go(f"service-{kind}"))
    wire = MICRO.announcement(MICRO.card(GREETER), ttl=theirs.records[0].ttl)
    assert struct.unpack("!H", wire[2:4])[0] & 0x8000
    assert without_text(parse(wire)) == without_text(theirs)
    assert text_of(parse(wire)) == text_of(theirs)


def test_our_list_has_what_the_list_of_go_has() -> None:
    theirs = go("list-response")
    ours = MICRO.answer(asked(theirs), MICRO.card(BROKER), ttl=120)
    assert ours[:12] == theirs[:12]
    assert parse(ours) == parse(theirs)


def test_our_query_is_the_query_of_go() -> None:
    assert MICRO.query("helloworld")[2:] == go("service-query")[2:]


@pytest.mark.parametrize(
    ("address", "kind"), [("10.0.0.7:80", 1), ("[2001:db8::7]:80", 28), ("[::1]:80", 28)]
)
def test_the_address_of_a_node_is_all_that_is_announced(address: str, kind: int) -> None:
    node = Node(service="s", id="n", address=address)
    wire = MICRO.announcement(MICRO.card(node), ttl=5)
    assert [record.kind for record in parse(wire).records] == [33, kind, 16]
    assert heard(wire) == (node, 5)


WORDS = st.text(min_size=0, max_size=20)
ALPHABET = "ABYZabyz019_-"
LABEL = st.text(ALPHABET, min_size=1, max_size=20)


@given(
    service=st.lists(LABEL, min_size=1, max_size=4).map(".".join),
    id=LABEL,
    version=WORDS,
    metadata=st.dictionaries(WORDS, WORDS, max_size=4),
    service_metadata=st.dictionaries(WORDS, WORDS, max_size=2),
)
def test_a_node_is_read_as_it_was_written(**fields: Any) -> None:
    node = Node(address="192.0.2.1:1", **fields)
    for zone in (MICRO, Zone("prod.eu", "a.b.example")):
        card = zone.card(node)
        assert heard(zone.announcement(card, ttl=9), zone) == (node, 9)
        assert heard(zone.answer(asked(zone.query(node.service)), card, ttl=9), zone) == (node, 9)


def test_the_id_is_what_the_service_leaves_though_it_has_dots() -> None:
    packet = instance("go.micro.srv.greeter-1.go.micro.srv.greeter", Service="go.micro.srv.greeter")
    node, _ = heard(packet)
    assert (node.service, node.id) == ("go.micro.srv.greeter", "go.micro.srv.greeter-1")


def test_a_namespace_is_a_domain_that_no_service_of_go_can_be_in() -> None:
    assert asked(Zone("prod", "h").query("web")).text == "web.prod._micro."
    assert asked(Zone("Prod.EU", "h").query(None)).text == "_services.prod.eu._micro."
    with pytest.raises(InvalidArgument):
        MICRO.card(Node(service="web.prod._micro.", id="n", address="127.0.0.1:1"))


@pytest.mark.parametrize("path", ["a/b", "a..b", "ü", "a b", "x" * 64])
def test_a_namespace_of_anything_but_labels_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="mdns: path"):
        Zone(path, "h")


@pytest.mark.parametrize("host", ["", "...", "a b", "ü", "x" * 200, "host.example.com."])
def test_any_name_of_this_host_can_be_sent(host: str) -> None:
    zone = Zone("", host)
    assert heard(zone.announcement(zone.card(GREETER), ttl=1))[0] == GREETER


@pytest.mark.parametrize(
    "address",
    [
        "localhost:80",
        "0.0.0.0:80",
        "224.0.0.1:80",
        "240.0.0.1:80",
        "[::]:80",
        "[fe80::1%eth0]:80",
        "[::ffff:127.0.0.1]:80",
        "::1:80",
        "[10.0.0.1]:80",
    ],
)
def test_an_address_that_nobody_could_use_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="node address"):
        MICRO.card(Node(service="s", id="n", address=address))


@pytest.mark.parametrize("service", ["_services", "a._SERVICES"])
def test_a_service_in_the_place_of_the_list_is_refused(service: str) -> None:
    with pytest.raises(InvalidArgument, match="has its list there"):
        MICRO.card(Node(service=service, id="n", address="127.0.0.1:1"))


def test_names_too_long_for_dns_are_refused() -> None:
    longest = Node(service=".".join(["x" * 49] * 4), id="i" * 46, address="127.0.0.1:1")
    assert heard(MICRO.announcement(MICRO.card(longest), ttl=1)) == (longest, 1)
    with pytest.raises(InvalidArgument, match="mdns:"):
        Zone("production", "h").card(longest)


@pytest.mark.parametrize("size", [1_000, 30_000, 32_000, 40_000, 66_000])
def test_a_node_is_sent_whole_or_refused_as_too_large(size: int) -> None:
    # hex of zlib of hex: about one byte on the wire for each
    metadata = {"large": random.Random(size).randbytes(size // 2).hex()}
    node = Node(service="s", id="n", address="127.0.0.1:1", metadata=metadata)
    try:
        card: Card = MICRO.card(node)
    except TooLarge:
        assert size > 60_000
    else:
        wire = MICRO.answer(asked(MICRO.query("s")), card, ttl=1)
        assert len(wire) <= PACKET_SIZE
        assert heard(wire) == (node, 1)


def test_a_node_that_does_not_fit_in_a_packet_is_refused() -> None:
    noise = "".join(random.Random(1).choices([chr(c) for c in range(0x4E00, 0x9000)], k=20_000))
    node = Node(service="s", id="n", address="127.0.0.1:1", metadata={"noise": noise})
    with pytest.raises(TooLarge, match="packed for mdns"):
        MICRO.card(node)


# -- what nobody sends in good faith -----------------------------------------------------------


def name(text: str) -> bytes:
    labels = [label.encode() for label in text.split(".")]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def record(owner: bytes, kind: int, data: bytes, ttl: int = 120) -> bytes:
    return owner + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def packet(*records: bytes, flags: int = 0x8400) -> bytes:
    return struct.pack("!6H", 0, flags, 0, len(records), 0, 0) + b"".join(records)


def strings(data: bytes) -> bytes:
    cut = [data[at : at + 255] for at in range(0, len(data), 255)]
    return b"".join(bytes([len(part)]) + part for part in cut)


def packed(data: bytes) -> bytes:
    return strings(binascii.hexlify(zlib.compress(data)))


def instance(
    owner: str = "n.s",
    *,
    port: int = 80,
    address: bytes = b"\xc0\x00\x02\x01",
    text: bytes | None = None,
    **said: Any,
) -> bytes:
    if text is None:
        text = packed(msgspec.json.encode({"Service": "s", "Version": "1", **said}))
    here = name(f"{owner}.micro")
    return packet(
        record(here, 33, struct.pack("!HHH", 10, 1, port) + name("h")),
        record(name("h"), 1 if len(address) == 4 else 28, address),
        record(here, 16, text),
    )


def mapped(text: str) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + bytes(map(int, text.split(".")))


FALSE_NODES = {
    "bomb": instance(text=packed(b'{"Service":"s","x":"' + b"a" * 10_000_000 + b'"}')),
    "just over 64 KiB": instance(x="a" * 65_536),
    "not hex": instance(text=strings(b"zz")),
    "odd hex": instance(text=strings(b"789")),
    "not zlib": instance(text=strings(b"00" * 20)),
    "cut off": instance(text=strings(binascii.hexlify(zlib.compress(b'{"Service":"s"}')[:-2]))),
    "string past the end": instance(text=b"\xff00"),
    "no text": instance(text=b""),
    "not JSON": instance(text=packed(b"{")),
    "not UTF-8": instance(text=packed(b'{"Service":"\xff"}')),
    "not an object": instance(text=packed(b"[]")),
    "null": instance(text=packed(b"null")),
    "deep": instance(text=packed(b"[" * 30_000 + b"]" * 30_000)),
    "deep value": instance(text=packed(b'{"Service":"s","x":' + b"[" * 900 + b"]" * 900 + b"}")),
    "no service": instance(text=packed(b'{"Version":"1"}')),
    "wrong types": instance(Metadata={"a": 1}),
    "name of a service": instance("n.ü", Service="ü"),
    "empty service": instance(Service=""),
    "another service": instance(Service="other"),
    "no id": instance("s", Service="s"),
    "odd id": instance("n n.s"),
    "port 0": instance(port=0),
    "short address": instance(address=b"\x7f\0\0"),
    "no address of its own": instance(address=bytes(4)),
    "multicast": instance(address=b"\xe0\0\0\xfb"),
    "broadcast": instance(address=b"\xff" * 4),
    "hidden address": instance(address=mapped("127.0.0.1")),
}


@pytest.mark.parametrize("wire", FALSE_NODES.values(), ids=FALSE_NODES)
def test_a_false_node_is_refused(wire: bytes) -> None:
    with pytest.raises(DecodeError):
        heard(wire)


def test_a_text_of_just_64_kib_is_read() -> None:
    text = msgspec.json.encode({"Service": "s", "Version": ""})
    text = msgspec.json.encode({"Service": "s", "Version": "a" * (65_536 - len(text))})
    assert len(text) == 65_536
    assert heard(instance(text=packed(text)))[0].service == "s"


def chain(hops: int) -> bytes:
    """A packet whose names lead through ``hops`` pointers each."""
    # In the data of the first record: a root, then pointers that each point to the one before.
    start = 12 + 1 + 10
    links = [
        struct.pack("!H", 0xC000 | (start if not i else start + 2 * i - 1)) for i in range(hops)
    ]
    hidden = b"\0" + b"".join(links)
    last = struct.pack("!H", 0xC000 | (start + 2 * hops - 1))
    return packet(record(b"\0", 99, hidden), *[record(last, 1, b"1234") for _ in range(100)])


BROKEN = {
    "empty": b"",
    "short": b"\0" * 11,
    "text": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "3,000 records": packet(*[record(b"\0", 1, b"1234")] * 3000),
    "no records": struct.pack("!6H", 0, 0x8400, 0, 9, 0, 0),
    "65,535 records": struct.pack("!6H", 0, 0x8400, 65535, 65535, 65535, 65535) + b"\0" * 9000,
    "pointer to itself": packet(record(b"\xc0\x0c", 1, b"1234")),
    "pointers in a ring": packet(record(b"\xc0\x0e\xc0\x0c", 1, b"1234")),
    "pointer ahead": packet(record(b"\xc0\xff", 1, b"1234")),
    "chain of pointers": chain(8000),
    "odd label": packet(record(b"\x80a\0", 1, b"1234")),
    "data past the end": packet(b"\0" + struct.pack("!HHIH", 1, 1, 1, 999)),
    "SRV without a target": packet(record(b"\0", 33, b"\0" * 5)),
    "another opcode": packet(flags=0xA800),
    "an error": packet(flags=0x8403),
    "truncated": packet(flags=0x8600),
}


TEXT = b'{"Service":"s","Version":"' + b"a" * 65_000 + b'"}'
DEFLATED = zlib.compress(TEXT)


def plain() -> list[object]:
    """What time is measured by: some 16 ms, to inflate and parse as much as a packet can hold."""
    return [json.loads(zlib.decompress(DEFLATED)) for _ in range(60)]


def quickest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.thread_time()  # what others do on a busy machine does not count
        work()
        times.append(time.thread_time() - start)
    return min(times)


@pytest.mark.parametrize("wire", BROKEN.values(), ids=BROKEN)
def test_a_broken_packet_is_refused_in_little_time(wire: bytes) -> None:
    def refused() -> None:
        with pytest.raises(DecodeError):
            parse(wire)

    assert quickest(refused) < 6 * quickest(plain)


def test_a_bomb_is_not_inflated_beyond_the_limit() -> None:
    bomb = parse(instance(text=packed(b" " * 30_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="over 65536 bytes"):
            node_of(next(MICRO.instances(bomb)))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_worst_packet_costs_a_few_times_what_its_texts_take_to_inflate_and_parse() -> None:
    bomb = packed(TEXT)
    owners = [name(f"{i}.s.micro") for i in range(60)]
    wire = packet(
        record(name("h"), 1, b"\xc0\x00\x02\x01"),
        *[record(owner, 33, struct.pack("!HHH", 10, 1, 80) + name("h")) for owner in owners],
        *[record(owner, 16, bomb) for owner in owners],
    )

    def nodes() -> list[tuple[Node, int]]:
        return [node_of(instance) for instance in MICRO.instances(parse(wire))]

    assert len(nodes()) == len(owners)
    assert quickest(nodes) < 6 * quickest(plain)


def test_nothing_but_a_decode_error_escapes_from_damaged_packets() -> None:
    chance = random.Random(7)
    for original in (go("service-response"), go("list-response"), go("broker-probe")):
        for at in range(len(original)):
            attempt(original[:at])
        for _ in range(3000):
            damaged = bytearray(original)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            attempt(bytes(damaged))


def attempt(wire: bytes) -> None:
    try:
        packet = parse(wire)
        list(MICRO.listed(packet))
        for instance in MICRO.instances(packet):
            node_of(instance)
    except DecodeError:
        pass
