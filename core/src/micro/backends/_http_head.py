"""The heads of HTTP/1.1 messages: what two readers could take differently is refused.

httptools (llhttp) is strict already; what it lets pass and nobody needs is refused here: other
versions and transfer codings, odd forms of a target, names given twice. Source: RFC 9112.
"""

from __future__ import annotations

import re

import httptools
import msgspec

from micro.errors import InvalidArgument, MicroError, TooLarge
from micro.transport import Limits

#: ``Head.length`` of a body in chunks, and of one that ends with its connection.
CHUNKED = -1
UNTIL_CLOSE = -2

_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]*")
_ABSOLUTE = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_PATH = re.compile(r"/|(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+/?")
_QUERY = re.compile(r"[!\"$-~]*")
#: Names that have one value; others may be given twice.
_ONCE = frozenset(
    {"content-encoding", "content-length", "content-type", "expect", "host", "timeout"}
)
_ONCE_PREFIXES = ("micro-", "x-micro-")
#: Header names as they are written, lowered once.
_LOWER = {
    name.encode(): name.lower()
    for name in (
        *("Host", "User-Agent", "Content-Length", "Content-Type", "Accept", "Timeout"),
        *("Micro-Endpoint", "Micro-Id", "Micro-Method", "Micro-Service", "Micro-Stream"),
    )
}


class Refused(Exception):
    """What a peer sent is not taken: ``error`` says why, ``status`` says it to plain HTTP."""

    def __init__(self, status: int, error: MicroError) -> None:
        super().__init__(error.detail)
        self.status = status
        self.error = error


class Head(msgspec.Struct, frozen=True):
    """What one head says; names are lower-case, and ``length`` is that of the body."""

    headers: dict[str, str]
    version: str
    length: int
    keep_alive: bool
    method: str = ""
    path: str = ""
    status: int = 0


def request_head(data: bytes, limits: Limits) -> Head:
    """The head of a request, with the empty line that ends it.

    Raises:
        Refused: it is none, or one that two readers could take differently.
    """
    seen = _Seen()
    parser = httptools.HttpRequestParser(seen)
    _feed(parser, data)
    version, method = parser.get_http_version(), parser.get_method()
    if version not in ("1.0", "1.1") or not data.startswith(b"%b %b HTTP/" % (method, seen.url)):
        raise bad_request("not an HTTP request of version 1.1 or 1.0")
    headers = seen.headers(limits)
    host = headers.get("host")
    if host is None and version == "1.1":
        raise bad_request("the header Host is missing")
    return Head(
        headers,
        version,
        _length(headers, version) or 0,
        _keep_alive(headers, version),
        method=method.decode("ascii"),
        path=_path(seen.url.decode("ascii", "replace"), host or ""),
    )


def response_head(data: bytes, limits: Limits) -> Head:
    """The head of a response, with the empty line that ends it.

    Raises:
        Refused: it is none.
    """
    seen = _Seen()
    parser = httptools.HttpResponseParser(seen)
    _feed(parser, data)
    version, status = parser.get_http_version(), parser.get_status_code()
    if version not in ("1.0", "1.1"):
        raise bad_request("not an HTTP response of version 1.1 or 1.0")
    headers = seen.headers(limits)
    length = _length(headers, version)
    if status < 200 or status in (204, 304):
        length = 0
    return Head(
        headers,
        version,
        UNTIL_CLOSE if length is None else length,
        length is not None and _keep_alive(headers, version),
        status=status,
    )


def bad_request(text: str) -> Refused:
    return Refused(400, InvalidArgument(text[:200]))


def too_large(limits: Limits) -> Refused:
    return Refused(413, TooLarge(f"the message is over {limits.message} bytes"))


def too_many_headers(limits: Limits) -> Refused:
    text = f"the headers are over {limits.headers} bytes or {limits.fields} fields"
    return Refused(431, TooLarge(text))


class _Seen:
    """What httptools reports of a head; it finds these methods by their names."""

    def __init__(self) -> None:
        self.url = b""
        self._fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def headers(self, limits: Limits) -> dict[str, str]:
        if len(self._fields) > limits.fields:
            raise too_many_headers(limits)
        headers: dict[str, str] = {}
        for name, value in self._fields:
            key = _LOWER.get(name) or name.decode("ascii").lower()
            try:
                text = value.decode().strip(" \t")
            except UnicodeDecodeError:
                raise bad_request(f"header {key} is not UTF-8") from None
            if key in headers:
                if key in _ONCE or key.startswith(_ONCE_PREFIXES):
                    raise bad_request(f"header {key} is given twice")
                text = f"{headers[key]}, {text}"
            headers[key] = text
        return headers


def _feed(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, data: bytes) -> None:
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer, which nobody has to take
    except httptools.HttpParserError as exc:
        raise bad_request(f"not HTTP: {exc}") from None


def _length(headers: dict[str, str], version: str) -> int | None:
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is None:
        return None if length is None else int(length)
    if coding.lower() != "chunked" or version == "1.0" or length is not None:
        text = f"Transfer-Encoding {coding[:40]!r}: chunked alone, without Content-Length"
        raise bad_request(text)
    return CHUNKED


def _keep_alive(headers: dict[str, str], version: str) -> bool:
    said = headers.get("connection", "").lower().replace(" ", "").split(",")
    return "keep-alive" in said if version == "1.0" else "close" not in said


def _path(target: str, host: str) -> str:
    """The path of a request's target, which may also be a whole URL of the same host."""
    if not _HOST.fullmatch(host):
        raise bad_request(f"header Host {host[:80]!r} is not a host and a port")
    if target == "/":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        if absolute[1].lower() != host.lower():
            raise bad_request(f"the URL is not of the host in Host, {host[:80]!r}")
        target = absolute[2] or "/"
    path, _, query = target.partition("?")
    if not _PATH.fullmatch(path) or not _QUERY.fullmatch(query):
        raise bad_request(f"path {path[:80]!r}: / and plain names, without %, // or anything odd")
    if not {".", ".."}.isdisjoint(path.split("/")):
        raise bad_request(f"path {path[:80]!r} has . or .. in it")
    return path
