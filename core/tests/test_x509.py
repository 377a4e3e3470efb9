"""What is read of a certificate, and whose it is."""

from __future__ import annotations

import ssl
import time
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from micro._signing import Signer
from micro._x509 import Certificate, is_spiffe, read

DAY = timedelta(days=1)
#: Longer than a run of all tests, which begins long after these certificates were made.
HOUR = 3600.0
SIGNER = Signer.create("ca", 2 * DAY, uris=["spiffe://micro.test"])


def issued(**given: Any) -> bytes:
    pem, _ = SIGNER.issue("name", given.pop("lives", DAY), **given)
    return ssl.PEM_cert_to_DER_cert(pem.decode())


WHOLE = issued(uris=["spiffe://micro.test/ns/a/svc/b"], hosts=["a.test", "127.0.0.1", "b.test"])


def of(*uris: str, names: tuple[str, ...] = (), is_ca: bool = False) -> Certificate:
    now = time.time()
    return Certificate(begins=now - HOUR, ends=now + HOUR, uris=uris, names=names, is_ca=is_ca)


def svc(service: str, *, domain: str = "micro.test", namespace: str = "default") -> Certificate:
    return of(f"spiffe://{domain}/ns/{namespace}/svc/{service}")


# -- reading ---------------------------------------------------------------------------------------


def test_all_of_a_certificate_is_read() -> None:
    before = time.time()
    found = read(issued(uris=["spiffe://micro.test/ns/a/svc/b"], hosts=["a.test", "b.test"]))
    assert found.uris == ("spiffe://micro.test/ns/a/svc/b",)
    assert found.names == ("a.test", "b.test")
    assert not found.is_ca
    assert found.ends - found.begins == pytest.approx(24 * 3600 + 300, abs=1)
    assert before - 1 <= found.begins + 300 <= time.time()


def test_authority_is_told_from_a_leaf() -> None:
    assert read(ssl.PEM_cert_to_DER_cert(SIGNER.certificate.decode())).is_ca
    assert read(issued(is_ca=True)).is_ca
    assert not read(issued()).is_ca


@pytest.mark.parametrize("days", [1, 365 * 30, 365 * 60])
def test_ends_of_both_kinds_of_time_are_read(days: int) -> None:
    """UTCTime until 2049, then GeneralizedTime."""
    signer = Signer.create("ca", timedelta(days=days))
    found = read(ssl.PEM_cert_to_DER_cert(signer.certificate.decode()))
    assert abs(found.ends - time.time() - days * 24 * 3600) < 60


@pytest.mark.parametrize("at", range(0, len(WHOLE), 7))
def test_cut_certificate_is_none(at: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        read(WHOLE[:at])


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_spoiled_certificate_is_read_or_refused(at: int, byte: int) -> None:
    spoiled = bytearray(WHOLE)
    spoiled[at] = byte
    try:
        found = read(bytes(spoiled))
    except ValueError:
        return
    assert isinstance(found.fault() + found.identity + found.whose(), str)


@given(st.binary(max_size=64))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read(data)


def test_extension_that_is_there_twice_is_refused() -> None:
    """Two readers could take one each: OpenSSL's and ours."""
    oid = b"\x06\x03\x55\x1d\x11"
    other = b"\x06\x03\x55\x1d\x13"
    assert WHOLE.count(oid) == WHOLE.count(other) == 1
    with pytest.raises(ValueError, match="twice"):
        read(WHOLE.replace(other, oid))


# -- who may show it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "text"),
    [
        (of(is_ca=True), "authority's own"),
        (of("spiffe://a/b", "spiffe://a/c"), "2 URI names"),
        (of("https://a/b"), "no SPIFFE ID"),
        (of("spiffe://A/b"), "no SPIFFE ID"),
        (Certificate(begins=0, ends=time.time() - 1), "has expired at 20"),
        (Certificate(begins=time.time() + HOUR, ends=time.time() + 2 * HOUR), "is valid from 20"),
    ],
)
def test_fault_says_what_is_wrong(certificate: Certificate, text: str) -> None:
    assert text in certificate.fault()


@pytest.mark.parametrize("certificate", [of(), of(names=("a", "b")), svc("a"), of("spiffe://a/b")])
def test_certificate_in_order_has_no_fault(certificate: Certificate) -> None:
    assert not certificate.fault()


@pytest.mark.parametrize(
    ("uri", "is_one"),
    [
        ("spiffe://micro.test", True),
        ("spiffe://micro.test/ns/a/svc/b.C_d-1", True),
        ("spiffe://micro.test/", False),
        ("spiffe://micro.test//a", False),
        ("spiffe://micro.test/a/../b", False),
        ("spiffe://micro.test/a/./b", False),
        ("spiffe://micro.test:1/a", False),
        ("spiffe://user@micro.test/a", False),
        ("spiffe://micro.test/a?b", False),
        ("spiffe://micro.test/a%2fb", False),
        ("spiffe://micro.test/a\n", False),
        ("spiffe:///a", False),
        ("SPIFFE://micro.test/a", False),
        ("spiffe://micro.test/" + "a" * 2100, False),
        ("", False),
    ],
)
def test_spiffe_ids_are_told_from_other_uris(uri: str, is_one: bool) -> None:
    assert is_spiffe(uri) is is_one


# -- whose it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "certificate",
    [
        svc("other"),
        svc("web.api"),
        svc("web", namespace="a/b"),
        of("spiffe://micro.test/svc/web"),
        of("spiffe://micro.test/web"),
        of("spiffe://micro.test/ns/default/svc/web/x"),
        of("spiffe://micro.test/ns/default/sa/web"),
        of("spiffe://micro.test/ns/default/svc/WEB"),
        of(names=("other",)),
        of(names=("*",)),
        of(names=("Web",)),
        of("spiffe://micro.test/ns/default/svc/other", names=()),
        of(),
    ],
)
def test_certificate_of_another_is_not_of_a_service(certificate: Certificate) -> None:
    assert not certificate.is_of("web", None)


def test_uri_stands_before_names() -> None:
    now = time.time()
    both = Certificate(
        begins=now, ends=now + 1, uris=("spiffe://a/ns/b/svc/other",), names=("web",)
    )
    assert not both.is_of("web", None)
    assert both.is_of("other", None)
    assert both.identity == "spiffe://a/ns/b/svc/other"


@pytest.mark.parametrize("certificate", [svc("web"), of(names=("a", "web"))])
def test_certificate_is_of_its_service(certificate: Certificate) -> None:
    assert certificate.is_of("web", None)
    assert certificate.is_of("web", of(names=("caller",)))


@pytest.mark.parametrize(
    ("own", "takes"),
    [
        (svc("a"), True),
        (svc("a", namespace="other"), False),
        (svc("a", domain="other.test"), False),
        (of("spiffe://micro.test/person/alice"), True),
        (of("spiffe://other.test/person/alice"), False),
        (of(names=("a",)), True),
    ],
)
def test_domain_and_namespace_are_those_of_the_caller(own: Certificate, takes: bool) -> None:
    assert svc("web").is_of("web", own) is takes


@pytest.mark.parametrize(
    ("certificate", "identity"),
    [
        (svc("a"), "spiffe://micro.test/ns/default/svc/a"),
        (of(names=("a",)), "a"),
        (of(names=("a", "b")), ""),
        (of(), ""),
    ],
)
def test_identity_is_told_where_it_is_clear(certificate: Certificate, identity: str) -> None:
    assert certificate.identity == identity
