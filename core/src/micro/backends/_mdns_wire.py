"""Nodes as DNS records, as Go Micro writes them, and back; no sockets."""

from __future__ import annotations

import binascii
import io
import re
import struct
import zlib
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple

import dns.exception
import dns.name
import dns.rdatatype
import dns.wire
import msgspec

from micro.codec import codec_for
from micro.errors import ConfigError, DecodeError, InvalidArgument, TooLarge
from micro.record import check_found, without_nulls
from micro.registry import NODE_SIZE, Endpoint, Node, check_node, check_service

#: The most that one UDP packet carries over IPv4; Go reads into 65,536 bytes.
PACKET_SIZE = 65_507

# What an answer has besides TXT: at most four names of 255 bytes, and the heads of five records.
_NAMES = 1200

# A hostile packet may pay for one parse no more than this: an honest one has one node.
_RECORDS = 128
_JUMPS = 1024
_TTL_MAX = 0x7FFFFFFF

_IN = 1
_A = dns.rdatatype.A
_AAAA = dns.rdatatype.AAAA
_PTR = dns.rdatatype.PTR
_SRV = dns.rdatatype.SRV
_TXT = dns.rdatatype.TXT

_ANSWER = 0x8000
_AUTHORITATIVE = 0x0400
_OPCODE_TC_RCODE = 0x7A0F
_LIST = "_services"
_LIST_PORT = 9999

Address = IPv4Address | IPv6Address


class Question(NamedTuple):
    """What a packet asks for."""

    name: dns.name.Name
    kind: int

    @property
    def text(self) -> str:
        return self.name.to_text().lower()


class Record(NamedTuple):
    """One resource record; which of the last three fields has a meaning depends on ``kind``."""

    name: str
    kind: int
    ttl: int
    target: str
    port: int
    data: bytes


class Packet(NamedTuple):
    """One packet: a question of somebody, or what somebody says of itself."""

    is_answer: bool
    questions: tuple[Question, ...]
    records: tuple[Record, ...]


class Instance(NamedTuple):
    """What a packet says of one node. ``name`` is ``<id>.<service>``, ``ttl`` 0 is its goodbye."""

    name: str
    ttl: int
    port: int
    address: Address | None
    text: bytes

    @property
    def key(self) -> str:
        return self.name.lower()


_Data = tuple[dns.name.Name, int, bytes]


class Card(NamedTuple):
    """A node of ours, ready to be sent."""

    node: Node
    key: str
    address: Address
    port: int
    text: bytes


class _Text(msgspec.Struct, rename="pascal"):
    """What Go Micro keeps in TXT. Go ignores ServiceMetadata, which is ours."""

    service: str
    version: str = "latest"
    endpoints: tuple[Endpoint, ...] = ()
    metadata: dict[str, str] = {}
    service_metadata: dict[str, str] = {}


class _Reader(dns.wire.Parser):
    """A parser whose way is bounded: names of pointers to pointers cost it only so much."""

    jumps = 0

    def seek(self, where: int) -> None:
        self.jumps += 1
        if self.jumps > _JUMPS:
            raise DecodeError("more compression pointers than an honest packet has")
        super().seek(where)

    def question(self) -> Question:
        name = dns.name.from_wire_parser(self)
        kind, _ = self.get_struct("!HH")
        return Question(name, kind)

    def record(self) -> Record:
        name = dns.name.from_wire_parser(self).to_text()
        kind, _, ttl, size = self.get_struct("!HHIH")
        with self.restrict_to(size):
            port = self.get_struct("!HHH")[2] if kind == _SRV else 0
            named = kind in (_SRV, _PTR)
            target = dns.name.from_wire_parser(self).to_text() if named else ""
            return Record(name, kind, ttl, target, port, self.get_remaining())


def parse(wire: bytes) -> Packet:
    """The parts of a packet that matter here.

    dnspython's own ``from_wire`` refuses the empty TXT that Go sends, and is unbounded in time.

    Raises:
        DecodeError: it is no DNS message, or one that nobody sends in good faith.
    """
    reader = _Reader(wire)
    try:
        _, flags, questions, *records = reader.get_struct("!HHHHHH")
        if flags & _OPCODE_TC_RCODE:
            raise DecodeError("a DNS message, but not of mDNS")
        if questions + sum(records) > _RECORDS:
            raise DecodeError(f"more than {_RECORDS} records in a packet")
        asked = tuple(reader.question() for _ in range(questions))
        is_answer = bool(flags & _ANSWER)
        # A question has records too, in Go's probe: they are a claim, not an answer.
        said = tuple(reader.record() for _ in range(sum(records) if is_answer else 0))
    except dns.exception.DNSException as exc:
        raise DecodeError(f"not a DNS message: {exc!r}") from exc
    return Packet(is_answer, asked, said)


class Zone:
    """The names of one domain: ``micro.``, which is Go Micro's, or that of a namespace.

    Raises:
        ConfigError: the namespace is not made of dot-separated labels.
    """

    def __init__(self, namespace: str, host: str) -> None:
        try:
            below = f".{check_service(namespace).lower()}._micro." if namespace else ".micro."
        except InvalidArgument as exc:
            raise ConfigError(f"mdns: path {namespace!r}: {exc.detail}") from exc
        #: What all names end with, from the dot on.
        self.suffix = below
        self.list_name = _LIST + below
        self._host = _name(_host_name(host))

    def query(self, service: str | None) -> bytes:
        """Who runs ``service``; None: which services there are.

        Raises:
            InvalidArgument: with the namespace the name is too long for DNS.
        """
        name = _name((service or _LIST) + self.suffix)
        return _packet(0, Question(name, _PTR), [], ttl=0)

    def card(self, node: Node) -> Card:
        """``node``, when it can be announced.

        Raises:
            InvalidArgument: a name or the address cannot be.
            TooLarge: it does not fit in one packet.
        """
        host, _, port = check_node(node).address.rpartition(":")
        if host == "unix":
            raise InvalidArgument(f"node address {node.address!r}: mdns announces host and port")
        if node.service.lower().split(".")[-1] == _LIST:
            raise InvalidArgument(f"service name {node.service!r}: mdns has its list there")
        try:
            address = _usable(_parse_host(host))
        except (ValueError, DecodeError):
            raise InvalidArgument(
                f"node address {node.address!r}: mdns announces the IP address of a host"
            ) from None
        key = f"{node.id}.{node.service}".lower()
        card = Card(node, key, address, int(port), _deflate(node))
        size = len(card.text) + _NAMES
        if size > PACKET_SIZE:
            raise TooLarge(
                f"node {node.id} of {node.service}: {size} bytes when packed for mdns, "
                f"which carries {PACKET_SIZE}"
            )
        self._instance(card)
        return card

    def announcement(self, card: Card, *, ttl: int) -> bytes:
        """What all who listen are told of the node; with ``ttl`` 0, that it is gone."""
        return _packet(_ANSWER | _AUTHORITATIVE, None, self._node_records(card), ttl=ttl)

    def answer(self, question: Question, card: Card, *, ttl: int) -> bytes:
        """The answer to a question for the node, for its service, or for all services."""
        if question.text == self.list_name:
            instance = _name(f"{card.node.service}.{_LIST}{self.suffix}")
            records = self._records(instance, IPv4Address(0), _LIST_PORT, b"")
        else:
            instance = self._instance(card)
            records = self._node_records(card)
        pointer = (question.name, _PTR, _wire(instance))
        return _packet(_ANSWER | _AUTHORITATIVE, question, [pointer, *records], ttl=ttl)

    def is_asked(self, name: str, card: Card) -> bool:
        """Whether a question for ``name`` asks for the node, or for all of its service."""
        return name in (card.key + self.suffix, card.node.service.lower() + self.suffix)

    def listed(self, packet: Packet) -> Iterator[str]:
        """The names in an answer that lists services; such names may be anything."""
        below = "." + self.list_name
        for record in packet.records:
            is_entry = record.kind == _PTR and record.name.lower() == self.list_name
            if is_entry and record.ttl and record.target.lower().endswith(below):
                yield record.target[: -len(below)]

    def instances(self, packet: Packet) -> Iterator[Instance]:
        """What a packet says of nodes of this domain; nothing of it is checked yet."""
        texts = {r.name.lower(): r.data for r in packet.records if r.kind == _TXT}
        hosts = {r.name.lower(): r.data for r in packet.records if r.kind == _AAAA}
        hosts |= {r.name.lower(): r.data for r in packet.records if r.kind == _A}
        below = "." + self.list_name
        for record in packet.records:
            name = record.name.lower()
            if record.kind == _SRV and name.endswith(self.suffix) and not name.endswith(below):
                yield Instance(
                    name=record.name[: -len(self.suffix)],
                    ttl=min(record.ttl, _TTL_MAX),
                    port=record.port,
                    address=_address(hosts.get(record.target.lower(), b"")),
                    text=texts.get(name, b""),
                )

    def _instance(self, card: Card) -> dns.name.Name:
        return _name(f"{card.node.id}.{card.node.service}{self.suffix}")

    def _node_records(self, card: Card) -> list[_Data]:
        return self._records(self._instance(card), card.address, card.port, card.text)

    def _records(
        self, name: dns.name.Name, address: Address, port: int, text: bytes
    ) -> list[_Data]:
        srv = struct.pack("!HHH", 10, 1, port) + _wire(self._host)
        kind = _A if address.version == 4 else _AAAA
        return [(name, _SRV, srv), (self._host, kind, address.packed), (name, _TXT, text)]


_strict = codec_for("application/json").decoder(Any)


def node_of(instance: Instance) -> tuple[Node, int]:
    """The node that an instance describes, and how many bytes of JSON it came as.

    Raises:
        DecodeError: it is no node, or none that may be used.
    """
    text = _inflate(instance.text)
    try:
        said = msgspec.convert(without_nulls(_strict(text)), _Text)
        service = check_service(said.service)
    except (msgspec.MsgspecError, InvalidArgument, RecursionError, UnicodeDecodeError) as exc:
        raise DecodeError(f"TXT of {instance.name[:80]!r}: {str(exc)[:200]}") from exc
    # The id is what the service's name leaves, never a label: it may have dots itself.
    if not instance.key.endswith("." + service.lower()):
        raise DecodeError(f"{instance.name[:80]!r} says that it is of {service!r}")
    id_ = instance.name[: -len(service) - 1]
    if instance.address is None:
        raise DecodeError(f"{instance.name[:80]!r} has no address")
    host = str(_usable(instance.address))
    node = Node(
        service=service,
        id=id_,
        address=f"[{host}]:{instance.port}" if ":" in host else f"{host}:{instance.port}",
        version=said.version,
        metadata=said.metadata,
        service_metadata=said.service_metadata,
        endpoints=said.endpoints,
    )
    return check_found(node), len(text)


def _packet(flags: int, question: Question | None, records: list[_Data], *, ttl: int) -> bytes:
    out = io.BytesIO()
    names: dict[dns.name.Name, int] = {}
    out.write(struct.pack("!6H", 0, flags, question is not None, len(records), 0, 0))
    if question is not None:
        question.name.to_wire(out, names)
        out.write(struct.pack("!HH", question.kind, _IN))
    for name, kind, data in records:
        name.to_wire(out, names)
        out.write(struct.pack("!HHIH", kind, _IN, ttl, len(data)) + data)
    return out.getvalue()


def _name(text: str) -> dns.name.Name:
    try:
        return dns.name.from_text(text)
    except dns.exception.DNSException as exc:
        raise InvalidArgument(f"mdns: {text!r}: {exc}") from exc


def _wire(name: dns.name.Name) -> bytes:
    wire = name.to_wire()
    assert wire is not None
    return wire


def _host_name(host: str) -> str:
    """The name of this host as DNS takes it: Go writes it as it is, without a domain."""
    labels = re.findall(r"[A-Za-z0-9_-]{1,63}", host[:200])
    return ".".join(labels or ["localhost"]) + "."


def _deflate(node: Node) -> bytes:
    said: dict[str, Any] = {
        "Metadata": node.metadata,
        "Service": node.service,
        "Version": node.version,
        "Endpoints": node.endpoints,
    }
    if node.service_metadata:
        said["ServiceMetadata"] = node.service_metadata
    text = msgspec.json.encode(said)
    if len(text) > NODE_SIZE:
        raise TooLarge(f"node {node.id} of {node.service}: {len(text)} bytes, {NODE_SIZE} at most")
    packed = binascii.hexlify(zlib.compress(text))
    strings = (packed[at : at + 255] for at in range(0, len(packed), 255))
    return b"".join(bytes([len(string)]) + string for string in strings)


def _inflate(text: bytes) -> bytes:
    strings = bytearray()
    at = 0
    while at < len(text):
        strings += text[at + 1 : at + 1 + text[at]]
        at += 1 + text[at]
    inflater = zlib.decompressobj()
    try:
        said = inflater.decompress(binascii.unhexlify(strings), NODE_SIZE + 1)
    except (binascii.Error, zlib.error) as exc:
        raise DecodeError(f"TXT is not hex of zlib: {exc}") from exc
    if len(said) > NODE_SIZE:
        raise DecodeError(f"TXT is over {NODE_SIZE} bytes when it is inflated")
    if not inflater.eof:
        raise DecodeError("TXT is cut off")
    return said


def _parse_host(host: str) -> Address:
    return IPv6Address(host[1:-1]) if host.startswith("[") else IPv4Address(host)


def _address(data: bytes) -> Address | None:
    return ip_address(data) if len(data) in (4, 16) else None


def _usable(address: Address) -> Address:
    """``address``, when a node can have it: it is not a way to hide another one."""
    if address.version == 6:
        odd = address.ipv4_mapped is not None or address.scope_id is not None
    else:
        odd = address.is_reserved
    if address.is_unspecified or address.is_multicast or odd:
        raise DecodeError(f"{address} is not the address of a node")
    return address
