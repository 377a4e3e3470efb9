"""TLS as the options ask for it, and what is wrong with it: gRPC only says "unavailable"."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from micro.errors import ConfigError
from micro_plugin_etcd._options import EtcdOptions

#: Seconds for each step of looking at a server that cannot be reached.
_LOOK = 1.0
#: The frame of HTTP/2 that either side begins with. Source: RFC 9113, sections 3.4, 4.1 and 6.5.
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
_PLAIN = "the server does not speak TLS; leave tls, ca, cert and key away"
#: What helps by OpenSSL's X509_V_ERR_..., where no authority does.
_ADVICE = {
    9: "the clocks of the hosts differ",
    10: "renew it",
    62: "use a host that it names",
    64: "use a host that it names",
}


class TLS(NamedTuple):
    """PEM bytes for gRPC, and the same as a context of the standard library."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None
    context: ssl.SSLContext


def load(options: EtcdOptions, source: str) -> TLS | None:
    """What to speak TLS with; None when the options do not ask for it. It reads files.

    Raises:
        ConfigError: a file cannot be used; the text names the option and ``source``.
    """
    if not options.wants_tls:
        return None
    if bool(options.cert) != bool(options.key):
        given, missing = ("cert", "key") if options.cert else ("key", "cert")
        raise ConfigError(f"{source}: etcd: option {given!r} needs option {missing!r} beside it")
    ca = _read("ca", options.ca, source)
    cert, key = _read("cert", options.cert, source), _read("key", options.key, source)
    try:
        context = ssl.create_default_context(cafile=options.ca or None)
    except ssl.SSLError as exc:
        raise ConfigError(f"{source}: etcd: option 'ca': no certificates in PEM: {exc}") from exc
    authorities = ca or _authorities()
    if ca is None and authorities:  # both look at the same, whatever the names of the files
        with suppress(ssl.SSLError):
            context.load_verify_locations(cadata=authorities.decode("ascii", "ignore"))
    context.set_alpn_protocols(["h2"])
    try:
        if cert is not None:
            context.load_cert_chain(options.cert, options.key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as exc:
        text = f"{source}: etcd: options 'cert' and 'key': not a certificate and its key in PEM"
        raise ConfigError(f"{text}: {exc}") from exc
    return TLS(authorities, cert, key, context)


async def fault(host: str, port: int, tls: TLS | None) -> str:
    """What is wrong with the TLS of a server, and what to do; empty when it is not TLS."""
    if tls is None:
        return await _asked_for_none(host, port)
    try:
        await _handshake(host, port, tls.context)
    except ssl.SSLCertVerificationError as exc:
        advice = _ADVICE.get(exc.verify_code, "name its authority with ca=")
        return f"the server's certificate is not trusted: {exc.verify_message}; {advice}"
    except ssl.SSLError as exc:
        refused = f"the server refuses our TLS: {exc.reason}"
        is_plain = exc.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")
        return _PLAIN if is_plain else f"{refused}; name a client certificate with cert= key="
    except TimeoutError:
        pass
    except OSError:
        return _PLAIN if await _speaks_plainly(host, port) else ""
    return ""


async def _asked_for_none(host: str, port: int) -> str:
    anything = ssl.create_default_context()
    anything.check_hostname = False
    anything.verify_mode = ssl.CERT_NONE  # nothing is sent: it asks whether TLS is spoken
    try:
        await _handshake(host, port, anything)
    except ssl.SSLError as exc:
        if not (exc.reason or "").startswith(("TLSV1", "SSLV3", "TLSV13")):
            return ""
    except (OSError, TimeoutError):
        return ""
    return "the server speaks TLS; add ?tls=true, and ca=FILE when its authority is your own"


async def _speaks_plainly(host: str, port: int) -> bool:
    """Whether a server takes HTTP/2 as it is; etcd ends a connection that begins otherwise."""
    try:
        async with asyncio.timeout(_LOOK):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
                return (await reader.readexactly(len(_SETTINGS)))[3] == _SETTINGS[3]
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


async def _handshake(host: str, port: int, context: ssl.SSLContext) -> None:
    """Shake hands, and wait for the first byte: a client certificate is refused after that."""
    async with asyncio.timeout(_LOOK):
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        async with asyncio.timeout(_LOOK):
            await reader.read(1)
    except TimeoutError:
        return
    finally:
        writer.transport.abort()


def _read(option: str, path: str, source: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"{source}: etcd: option {option!r}: cannot read {path}: {exc.strerror}"
        ) from exc


def _authorities() -> bytes | None:
    """The system's, which are in one file or in a folder; gRPC would take a list of its own."""
    paths = ssl.get_default_verify_paths()
    files = [Path(paths.cafile)] if paths.cafile else Path(paths.capath or "none").glob("*.[0-9]")
    return b"\n".join(path.read_bytes() for path in files if path.is_file()) or None


def _no_passphrase() -> str:
    raise ValueError("the key is encrypted; give it without a passphrase")
