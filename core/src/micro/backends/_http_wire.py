"""HTTP messages, Go Micro's and plain: requests to calls, replies and errors to bytes, and back.

Nothing here does I/O. Source of Go's form: transport/http_transport.go, server/rpc_codec.go and
client/rpc_codec.go of Go Micro, and messages captured from its v2, v3, v4 and v5.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from functools import lru_cache

from micro.backends._http_head import Head, Refused, request_head, response_head
from micro.backends._http_reader import Numbers
from micro.call import Call, checked_metadata, decode_error, encode_error, reserved
from micro.errors import (
    Internal,
    InvalidArgument,
    MicroError,
    Unavailable,
    Unimplemented,
    UnsupportedContentType,
)
from micro.transport import Limits

JSON = "application/json"
#: What no Content-Type means to Go Micro.
PROTOBUF = "application/protobuf"
#: The error that is the end of a stream.
EOS = "EOS"
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
#: The headers of a Go Micro request that its answer repeats, beside Micro-Id.
_ECHOED = {
    name.lower(): name
    for name in ("Micro-Endpoint", "Micro-Method", "Micro-Service", "Micro-Stream")
}
_ENDPOINT = ("micro-endpoint", "x-micro-endpoint", "micro-method", "x-micro-method")
_TOPIC = ("micro-topic", "x-micro-topic")
#: What only Go Micro's requests have.
_GO = frozenset((*_ENDPOINT, *_TOPIC, "micro-service", "x-micro-service", "micro-stream"))
#: Reserved names that most messages have.
_ALWAYS_RESERVED = frozenset(
    {"accept", "content-length", "content-type", "host", "timeout", "micro-id", *_ECHOED}
)
_ODD = re.compile(r"[\x00-\x1f\x7f]")
_CONTINUE = "100-continue"
_CLOSE = b"Connection: close\r\n"
#: Longest deadline that a caller can ask for, in seconds.
_MAX_DEADLINE = 300.0


# -- a server ----------------------------------------------------------------------------------


class Request:
    """What a request's head asks for, and how it is answered; the same for all with that head.

    ``refusal`` is why it is no call. ``stream`` is the id of the stream that it belongs to, and
    ``told`` the error, or the end, that its caller tells on it.
    """

    __slots__ = (
        "_answer",
        "_connection",
        "_content_type",
        "_headless",
        "_metadata",
        "_plain_json",
        "endpoint",
        "expects",
        "is_go",
        "keep_alive",
        "length",
        "numbers",
        "refusal",
        "service",
        "stream",
        "told",
    )

    def __init__(self, head: Head) -> None:
        headers = head.headers
        number, timeout = headers.get("micro-id", ""), headers.get("timeout", "")
        self.length = head.length
        self.numbers: Numbers = (head.length, number.encode(), timeout.encode())
        self.keep_alive = head.keep_alive
        self.expects = head.version == "1.1" and headers.get("expect", "").lower() == _CONTINUE
        self.is_go = not _GO.isdisjoint(headers)
        self.service = headers.get("micro-service", "")
        self.stream = headers.get("micro-stream")
        self.told = headers.get("micro-error", "")
        self.refusal: Refused | MicroError | None = None
        self.endpoint, self._content_type = "", headers.get("content-type", JSON)
        try:
            _check_encoding(headers)
            target = _go_target if self.is_go else _plain_target
            self.endpoint, self._content_type = target(head)
        except (Refused, MicroError) as exc:
            self.refusal = exc
        self._metadata = _metadata(headers)
        self._headless = head.method == "HEAD"
        self._plain_json = not self.is_go and self._content_type.startswith(JSON)
        self._connection = _connection(head)
        self._answer = _status_line(200, self._content_type) + _lines(
            {_ECHOED[name]: headers[name] for name in _ECHOED if name in headers}
        )

    def call(self, numbers: Numbers, peer: str) -> Call:
        """The call that it is.

        Raises:
            InvalidArgument: its Timeout is no number of nanoseconds.
        """
        _, number, timeout = numbers
        return Call(
            service=self.service,
            endpoint=self.endpoint,
            content_type=self._content_type,
            metadata=self._metadata.copy(),
            deadline=_deadline(timeout) if timeout else None,
            id=number.decode(),
            peer=peer,
        )

    def reply(
        self, body: bytes, metadata: Mapping[str, str], number: bytes, *, last: bool = False
    ) -> bytes:
        """The response that carries a reply; ``last``: of its connection."""
        lines = _CLOSE if last else self._connection
        if metadata:
            lines += metadata_lines(metadata)
        if self._plain_json:
            body += b"\n"
        head = _head(self._answer, lines, len(body), number)
        return head if self._headless else head + body

    def error(self, error: Refused | MicroError, number: bytes, *, last: bool = False) -> bytes:
        """The response that tells of ``error``: to Go in a header, else as a status and JSON."""
        inner = error.error if isinstance(error, Refused) else error
        text = encode_error(inner, id=self.service)
        lines = _CLOSE if last else self._connection
        if self.is_go:
            return _head(self._answer, lines + _told(text), 0, number)
        if inner.retry_after:
            lines += b"Retry-After: %d\r\n" % math.ceil(inner.retry_after)
        body = text.encode() + b"\n"
        head = _head(_status_line(error.status, JSON), lines, len(body), number)
        return head if self._headless else head + body

    def end(self, trailer: Mapping[str, str], number: bytes) -> bytes:
        """The response that ends a stream."""
        return _head(self._answer, metadata_lines(trailer) + _told(EOS), 0, number)


def read_request(data: bytes, limits: Limits) -> Request:
    """The request with this head.

    Raises:
        Refused: it is none.
    """
    return Request(request_head(data, limits))


def refusal(error: Refused) -> bytes:
    """The response to what is no request."""
    body = encode_error(error.error, id="").encode() + b"\n"
    return _head(_status_line(error.status, JSON), _CLOSE, len(body), b"") + body


def _head(beginning: bytes, lines: bytes, length: int, number: bytes) -> bytes:
    # Numbers come last: a reader that knows the rest from the last time need not parse it.
    if number:
        form = b"%b%bContent-Length: %d\r\nMicro-Id: %b\r\n\r\n"
        return form % (beginning, lines, length, number)
    return b"%b%bContent-Length: %d\r\n\r\n" % (beginning, lines, length)


def _status_line(status: int, content_type: str) -> bytes:
    phrase = _PHRASES.get(status, "Error")
    return f"HTTP/1.1 {status} {phrase}\r\nContent-Type: {content_type}\r\n".encode()


def _told(text: str) -> bytes:
    return f"Micro-Error: {text}\r\nX-Micro-Error: {text}\r\n".encode()


def _connection(head: Head) -> bytes:
    if not head.keep_alive:
        return _CLOSE
    return b"Connection: keep-alive\r\n" if head.version == "1.0" else b""


def _check_encoding(headers: Mapping[str, str]) -> None:
    encoding = headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        text = f"Content-Encoding {encoding[:40]!r}: bodies are taken as they are, not compressed"
        raise UnsupportedContentType(text)


def _go_target(head: Head) -> tuple[str, str]:
    """Endpoint and content type of one of Go Micro's requests."""
    headers = head.headers
    if not headers.keys().isdisjoint(_TOPIC):
        raise Unimplemented("messages of a topic are not taken at this port")
    endpoint = next((headers[name] for name in _ENDPOINT if name in headers), "")
    if endpoint.count(".") != 1 or head.method != "POST":
        raise InvalidArgument(
            f"rpc: service/endpoint request ill-formed: {endpoint[:80]!r}; "
            "write POST / with Micro-Endpoint: Handler.Method"
        )
    return endpoint, headers.get("content-type", PROTOBUF)


def _plain_target(head: Head) -> tuple[str, str]:
    """Endpoint and content type of a plain request.

    Raises:
        Refused: it names no endpoint, or in a way that is not taken.
    """
    if head.path in ("/livez", "/readyz") and head.method in ("GET", "HEAD"):
        return head.path, JSON
    match = _PATH.fullmatch(head.path)
    if match is None:
        text = (
            f"path {head.path[:80]!r} names no endpoint; send POST /Handler/Method with a JSON "
            "body, or a Go Micro call with the header Micro-Endpoint"
        )
        raise Refused(404, InvalidArgument(text))
    if head.method != "POST":
        raise Refused(405, InvalidArgument(f"{head.method} {head.path}: send it with POST"))
    content_type = head.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() in ("", _FORM):
        if "origin" in head.headers:
            raise UnsupportedContentType("a web page must send application/json")
        content_type = JSON
    return f"{match[1]}.{match[2]}", content_type


def _deadline(timeout: bytes) -> float:
    """The moment that a Timeout header means; it is in nanoseconds."""
    if not timeout.isdigit() or len(timeout) > 19:
        shown = timeout[:40].decode("ascii", "replace")
        raise InvalidArgument(f"header Timeout {shown!r}: write decimal nanoseconds")
    seconds = int(timeout) * 1e-9
    if seconds > _MAX_DEADLINE:  # noqa: PLR1730 - every call: a fifth of the time of min()
        seconds = _MAX_DEADLINE
    return time.monotonic() + seconds


# -- a client ----------------------------------------------------------------------------------


def request_beginning(host: str, service: str, endpoint: str, content_type: str) -> bytes:
    """What all requests to an endpoint begin with: the headers that a Go client sends.

    Raises:
        InvalidArgument: a name that cannot stand in a header.
    """
    if _ODD.search(service + endpoint + content_type):
        raise InvalidArgument(f"{service[:80]!r} {endpoint[:80]!r}: a control character in a name")
    return (
        f"POST / HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        f"Accept: {content_type}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Micro-Endpoint: {endpoint}\r\n"
        f"Micro-Method: {endpoint}\r\n"
        f"Micro-Service: {service}\r\n"
    ).encode()


def request_ending(call: Call, number: bytes) -> bytes:
    """What follows Content-Length in the head of a request: its own number and its time."""
    if call.deadline is None:
        return b"Micro-Id: %b\r\n\r\n" % number
    left = int((call.deadline - time.monotonic()) * 1e9)
    return b"Micro-Id: %b\r\nTimeout: %d\r\n\r\n" % (number, max(left, 0))


def request_bytes(beginning: bytes, ending: bytes, body: bytes) -> bytes:
    return b"%bContent-Length: %d\r\n%b%b" % (beginning, len(body), ending, body)


def metadata_lines(metadata: Mapping[str, str]) -> bytes:
    """Metadata as lines of a head.

    Raises:
        InvalidArgument: it cannot travel, or a name belongs to the protocol.
        TooLarge: a value is over 8 KiB.
    """
    return _checked_lines(tuple(metadata.items()))


@lru_cache(maxsize=256)
def _checked_lines(items: tuple[tuple[str, str], ...]) -> bytes:
    """Callers repeat themselves, so what was checked is remembered."""
    return _lines(checked_metadata(dict(items)))


class Answer:
    """What a response's head says; the same for all with that head.

    ``is_go``: a server of Go Micro wrote it, which repeats the headers of a request. ``told`` is
    its error, or the end of a stream. If it ``is_reply``, it has no error to look for.
    """

    __slots__ = (
        "_encoding",
        "is_go",
        "is_reply",
        "keep_alive",
        "length",
        "metadata",
        "numbers",
        "status",
        "told",
    )

    def __init__(self, head: Head) -> None:
        headers = head.headers
        self.length = head.length
        self.numbers: Numbers = (head.length, headers.get("micro-id", "").encode(), b"")
        self.keep_alive = head.keep_alive
        self.status = head.status
        self.is_go = "accept" in headers
        self.told = headers.get("micro-error", "")
        self.metadata = _metadata(headers)
        self._encoding = headers.get("content-encoding", "identity").lower()
        is_text = headers.get("content-type", "").startswith("text/plain")
        plain = self._encoding == "identity" and not is_text
        self.is_reply = plain and self.status == 200 and not self.told

    def error(self, body: bytes) -> MicroError | None:
        """The error that it tells, in one of the ways in which servers do; None: a reply."""
        if self.told:
            return decode_error(self.told)
        if self._encoding != "identity":
            return Internal(f"the reply is encoded as {self._encoding[:40]!r}, unasked")
        if self.status != 200:
            error = decode_error(body.decode("utf-8", "replace"))
            return error if error.id or error.detail else Unavailable(f"status {self.status}")
        if body.startswith(b"unsupported Content-Type"):
            return UnsupportedContentType(body.decode("utf-8", "replace")[:200], remote=True)
        return None


def read_answer(data: bytes, limits: Limits) -> Answer:
    """The answer with this head.

    Raises:
        Refused: it is none.
    """
    return Answer(response_head(data, limits))


def _metadata(headers: Mapping[str, str]) -> dict[str, str]:
    return {
        name: text
        for name, text in headers.items()
        if name not in _ALWAYS_RESERVED and not reserved(name)
    }


def _lines(metadata: Mapping[str, str]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in metadata.items()]).encode()
