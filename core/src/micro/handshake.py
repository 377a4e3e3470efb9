"""Handshakes of TLS, which end only when the peer's certificate is of whom it should be.

What is wrong with it is an error of the handshake itself, on both loops: no byte of a call goes to
a stranger, nor comes from one.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from weakref import WeakSet

import msgspec

from micro._x509 import Certificate, read

#: What a client without TLS is told: one that speaks HTTP, and any other, by three alerts
#: (protocol_version), which no protocol of ours begins with. Source: RFC 8446, section 6.
SPEAKS_TLS = (
    "it speaks TLS; name its authority with --tls_ca_file (MICRO_TLS_CA_FILE), "
    "and a certificate of your own where it wants one"
)
ALERT = b"\x15\x03"
_ALERTS = b"\x15\x03\x03\x00\x02\x02\x46" * 3
_REFUSAL = b'{"code":503,"detail":"%b","kind":"Unavailable","executed":false}\n' % (
    SPEAKS_TLS.replace("it ", "this port ", 1).encode()
)
_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_REFUSAL), _REFUSAL)
)
#: Reasons of OpenSSL for a peer that does not speak TLS.
_PLAIN_HTTP = ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST")
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
#: Seconds between two collections of garbage that handshakes have left.
_COLLECT = 1.0
#: What is wrong with a server's certificate, and helps, by OpenSSL's X509_V_ERR_...
_UNTRUSTED = (
    "its certificate is of an authority that is not trusted here; name that with --tls_ca_file "
    "(MICRO_TLS_CA_FILE)"
)
_ADVICE = {
    9: "its certificate is not valid yet; do the clocks differ?",
    10: "its certificate has expired; it has to be renewed",
    18: _UNTRUSTED,
    19: _UNTRUSTED,
    20: _UNTRUSTED,
    21: _UNTRUSTED,
    62: "its certificate is not for this host",
    64: "its certificate is not for this host",
}
#: Alerts that a server sends before it reads anything of a connection.
_REFUSALS = (
    "access denied",
    "bad certificate",
    "certificate expired",
    "certificate required",
    "certificate revoked",
    "certificate unknown",
    "handshake failure",
    "insufficient security",
    "protocol version",
    "unknown ca",
    "unsupported certificate",
)
#: A server of ours says no more, where only we find a certificate wrong.
HUNG_UP = "it hung up at once: it may refuse our certificate, and its log tells why"
_GIVE_OURS = (
    "it wants a certificate; give one with --tls_cert_file and --tls_key_file "
    "(MICRO_TLS_CERT_FILE, MICRO_TLS_KEY_FILE)"
)
#: What failed, by OpenSSL's reason; the first is of TLS 1.3, the second of 1.2.
_KNOWN = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": _GIVE_OURS,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": _GIVE_OURS,
    **dict.fromkeys(_NOT_TLS, "it does not speak TLS"),
}


class Contexts(msgspec.Struct, frozen=True, kw_only=True):
    """What was made of certificates at one time; ``by_host`` is for servers that are no service."""

    own: Certificate | None
    server: ssl.SSLContext | None
    client: ssl.SSLContext
    by_host: ssl.SSLContext


class _Side(ssl.SSLObject):
    """One side of a connection."""

    #: The peer's, as its certificate tells; "" without one.
    identity: str = ""
    own: Certificate | None = None

    def _peer(self) -> Certificate | None:
        """The peer's certificate, which OpenSSL has found to be of an authority that we trust."""
        der = self.getpeercert(binary_form=True)
        if der is None:
            return None
        try:
            peer = read(der)
        except ValueError as exc:
            raise _refusal(f"the certificate is not understood: {exc}") from None
        fault = peer.fault()
        if fault:
            raise _refusal(f"the certificate of {peer.whose()} {fault}")
        self.identity = peer.identity
        return peer


class _ClientSide(_Side):
    service: str = ""

    def do_handshake(self) -> None:
        super().do_handshake()
        peer = self._peer()
        if self.service and (peer is None or not peer.is_of(self.service, self.own)):
            whose = peer.whose() if peer else "nobody"
            raise _refusal(f"its certificate is of {whose}, not of service {self.service!r}")


class _ServerSide(_Side):
    """It refuses in two steps: the loops send what is left to say of one that is still on."""

    outgoing: ssl.MemoryBIO
    told: Callable[[str], None]
    running: WeakSet[_ServerSide]
    refused: str = ""

    def do_handshake(self) -> None:
        if self.refused:
            raise _refusal(self.refused)
        try:
            super().do_handshake()
            self._check()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as exc:
            self.running.discard(self)
            self.refused = _told(exc)
            self._answer(_reason(exc))
            if self.outgoing.pending:
                raise ssl.SSLWantReadError from None
            raise
        self.running.discard(self)

    def _check(self) -> None:
        peer = self._peer()
        if peer is None or self.own is None:
            return
        ours, theirs = self.own.trust_domain, peer.trust_domain
        if ours and theirs and ours != theirs:
            raise _refusal(f"the certificate is of trust domain {theirs!r}, not of {ours!r}")

    def _answer(self, reason: str) -> None:
        if reason in _PLAIN_HTTP:
            self.outgoing.write(_ANSWER)
        elif reason in _NOT_TLS:
            self.outgoing.write(_ALERTS)
        else:
            self.told(self.refused)
            with suppress(ssl.SSLError):  # a good-bye, where OpenSSL did not say why
                self.unwrap()


class ServerContext(ssl.SSLContext):
    """Of a server, with the certificates of one time."""

    sslobject_class: type[ssl.SSLObject] = _ServerSide


class ClientContext(ssl.SSLContext):
    """Of a client, with the certificates of one time."""

    sslobject_class: type[ssl.SSLObject] = _ClientSide


class _LiveServer(ssl.SSLContext):
    newest: Callable[[], Contexts]
    told: Callable[[str], None]
    most: int
    running: WeakSet[_ServerSide]
    _collected: float = -_COLLECT
    _alpn: Sequence[str] = ()
    _prepared: ssl.SSLContext | None = None

    def _is_full(self) -> bool:
        """Whether no more handshakes are begun.

        asyncio keeps those that a peer has left, each with 256 KiB, until garbage is collected.
        """
        now = time.monotonic()
        if len(self.running) >= self.most and now - self._collected > _COLLECT:
            self._collected = now
            gc.collect()
        return len(self.running) >= self.most

    def set_alpn_protocols(self, alpn_protocols: Iterable[str]) -> None:
        self._alpn = list(alpn_protocols)
        self._prepared = None

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - as the standard library has it
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        newest = self.newest()
        context = newest.server
        assert context is not None, "a server without a certificate"
        if context is not self._prepared:
            self._prepared = context
            if self._alpn:
                context.set_alpn_protocols(self._alpn)
        made = context.wrap_bio(incoming, outgoing, server_side=True)
        assert isinstance(made, _ServerSide)
        made.own, made.outgoing, made.told = newest.own, outgoing, self.told
        made.running = self.running
        if self._is_full():
            made.refused = f"{self.most} handshakes run already"
            self.told(made.refused)
        else:
            self.running.add(made)
        return made


class _LiveClient(ssl.SSLContext):
    newest: Callable[[], Contexts]
    service: str = ""

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,  # noqa: FBT001, FBT002 - as the standard library has it
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        newest = self.newest()
        context = newest.client if self.service else newest.by_host
        made = context.wrap_bio(incoming, outgoing, server_hostname=server_hostname)
        assert isinstance(made, _ClientSide)
        made.own, made.service = newest.own, self.service
        return made


def live_server(
    newest: Callable[[], Contexts], told: Callable[[str], None], most: int
) -> ssl.SSLContext:
    """For a port: each connection is made with the newest contexts.

    ``told`` hears why a caller was refused; of handshakes ``most`` run at once.
    """
    context = _LiveServer(ssl.PROTOCOL_TLS_SERVER)
    context.newest, context.told, context.most = newest, told, most
    context.running = WeakSet()
    return context


def live_client(newest: Callable[[], Contexts], service: str) -> ssl.SSLContext:
    """For connections to a service, in the same way; without one the host's name is checked."""
    context = _LiveClient(ssl.PROTOCOL_TLS_CLIENT)
    context.newest, context.service = newest, service
    return context


def identity_of(transport: asyncio.BaseTransport) -> str:
    """Whom the peer of a connection has shown to be; "" without TLS or without a certificate."""
    side = transport.get_extra_info("ssl_object")
    return side.identity if isinstance(side, _Side) else ""


def _refusal(why: str) -> ssl.SSLCertVerificationError:
    return ssl.SSLCertVerificationError(1, why)


def _told(exc: ssl.SSLError) -> str:
    reason = _reason(exc).replace("_", " ").lower()
    return getattr(exc, "verify_message", "") or reason or exc.strerror or "refused"


def _reason(exc: ssl.SSLError) -> str:
    """OpenSSL's name for it; "" for an error of ours."""
    return getattr(exc, "reason", None) or ""


# -- what went wrong ------------------------------------------------------------------------------


def explained(exc: BaseException | None, *, secure: bool = False) -> str:
    """What a failure of TLS means to a client, and what to do; "" for what is none.

    ``secure``: it happened while a connection of TLS was made.
    """
    if secure and isinstance(exc, ConnectionResetError):
        return "it hung up within the handshake; does it speak TLS?"
    if not isinstance(exc, ssl.SSLError):
        return ""
    if isinstance(exc, ssl.SSLCertVerificationError):
        told = getattr(exc, "verify_message", "")
        refused = f"its certificate is refused: {told}" if told else exc.strerror or "refused"
        return _ADVICE.get(getattr(exc, "verify_code", 0), refused)
    reason = _reason(exc)
    if is_refusal(exc):
        return _KNOWN.get(reason, f"it refuses our certificate, or our TLS: {_alert(reason)}")
    return _KNOWN.get(reason, f"TLS failed: {reason or exc}")


def is_refusal(exc: BaseException | None) -> bool:
    """Whether the server ended the handshake, so that nothing of a connection was read by it."""
    return isinstance(exc, ssl.SSLError) and _alert(_reason(exc)) in _REFUSALS


def _alert(reason: str) -> str:
    """The alert that OpenSSL tells of, as ``unknown ca``."""
    return reason.partition("ALERT_")[2].replace("_", " ").lower()
