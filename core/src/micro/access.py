"""What leads backends to their servers: the options for TLS and time, mistakes of TLS, hosts."""

from __future__ import annotations

import re
import ssl
from pathlib import Path

import msgspec

from micro.errors import ConfigError

#: What a server without TLS is, to who asks for it.
PLAIN = "the server does not speak TLS; leave tls, ca, cert and key away"
#: What a server with TLS is, to who does not.
SPOKEN = "the server speaks TLS; add ?tls=true, and ca=FILE when its authority is your own"

#: What helps where the server wants to know who we are.
CERTIFICATE = "name a client certificate with cert= key="

#: The reasons of OpenSSL for which the other side does not speak TLS.
NO_TLS: frozenset[str] = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})

_PORT = re.compile("[0-9]{1,5}")

#: What helps by OpenSSL's X509_V_ERR_..., where no authority does.
_ADVICE = {
    9: "the clocks of the hosts differ",
    10: "renew it",
    62: "use a host that it names",
    64: "use a host that it names",
}


class ServerOptions(msgspec.Struct, frozen=True):
    """The options of a backend's URL that lead to a server.

    ``timeout`` bounds each call, in seconds, over all hosts together. ``tls`` turns TLS on, as do
    the files: ``ca`` holds the authorities to trust instead of the system's, ``cert`` and ``key``
    are the client's own, all PEM.
    """

    timeout: float = 5.0
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""

    @property
    def wants_tls(self) -> bool:
        return self.tls or bool(self.ca or self.cert or self.key)


def load_tls(options: ServerOptions, name: str) -> ssl.SSLContext | None:
    """What to speak TLS with; None when the options do not ask for it. It reads files.

    ``name`` is what errors begin with: where the URL came from, and the backend.

    Raises:
        ConfigError: a file cannot be used; the text names the option.
    """
    if not options.wants_tls:
        return None
    if bool(options.cert) != bool(options.key):
        given, missing = ("cert", "key") if options.cert else ("key", "cert")
        raise ConfigError(f"{name}: option {given!r} needs option {missing!r} beside it")
    for option in ("ca", "cert", "key"):
        read_file(option, getattr(options, option), name)
    try:
        context = ssl.create_default_context(cafile=options.ca or None)
    except ssl.SSLError as exc:
        raise ConfigError(f"{name}: option 'ca': no certificates in PEM: {exc}") from exc
    try:
        if options.cert:
            context.load_cert_chain(options.cert, options.key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as exc:
        text = f"{name}: options 'cert' and 'key': not a certificate and its key in PEM"
        raise ConfigError(f"{text}: {exc}") from exc
    return context


def read_file(option: str, path: str, name: str) -> bytes | None:
    """What the file of an option holds; None where the option is empty.

    Raises:
        ConfigError: it cannot be read; the text names the option, after ``name``.
    """
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        text = f"{name}: option {option!r}: cannot read {path}: {exc.strerror}"
        raise ConfigError(text) from exc


def tls_fault(error: BaseException | None) -> str:
    """What of TLS is wrong when a connection failed so, and what to do; empty when it is not TLS.

    Also of an error that an SSLError is the cause of.
    """
    # Some libraries have kinds of SSLError of their own, without what OpenSSL says.
    while not (isinstance(error, ssl.SSLError) and hasattr(error, "reason")):
        if error is None:
            return ""
        error = error.__cause__ or error.__context__
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is {untrusted(error, 'ca=')}"
    if error.reason in NO_TLS:
        return PLAIN
    return f"the server refuses our TLS: {error.reason}; {CERTIFICATE}"


def untrusted(error: ssl.SSLCertVerificationError, option: str) -> str:
    """Why a certificate is not trusted, and what to do; ``option`` names authorities to trust."""
    advice = _ADVICE.get(error.verify_code, f"name its authority with {option}")
    return f"not trusted: {error.verify_message}; {advice}"


def split_host(host: str, port: int, name: str) -> tuple[str, int]:
    """Host and port of a URL's host, with ``port`` where it has none, and IPv6 in brackets.

    ``name`` is what the error begins with: where the URL came from, and the backend.

    >>> split_host("::1", 2379, "--registry: etcd")
    ('[::1]', 2379)

    Raises:
        ConfigError: it has a port that cannot be.
    """
    bare, colon, digits = host.rpartition(":")
    if not colon or host.endswith("]"):
        return host, port
    if ":" in bare and not bare.endswith("]"):
        return f"[{host}]", port
    if not (_PORT.fullmatch(digits) and 0 < int(digits) < 65536):
        raise ConfigError(f"{name}: the port of {host!r} is no number from 1 to 65535")
    return bare, int(digits)


def _no_passphrase() -> str:
    raise ValueError("the key is encrypted; give it without a passphrase")
