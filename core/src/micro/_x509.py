"""What a certificate says: whose it is, until when, and why nobody may show it.

The standard library tells this of a peer's certificate only in part, and of our own not at all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import msgspec

#: Tags of DER. Source: X.690, 8.1.2, and RFC 5280, 4.1 and 4.2.1.6.
_BOOLEAN, _OID, _OCTETS, _SEQUENCE = 0x01, 0x06, 0x04, 0x30
_UTC_TIME, _TIME = 0x17, 0x18
_VERSION, _EXTENSIONS = 0xA0, 0xA3
_DNS, _URI = 0x82, 0x86
#: Extensions: subjectAltName and basicConstraints, 2.5.29.17 and 2.5.29.19.
_ALT_NAME, _CONSTRAINTS = b"\x55\x1d\x11", b"\x55\x1d\x13"
#: Source: SPIFFE-ID, sections 2.1, 2.2 and 2.3.
_SPIFFE = re.compile(r"spiffe://([a-z0-9._-]{1,255})((?:/[A-Za-z0-9._-]+)*)")
_LONGEST = 2048
_SERVICE = re.compile(r"(spiffe://[^/]+/ns/[^/]+)/svc/([^/]+)")


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """One certificate.

    Times are seconds since 1970; ``uris`` and ``names`` (of DNS) are those of its subjectAltName.
    """

    begins: float
    ends: float
    uris: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    is_ca: bool = False

    @property
    def identity(self) -> str:
        """Who shows it: its SPIFFE ID, or its one DNS name; "" where that is not clear."""
        if self.uris:
            return self.uris[0]
        return self.names[0] if len(self.names) == 1 else ""

    @property
    def trust_domain(self) -> str:
        """That of its SPIFFE ID; "" without one."""
        found = _SPIFFE.fullmatch(self.uris[0]) if self.uris else None
        return found[1] if found else ""

    @property
    def service(self) -> str:
        """The service that it is of, or the first of several; "" where there is none."""
        if not self.uris:
            return self.names[0] if self.names else ""
        found = _SERVICE.fullmatch(self.uris[0])
        return found[2] if found else ""

    def fault(self) -> str:
        """Why nobody may show it, as the end of a sentence about it; "" if there is nothing."""
        if self.is_ca:
            return "is an authority's own, which signs others and is shown by nobody"
        if len(self.uris) > 1:
            return f"has {len(self.uris)} URI names, and may have one"
        if self.uris and not is_spiffe(self.uris[0]):
            return f"has the URI name {self.uris[0][:200]!r}, which is no SPIFFE ID"
        now = time.time()
        if now > self.ends:
            return f"has expired at {_shown(self.ends)}; renew it"
        if now < self.begins:
            return f"is valid from {_shown(self.begins)} on; do the clocks differ?"
        return ""

    def is_of(self, service: str, beside: Certificate | None) -> bool:
        """Whether it is that of a service.

        By its SPIFFE ID, ``spiffe://<trust domain>/ns/<namespace>/svc/<service>``; without one by
        any of its DNS names. Domain and namespace have to be those of ``beside``, if it has them.
        """
        if not self.uris:
            return service in self.names
        found = _SERVICE.fullmatch(self.uris[0])
        if found is None or found[2] != service:
            return False
        if beside is None or not beside.uris:
            return True
        own = _SERVICE.fullmatch(beside.uris[0])
        return own[1] == found[1] if own else beside.trust_domain == self.trust_domain

    def whose(self) -> str:
        """Whose it is, for an error's text."""
        named = self.uris or self.names
        return " and ".join(repr(name[:200]) for name in named[:3]) or "nobody by name"


def read(der: bytes) -> Certificate:
    """The certificate in DER.

    Raises:
        ValueError: it is none.
    """
    fields = list(_values(_only(_only(der, _SEQUENCE), _SEQUENCE, more=True)))
    if fields and fields[0][0] == _VERSION:
        fields = fields[1:]
    if len(fields) < 6:
        raise ValueError("a certificate has more fields")
    begins, ends = (_seconds(tag, value) for tag, value in _values(fields[3][1]))
    extensions: dict[bytes, bytes] = {}
    for tag, value in fields[6:]:
        if tag == _EXTENSIONS:
            for oid, extension in _extensions(value):
                if oid in extensions:
                    raise ValueError("an extension is there twice")
                extensions[oid] = extension
    names = _alt_names(extensions[_ALT_NAME]) if _ALT_NAME in extensions else []
    return Certificate(
        begins=begins,
        ends=ends,
        uris=tuple(name for tag, name in names if tag == _URI),
        names=tuple(name for tag, name in names if tag == _DNS),
        is_ca=_CONSTRAINTS in extensions and _may_sign(extensions[_CONSTRAINTS]),
    )


def is_spiffe(uri: str) -> bool:
    """Whether it is a SPIFFE ID, of a workload or of a trust domain."""
    found = _SPIFFE.fullmatch(uri) if len(uri) <= _LONGEST else None
    return found is not None and {".", ".."}.isdisjoint(found[2].split("/"))


def _shown(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


# -- DER ------------------------------------------------------------------------------------------


def _values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each value, one after another.

    Raises:
        ValueError: they are not whole.
    """
    at = 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("a value without a length")
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4 or at + size > len(data):
                raise ValueError("a length that DER does not have")
            length, at = int.from_bytes(data[at : at + size], "big"), at + size
        if at + length > len(data):
            raise ValueError("a value is longer than what holds it")
        yield tag, data[at : at + length]
        at += length


def _only(data: bytes, tag: int, *, more: bool = False) -> bytes:
    """The content of the one value in ``data``, of this tag; with ``more`` others may follow."""
    values = list(_values(data))
    if not values or values[0][0] != tag or (len(values) > 1 and not more):
        raise ValueError("another value was to come")
    return values[0][1]


def _extensions(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    for tag, extension in _values(_only(data, _SEQUENCE)):
        parts = list(_values(extension)) if tag == _SEQUENCE else []
        if len(parts) < 2 or parts[0][0] != _OID or parts[-1][0] != _OCTETS:
            raise ValueError("an extension that is none")
        yield parts[0][1], parts[-1][1]


def _alt_names(data: bytes) -> list[tuple[int, str]]:
    named = [pair for pair in _values(_only(data, _SEQUENCE)) if pair[0] in (_DNS, _URI)]
    return [(tag, value.decode("ascii")) for tag, value in named]


def _may_sign(data: bytes) -> bool:
    values = list(_values(_only(data, _SEQUENCE)))
    return bool(values) and values[0][0] == _BOOLEAN and any(values[0][1])


def _seconds(tag: int, value: bytes) -> float:
    """A moment. Source: RFC 5280, 4.1.2.5."""
    text = value.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if text[:2] < "50" else "19") + text
    if tag not in (_UTC_TIME, _TIME) or not re.fullmatch(r"[0-9]{14}Z", text):
        raise ValueError("a time that is none")
    from calendar import timegm

    numbers = [int(text[:4]), *(int(text[at : at + 2]) for at in range(4, 14, 2))]
    return float(timegm((*numbers, 0, 0, 0)))
