"""How ``micro register`` finds out whether a program is well: a connection, or a request to it."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple, TypeAlias
from urllib.parse import urlsplit

from micro.access import NO_TLS, untrusted
from micro.errors import ConfigError
from micro.transport import UNIX, split_address

#: Asks a program once, and returns if it is well. Raises Ill, or an OSError, if it is not.
Probe: TypeAlias = Callable[[], Awaitable[None]]

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")
#: Most bytes of the head of an answer.
_HEAD = 64 * 1024
# A path, or a URL without a login: nothing of one is sent, and it would be shown.
_PAGE = re.compile(r"(?:/|https?://(?:(?![/?#@])[!-~])+(?=[/?#]|$))[!-~]*", re.IGNORECASE)
_WRITTEN_AS = "write tcp, none, /path, or http://host:port/path"


class Ill(Exception):
    """The program does not answer as it should; the text says how."""


class _Page(NamedTuple):
    """Where to send which request."""

    address: str
    tls: ssl.SSLContext | None
    request: bytes


def probe_of(text: str, address: str, authorities: str = "") -> Probe | None:
    """The check that ``text`` asks for, of the program at ``address``; None for no check.

    ``authorities`` is the file that SSL_CERT_FILE names, if any.

    Raises:
        ConfigError: it is none; the text says what is. Or it needs the file, which cannot be used.
    """
    if text == "none":
        return None
    if text == "tcp":
        return partial(_connect, address)
    return partial(_get, _page(text, address, authorities))


def _page(text: str, address: str, authorities: str) -> _Page:
    if not _PAGE.fullmatch(text):
        raise ConfigError(f"--check: {text!r}: {_WRITTEN_AS}")
    own = text.startswith("/")
    host = "localhost" if address.startswith(UNIX) else address
    given = urlsplit(f"http://{host}{text}" if own else text)
    try:
        port = given.port or (443 if given.scheme == "https" else 80)
    except ValueError as exc:
        raise ConfigError(f"--check: {text!r}: {exc}; {_WRITTEN_AS}") from None
    path = (given.path or "/") + (f"?{given.query}" if given.query else "")
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {given.netloc}\r\nUser-Agent: micro-register\r\n"
        "Accept: */*\r\nConnection: close\r\n\r\n"
    )
    tls = _trusting(authorities) if given.scheme == "https" else None
    return _Page(address if own else f"{given.hostname}:{port}", tls, request.encode())


def _trusting(authorities: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    try:  # OpenSSL passes over a file that it cannot use
        if authorities:
            context.load_verify_locations(authorities)
    except ssl.SSLError as exc:
        raise ConfigError(f"SSL_CERT_FILE={authorities}: no certificates in PEM: {exc}") from None
    except OSError as exc:
        raise ConfigError(f"SSL_CERT_FILE={authorities}: {exc.strerror}") from None
    return context


async def _connect(address: str) -> None:
    _, writer = await _opened(address)
    await _closed(writer)


async def _get(page: _Page) -> None:
    """Ask for a page, and read the head of the answer."""
    try:
        status = await _answered(page)
    except ssl.SSLError as exc:
        raise Ill(_fault(exc)) from None
    if status >= 300:
        more = "; write where that leads to" if status < 400 else ""
        raise Ill(f"status {status}{more}")


async def _answered(page: _Page) -> int:
    reader, writer = await _opened(page.address, page.tls)
    try:
        writer.write(page.request)
        status = 100
        while status < 200:  # what comes before the answer
            status = await _status(reader)
        return status
    finally:
        await _closed(writer)


def _fault(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is {untrusted(error, 'SSL_CERT_FILE=FILE')}"
    if error.reason in NO_TLS:
        return "it does not speak TLS; write http://"
    return f"it refuses our TLS: {error.reason}; a check shows no certificate: write tcp"


async def _status(reader: asyncio.StreamReader) -> int:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as exc:
        raise Ill("it hung up before it answered" if not exc.partial else "no HTTP") from None
    except asyncio.LimitOverrunError:
        raise Ill(f"no HTTP, or a head of more than {_HEAD} bytes") from None
    line = _STATUS.match(head)
    if line is None:
        raise Ill("no HTTP")
    return int(line[1])


async def _opened(
    address: str, tls: ssl.SSLContext | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = split_address(address)
    if port < 0:
        return await asyncio.open_unix_connection(host, limit=_HEAD)
    return await asyncio.open_connection(host, port, ssl=tls, limit=_HEAD)


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    writer.transport.abort()  # with TLS it would wait until the other side has said goodbye too
    with suppress(OSError):
        await writer.wait_closed()
