"""TLS of a service: its files, what is wrong with them, and new ones in their place."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

from micro._x509 import Certificate, read
from micro.errors import ConfigError
from micro.handshake import ClientContext, Contexts, ServerContext, live_client, live_server
from micro.tls import TLS

_log = logging.getLogger("micro.tls")

#: Seconds between two looks at the files.
_LOOK = 2.0
#: Seconds between two lines of the log about callers that were refused.
_QUIET = 10.0
#: The last part of a certificate's life, in which it should have been renewed.
_LATE = 0.1
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"

_Stamp: TypeAlias = tuple[tuple[int, int, int] | None, ...]


class Secured:
    """TLS of one run of a service.

    ``sources`` tells where each of ``cert``, ``key`` and ``ca`` was given. Its contexts are for
    use within ``kept``: each connection is made with the files as they are then.
    """

    def __init__(self, given: TLS, sources: Mapping[str, str] | None = None) -> None:
        self.given: TLS = given
        self._sources = dict(sources or {})
        self._stamp: _Stamp = ()
        self._contexts: Contexts | None = None
        self._fault = ""
        self._warned: Contexts | None = None
        self._told = -_QUIET

    def server(self, *, handshakes: int = 1000) -> ssl.SSLContext:
        """For a port: it takes callers whose certificates are in order.

        ``handshakes`` run at once at most; one more is refused.
        """
        return live_server(self._newest, self._refused, handshakes)

    def client(self, service: str) -> ssl.SSLContext:
        """For connections to nodes of ``service``: it takes none that is another's.

        Where ``service`` is "", the certificate has to name the host that is connected to.
        """
        return live_client(self._newest, service)

    @property
    def own(self) -> Certificate | None:
        """Our certificate, within ``kept``; None where there is none."""
        return self._newest().own

    @asynccontextmanager
    async def kept(self, *, serves: str = "") -> AsyncIterator[None]:
        """Read the files, and within again when they change.

        ``serves`` is the service's name if it is to be called.

        Raises:
            ConfigError: a file cannot be used; the text names the setting and what to do.
        """
        self._stamp, self._contexts = await asyncio.to_thread(self._load, serves)
        renewing = asyncio.create_task(self._renew(serves), name="micro.tls")
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)

    async def _renew(self, serves: str) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            try:
                await self._look(serves)
            except Exception:  # whatever it is, the next look may find all in order
                _log.exception("looking for new certificates failed")

    async def _look(self, serves: str) -> None:
        """Take the files if they have changed and are in order; else keep what there is."""
        if _stamp(self.given) == self._stamp:
            self._warn(self._newest())
            return
        try:
            self._stamp, self._contexts = await asyncio.to_thread(self._load, serves)
        except ConfigError as exc:
            if str(exc) != self._fault:
                self._fault = str(exc)
                _log.error("new certificates are not taken, the old ones stay: %s", exc)
            return
        self._fault = ""
        _log.info("new certificates are taken")

    def _newest(self) -> Contexts:
        assert self._contexts is not None, "used before its files were read"
        return self._contexts

    def _refused(self, why: str) -> None:
        """Tell the log of a caller that was refused; of many not of each."""
        now = time.monotonic()
        if now - self._told >= _QUIET:
            self._told = now
            _log.warning("a handshake with a caller failed: %s", why)

    def _warn(self, contexts: Contexts) -> None:
        """Say once that a certificate ends soon, and that nobody has renewed it."""
        own = contexts.own
        if own is None or contexts is self._warned:
            return
        left = own.ends - time.time()
        if left < (own.ends - own.begins) * _LATE:
            self._warned = contexts
            _log.warning("%s: it ends in %.0f min; renew it", self._of("cert"), left / 60)

    # what is made of the files

    def _load(self, serves: str) -> tuple[_Stamp, Contexts]:
        given = self.given
        stamp = _stamp(given)  # before they are read, so that what changes meanwhile is seen
        if bool(given.cert) != bool(given.key):
            one, other = ("cert", "key") if given.cert else ("key", "cert")
            flag, variable = f"--tls_{other}_file", f"MICRO_TLS_{other.upper()}_FILE"
            raise ConfigError(f"{self._of(one)}: it needs {flag} ({variable}) beside it")
        if serves and not given.cert:
            raise ConfigError(
                f"{self._of('ca')}: a service that is called with TLS needs a certificate, "
                "--tls_cert_file and --tls_key_file; `micro cert` makes them"
            )
        own = self._own(serves) if given.cert else None
        return stamp, Contexts(
            own=own,
            server=None if own is None else self._server_context(),
            client=self._client_context(own, by_host=False),
            by_host=self._client_context(own, by_host=True),
        )

    def _own(self, serves: str) -> Certificate:
        """Our certificate, one that peers do not refuse."""
        where = self._of("cert")
        pem = self._bytes("cert").decode("ascii", "ignore")
        try:
            start = pem.index(_BEGIN)
            end = pem.index(_END, start) + len(_END)
            own = read(ssl.PEM_cert_to_DER_cert(pem[start:end]))
        except ValueError:
            raise ConfigError(f"{where}: it has no certificate in PEM") from None
        fault = own.fault()
        if fault:
            raise ConfigError(f"{where}: this certificate {fault}")
        if serves and not own.is_of(serves, None):
            raise ConfigError(
                f"{where}: this certificate is of {own.whose()}, so that callers of {serves!r} "
                f"refuse it; make one of its own: micro cert new {serves}"
            )
        return own

    def _server_context(self) -> ssl.SSLContext:
        context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # No session is resumed: a certificate is looked at for each connection.
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0
        self._add_own(context)
        if self.given.ca:
            self._add_authorities(context)
            anonymous = self.given.anonymous
            context.verify_mode = ssl.CERT_OPTIONAL if anonymous else ssl.CERT_REQUIRED
        return context

    def _client_context(self, own: Certificate | None, *, by_host: bool) -> ssl.SSLContext:
        context = ClientContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = by_host
        if own is not None:
            self._add_own(context)
        if self.given.ca:
            self._add_authorities(context)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context

    def _add_own(self, context: ssl.SSLContext) -> None:
        self._bytes("key", 0)
        both = f"{self._of('cert')}, {self._of('key')}"
        try:
            context.load_cert_chain(self.given.cert, self.given.key, password=_no_passphrase)
        except ssl.SSLError as exc:
            fits = exc.reason != "KEY_VALUES_MISMATCH"
            why = "not a certificate and its key in PEM" if fits else "the key is another one's"
            raise ConfigError(f"{both}: {why}") from None
        except ValueError:
            text = f"{self._of('key')}: the key is encrypted; give it without a passphrase"
            raise ConfigError(text) from None
        except OSError as exc:
            raise ConfigError(f"{both}: cannot be read: {exc.strerror}") from exc

    def _add_authorities(self, context: ssl.SSLContext) -> None:
        try:
            context.load_verify_locations(cadata=self._bytes("ca").decode("ascii", "ignore"))
        except (ssl.SSLError, ValueError):
            raise ConfigError(f"{self._of('ca')}: it has no certificates in PEM") from None

    def _bytes(self, name: str, most: int = -1) -> bytes:
        try:
            with Path(getattr(self.given, name)).open("rb") as file:
                return file.read(most)
        except OSError as exc:
            raise ConfigError(f"{self._of(name)}: cannot be read: {exc.strerror}") from exc

    def _of(self, name: str) -> str:
        """A setting, for an error's text."""
        path = os.fspath(getattr(self.given, name))
        return f"{self._sources.get(name, 'code')}: tls_{name}_file {path}".rstrip()


def _stamp(given: TLS) -> _Stamp:
    """What is different once a file has changed."""
    return tuple(_of_file(path) for path in (given.cert, given.key, given.ca) if path)


def _of_file(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    try:
        told = Path(path).stat()
    except OSError:
        return None
    return told.st_ino, told.st_mtime_ns, told.st_size


def _no_passphrase() -> str:
    raise ValueError
