"""Certificates for tests of TLS, by an authority that nobody else trusts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_AS_CLIENT, _AS_SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
_LOOPBACK = ("127.0.0.1", "::1")
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


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Files in PEM: a certificate, its private key, and the certificate of who signed it."""

    certificate: Path
    key: Path
    ca: Path


class Authority:
    """Signs certificates, which are valid for a day, and writes them beside its own.

    ``Authority.create(folder)`` makes one; ``ca`` is the file for those who are to trust it.
    """

    def __init__(self, ca: Path, key: ec.EllipticCurvePrivateKey) -> None:
        self.ca: Path = ca
        self._key = key

    @classmethod
    def create(cls, folder: Path) -> Authority:
        """A new one, in a folder of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        authority = cls(folder / "ca.pem", ec.generate_private_key(ec.SECP256R1()))
        authority._sign(
            authority.ca, authority._key, x509.BasicConstraints(ca=True, path_length=0), _SIGNS
        )
        return authority

    def server(self, name: str = "server") -> Identity:
        """For a server on loopback, which may be a client as well: some servers call themselves."""
        hosts = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(ip)) for ip in _LOOPBACK)]
        usage = x509.ExtendedKeyUsage([_AS_SERVER, _AS_CLIENT])
        return self._issue(name, usage, x509.SubjectAlternativeName(hosts))

    def client(self, name: str = "client") -> Identity:
        """For a client; ``name`` is the common name of its certificate."""
        return self._issue(name, x509.ExtendedKeyUsage([_AS_CLIENT]))

    def _issue(self, name: str, *extensions: x509.ExtensionType) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, secret = self.ca.with_name(f"{name}.pem"), self.ca.with_name(f"{name}.key")
        self._sign(certificate, key, x509.BasicConstraints(ca=False, path_length=None), *extensions)
        secret.touch(mode=0o600)
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Identity(certificate=certificate, key=secret, ca=self.ca)

    def _sign(
        self, path: Path, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> None:
        """Write the certificate of ``key``, whose common name is the file's."""
        now = datetime.now(UTC)
        ours = self._key.public_key()
        draft = x509.CertificateBuilder(
            subject_name=_named(path),
            issuer_name=_named(self.ca),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - timedelta(minutes=5),
            not_valid_after=now + timedelta(days=1),
        )
        draft = draft.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        ).add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ours), critical=False)
        for extension in extensions:
            # Of those used here, what RFC 5280 wants to be critical is about who may sign.
            critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
            draft = draft.add_extension(extension, critical=critical)
        path.write_bytes(draft.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))


def _named(path: Path) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, path.stem)])
