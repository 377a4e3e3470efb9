"""Signing certificates, for development and for tests. It needs the package cryptography."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_AS_CLIENT, _AS_SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
#: Before it was made a certificate is valid, too: clocks differ.
_BEFORE = timedelta(minutes=5)
_SIGNS = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


class Signer:
    """An authority: a certificate that signs others, and its key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @classmethod
    def create(cls, name: str, lives: timedelta, *, uris: Iterable[str] = ()) -> Signer:
        """A new one with this common name."""
        key = ec.generate_private_key(ec.SECP256R1())
        extensions = [x509.BasicConstraints(ca=True, path_length=0), _SIGNS, *_named(uris)]
        return cls(_signed(name, key, _name(name), key, lives, extensions), key)

    @classmethod
    def read(cls, certificate: bytes, key: bytes) -> Signer:
        """The one with this certificate and this key, in PEM.

        Raises:
            ValueError: they are not a certificate and its key.
        """
        own = x509.load_pem_x509_certificate(certificate)
        secret = load_pem_private_key(key, password=None)
        if not isinstance(secret, ec.EllipticCurvePrivateKey):
            raise ValueError("the key is none of those that are made here")  # noqa: TRY004
        if own.public_key() != secret.public_key():
            raise ValueError("the key is not that of the certificate")
        return cls(own, secret)

    def issue(
        self,
        name: str,
        lives: timedelta,
        *,
        uris: Iterable[str] = (),
        hosts: Iterable[str] = (),
        serves: bool = True,
        is_ca: bool = False,
    ) -> tuple[bytes, bytes]:
        """A certificate with this common name, and its key, in PEM.

        ``uris`` are its URI names, ``hosts`` its names of DNS and its addresses; one that does not
        serve is for clients alone. It ends with the authority's own at the latest.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [_AS_SERVER, _AS_CLIENT] if serves else [_AS_CLIENT]
        extensions = [
            x509.BasicConstraints(ca=is_ca, path_length=None),
            x509.ExtendedKeyUsage(usages),
            *_named(uris, hosts),
        ]
        lives = min(lives, self._certificate.not_valid_after_utc - datetime.now(UTC))
        issuer = self._certificate.subject
        signed = _signed(name, key, issuer, self._key, lives, extensions)
        return signed.public_bytes(Encoding.PEM), _secret(key)

    @property
    def certificate(self) -> bytes:
        """In PEM."""
        return self._certificate.public_bytes(Encoding.PEM)

    @property
    def key(self) -> bytes:
        """In PEM."""
        return _secret(self._key)

    @property
    def uris(self) -> list[str]:
        """Its URI names."""
        try:
            found = self._certificate.extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            )
        except x509.ExtensionNotFound:
            return []
        return found.value.get_values_for_type(x509.UniformResourceIdentifier)


def _signed(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    by: ec.EllipticCurvePrivateKey,
    lives: timedelta,
    extensions: Sequence[x509.ExtensionType],
) -> x509.Certificate:
    now = datetime.now(UTC)
    draft = x509.CertificateBuilder(
        subject_name=_name(name),
        issuer_name=issuer,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=min(now, now + lives) - _BEFORE,
        not_valid_after=now + lives,
    )
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    other = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key())
    for extension in (own, other, *extensions):
        # Of those used here, what RFC 5280 wants to be critical is about who may sign.
        critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
        draft = draft.add_extension(extension, critical=critical)
    return draft.sign(by, hashes.SHA256())


def _named(uris: Iterable[str], hosts: Iterable[str] = ()) -> list[x509.SubjectAlternativeName]:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [_host(host) for host in hosts]
    return [x509.SubjectAlternativeName(names)] if names else []


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _secret(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
