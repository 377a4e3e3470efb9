"""Certificates for tests of TLS, by an authority that nobody else trusts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from micro._signing import Signer

_DAY = timedelta(days=1)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


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

    def __init__(self, ca: Path, signer: Signer) -> None:
        self.ca: Path = ca
        self._signer = signer

    @classmethod
    def create(cls, folder: Path) -> Authority:
        """A new one, in a folder of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        authority = cls(folder / "ca.pem", Signer.create("ca", _DAY))
        authority.ca.write_bytes(authority._signer.certificate)
        return authority

    def server(self, name: str = "server") -> Identity:
        """For a server on loopback, which may be a client as well: some servers call themselves."""
        return self._written(name, self._signer.issue(name, _DAY, hosts=_LOOPBACK))

    def client(self, name: str = "client") -> Identity:
        """For a client; ``name`` is the common name of its certificate."""
        return self._written(name, self._signer.issue(name, _DAY, serves=False))

    def service(
        self,
        service: str,
        *,
        uris: Sequence[str] | None = None,
        hosts: Sequence[str] = _LOOPBACK,
        lives: timedelta = _DAY,
        is_ca: bool = False,
        name: str = "",
    ) -> Identity:
        """For a service of micro, as server and as client, in files called ``name``.

        ``uris`` say otherwise whose it is; with ``lives`` below 0 it has expired.
        """
        given = [f"spiffe://micro.test/ns/default/svc/{service}"] if uris is None else uris
        issued = self._signer.issue(service, lives, uris=given, hosts=hosts, is_ca=is_ca)
        return self._written(name or service, issued)

    def _written(self, name: str, issued: tuple[bytes, bytes]) -> Identity:
        certificate, secret = self.ca.with_name(f"{name}.pem"), self.ca.with_name(f"{name}.key")
        secret.touch(mode=0o600)
        certificate.write_bytes(issued[0])
        secret.write_bytes(issued[1])
        return Identity(certificate=certificate, key=secret, ca=self.ca)
