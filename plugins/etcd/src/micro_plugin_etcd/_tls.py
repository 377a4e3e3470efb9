"""TLS as the options ask for it, and what is wrong with it: gRPC only says "unavailable"."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from micro.access import PLAIN, SPOKEN, load_tls, read_file, tls_fault
from micro_plugin_etcd._options import EtcdOptions

#: Seconds for each step of looking at a server that cannot be reached.
_LOOK = 1.0
_FILES = ("ca", "cert", "key")
#: The frame of HTTP/2 that either side begins with. Source: RFC 9113, sections 3.4, 4.1 and 6.5.
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"


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
    name = f"{source}: etcd"
    context = load_tls(options, name)
    if context is None:
        return None
    ca, cert, key = (read_file(what, getattr(options, what), name) for what in _FILES)
    authorities = ca or _authorities()
    if ca is None and authorities:  # both look at the same, whatever the names of the files
        with suppress(ssl.SSLError):
            context.load_verify_locations(cadata=authorities.decode("ascii", "ignore"))
    context.set_alpn_protocols(["h2"])
    return TLS(authorities, cert, key, context)


async def fault(host: str, port: int, tls: TLS | None) -> str:
    """What is wrong with the TLS of a server, and what to do; empty when it is not TLS."""
    if tls is None:
        return await _asked_for_none(host, port)
    try:
        await _handshake(host, port, tls.context)
    except ssl.SSLError as exc:
        return tls_fault(exc)
    except TimeoutError:
        pass
    except OSError:
        return PLAIN if await _speaks_plainly(host, port) else ""
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
    return SPOKEN


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


def _authorities() -> bytes | None:
    """The system's, which are in one file or in a folder; gRPC would take a list of its own."""
    paths = ssl.get_default_verify_paths()
    files = [Path(paths.cafile)] if paths.cafile else Path(paths.capath or "none").glob("*.[0-9]")
    return b"\n".join(path.read_bytes() for path in files if path.is_file()) or None
