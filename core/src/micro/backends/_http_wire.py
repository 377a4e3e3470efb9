"""HTTP messages, Go Micro's and plain: requests to calls, replies and errors to bytes.

Nothing here does I/O. Source of Go's form: transport/http_transport.go and server/rpc_codec.go of
Go Micro, and messages captured from its v2, v3, v4 and v5.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from micro.call import Body, Call, Reply, decode_error, encode_error, reserved
from micro.errors import (
    InvalidArgument,
    MicroError,
    Unavailable,
    Unimplemented,
    UnsupportedContentType,
)

JSON = "application/json"
#: What no Content-Type means to Go Micro.
PROTOBUF = "application/protobuf"
_FORM = "application/x-www-form-urlencoded"
_PATH = re.compile(r"/([A-Za-z_]\w*)/([A-Za-z_]\w*)", re.ASCII)
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    499: "Client Closed Request",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
#: The headers of a Go Micro request that its answer repeats, as Go writes them.
_ECHOED = {
    "micro-endpoint": "Micro-Endpoint",
    "micro-id": "Micro-Id",
    "micro-method": "Micro-Method",
    "micro-service": "Micro-Service",
}
_ENDPOINT = ("micro-endpoint", "x-micro-endpoint", "micro-method", "x-micro-method")
#: Header names as clients write them, lowered once.
_LOWER = {
    name.encode(): name.lower()
    for name in (
        *_ECHOED.values(),
        *("Host", "User-Agent", "Content-Length", "Content-Type", "Accept", "Timeout"),
    )
}
#: Longest deadline that a caller can ask for, in seconds.
_MAX_DEADLINE = 300.0


def lower(name: bytes) -> str:
    """A header's name, as metadata has it."""
    return _LOWER.get(name) or name.decode("ascii").lower()


class Refused(Exception):
    """A request that ends with this status before any handler."""

    def __init__(self, status: int, error: MicroError) -> None:
        super().__init__(error.detail)
        self.status = status
        self.error = error


class Request:
    """A request as it comes in; then what its answer needs to know of it."""

    __slots__ = ("body", "headers", "keep_alive", "method", "size", "url")

    def __init__(self) -> None:
        self.url = b""
        self.method = ""
        self.headers: dict[str, str] = {}
        self.body: bytes | bytearray = b""
        self.size = 0
        self.keep_alive = True

    @property
    def is_go(self) -> bool:
        """Whether it is one of Go Micro's: it has a header that only those have."""
        headers = self.headers
        return (
            "micro-endpoint" in headers
            or "micro-service" in headers
            or any(name in headers for name in _ENDPOINT)
        )


# -- a server: requests to calls ---------------------------------------------------------------


def call_of(request: Request, peer: str) -> Call:
    """The call that a request is.

    Raises:
        Refused: a plain request that names no endpoint, or in a way that is not taken.
        MicroError: a request of Go Micro's that is no unary call.
    """
    if request.is_go:
        return _go_call(request, peer)
    return _plain_call(request, peer)


def _go_call(request: Request, peer: str) -> Call:
    headers = request.headers
    if "micro-topic" in headers or "x-micro-topic" in headers:
        raise Unimplemented("messages of a topic are not taken at this port")
    if "micro-stream" in headers or "x-micro-stream" in headers:
        raise Unimplemented("streams are not supported yet by this version; call unary endpoints")
    endpoint = next((headers[name] for name in _ENDPOINT if name in headers), "")
    if endpoint.count(".") != 1 or request.method != "POST":
        raise InvalidArgument(
            f"rpc: service/endpoint request ill-formed: {endpoint[:80]!r}; "
            "write POST / with Micro-Endpoint: Handler.Method"
        )
    return _call(headers, endpoint, headers.get("content-type", PROTOBUF), peer)


def _plain_call(request: Request, peer: str) -> Call:
    path = request.url.decode("ascii", "replace").partition("?")[0]
    if path in ("/livez", "/readyz") and request.method in ("GET", "HEAD"):
        return Call(service="", endpoint=path, peer=peer)
    match = _PATH.fullmatch(path)
    if match is None:
        text = (
            f"path {path[:80]!r} names no endpoint; send POST /Handler/Method with a JSON body, "
            "or a Go Micro call with the header Micro-Endpoint"
        )
        raise Refused(404, InvalidArgument(text))
    if request.method != "POST":
        raise Refused(405, InvalidArgument(f"{request.method} {path}: send it with POST"))
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() in ("", _FORM):
        if "origin" in request.headers:
            raise Refused(415, UnsupportedContentType("a web page must send application/json"))
        content_type = JSON
    return _call(request.headers, f"{match[1]}.{match[2]}", content_type, peer)


def _call(headers: Mapping[str, str], endpoint: str, content_type: str, peer: str) -> Call:
    return Call(
        service=headers.get("micro-service", ""),
        endpoint=endpoint,
        content_type=content_type,
        metadata={name: text for name, text in headers.items() if not reserved(name)},
        deadline=_deadline(headers.get("timeout")),
        id=headers.get("micro-id", ""),
        peer=peer,
    )


def _deadline(timeout: str | None) -> float | None:
    """The moment that a Timeout header means; it is in nanoseconds."""
    if timeout is None:
        return None
    if not timeout.isascii() or not timeout.isdigit() or len(timeout) > 19:
        raise InvalidArgument(f"header Timeout {timeout[:40]!r}: write decimal nanoseconds")
    return time.monotonic() + min(int(timeout) / 1e9, _MAX_DEADLINE)


# -- a server: replies and errors to bytes -----------------------------------------------------


def reply_bytes(request: Request, call: Call, reply: Reply) -> bytes:
    """The response that carries ``reply``."""
    plain_json = not request.is_go and call.content_type.startswith(JSON)
    body = reply.body + b"\n" if plain_json else reply.body
    return _response(request, 200, body, call.content_type, _lines(reply.metadata))


def error_bytes(request: Request, error: MicroError | Refused) -> bytes:
    """The response that tells of ``error``: to Go in a header, else as a status and JSON."""
    inner = error.error if isinstance(error, Refused) else error
    text = encode_error(inner, id=request.headers.get("micro-service", ""))
    if request.is_go:
        content_type = request.headers.get("content-type", JSON)
        lines = f"Micro-Error: {text}\r\nX-Micro-Error: {text}\r\n"
        return _response(request, 200, b"", content_type, lines)
    return _response(request, error.status, text.encode() + b"\n", JSON, "")


def _response(request: Request, status: int, body: Body, content_type: str, lines: str) -> bytes:
    headers = request.headers
    echoed = [f"{_ECHOED[name]}: {headers[name]}\r\n" for name in _ECHOED if name in headers]
    close = "" if request.keep_alive else "Connection: close\r\n"
    head = (
        f"HTTP/1.1 {status} {_PHRASES.get(status, 'Error')}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"{''.join(echoed)}{lines}{close}\r\n"
    )
    return head.encode() + (b"" if request.method == "HEAD" else body)


def _lines(metadata: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in metadata.items()])


# -- a client ----------------------------------------------------------------------------------


def request_bytes(call: Call, body: Body, host: str) -> bytes:
    """The request that carries ``call``, with the headers that a Go client sends."""
    timeout = ""
    if call.deadline is not None:
        left = max(call.deadline - time.monotonic(), 0.0)
        timeout = f"Timeout: {int(left * 1e9)}\r\n"
    head = (
        f"POST / HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Accept: {call.content_type}\r\n"
        f"Content-Type: {call.content_type}\r\n"
        f"Micro-Endpoint: {call.endpoint}\r\n"
        f"Micro-Id: {call.id}\r\n"
        f"Micro-Method: {call.endpoint}\r\n"
        f"Micro-Service: {call.service}\r\n"
        f"{timeout}{_lines(call.metadata)}\r\n"
    )
    return head.encode() + body


def reply_of(status: int, headers: Mapping[str, str], body: Body) -> Reply | MicroError:
    """What a response says: a reply, or an error in one of the ways in which servers tell it."""
    text = headers.get("micro-error")
    if text:
        return decode_error(text)
    if status != 200:
        error = decode_error(body.decode("utf-8", "replace"))
        return error if error.id or error.detail else Unavailable(f"status {status}")
    if body.startswith(b"unsupported Content-Type"):
        return UnsupportedContentType(body.decode("utf-8", "replace")[:200], remote=True)
    metadata = {name: value for name, value in headers.items() if not reserved(name)}
    return Reply(body=body, metadata=metadata)
