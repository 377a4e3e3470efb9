"""What client, server and transports share: a call, its reply, its context, errors on the wire."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from micro.errors import (
    BY_NAME,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    EndpointNotFound,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MicroError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
    UnsupportedContentType,
)

if TYPE_CHECKING:
    from micro.selector import Selector

#: What a transport moves: one encoded message, or a stream of them.
Body: TypeAlias = bytes | AsyncIterator[bytes]
#: Which sides of a call are streams: neither, the server's, the client's, or both.
Kind: TypeAlias = Literal["unary", "server", "client", "bidi"]


class Call(msgspec.Struct, kw_only=True, gc=False):  # it holds nothing that could hold it
    """One request as it travels.

    ``endpoint`` is ``Handler.Method``; ``metadata`` has lower-case names; ``deadline`` is a moment
    of ``time.monotonic()``; with ``idempotent`` it may be executed twice without harm. ``id``,
    ``peer`` (the caller's address) and ``identity`` (whom its certificate says that the caller is)
    are known on the server; ``reply_metadata`` is what its handler wants to go with the reply. On a
    client ``address`` is the node's, where its caller chose it, and ``selector`` the Selector of
    its caller.
    """

    service: str
    endpoint: str
    kind: Kind = "unary"
    content_type: str = "application/json"
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    deadline: float | None = None
    idempotent: bool = False
    id: str = ""
    peer: str = ""
    identity: str = ""
    address: str = ""
    reply_metadata: dict[str, str] | None = None
    selector: Selector | None = None


class Reply(msgspec.Struct, kw_only=True):
    """The answer to a call.

    ``trailer`` is metadata that follows a stream: it is complete when the body has ended.
    """

    body: Body
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    trailer: dict[str, str] = msgspec.field(default_factory=dict)


#: Answers a call, or raises a MicroError.
Handler: TypeAlias = Callable[[Call, Body], Awaitable[Reply]]
#: Wraps a handler; the same on client and server.
Middleware: TypeAlias = Callable[[Handler], Handler]


def compose(middleware: Iterable[Middleware], handler: Handler) -> Handler:
    """``handler`` inside its middleware; the first is outermost. Done once, at start."""
    for wrap in reversed(tuple(middleware)):
        handler = wrap(handler)
    return handler


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The call that runs now, for code of its handler.

    ``identity`` is whom the caller's certificate says that it is, a SPIFFE ID or a name; "" where
    it showed none. ``deadline`` is a moment of ``time.monotonic()``; what is put into
    ``reply_metadata`` goes to the caller with the reply.
    """

    id: str
    peer: str
    identity: str
    service: str
    endpoint: str
    metadata: Mapping[str, str]
    deadline: float | None
    reply_metadata: dict[str, str]


_current: ContextVar[Call] = ContextVar("micro.call")
#: What a call made inside a handler takes over from the handler's own; never credentials.
INHERITED = ("traceparent", "baggage")
#: Make a call the current one of this task.
enter: Callable[[Call], object] = _current.set


def context() -> Context:
    """The context of the call that is being handled.

    Raises:
        LookupError: outside of a handler.
    """
    call = _current.get(None)
    if call is None:
        raise LookupError("micro.context() is for code that runs inside a handler")
    if call.reply_metadata is None:
        call.reply_metadata = {}
    return Context(
        id=call.id,
        peer=call.peer,
        identity=call.identity,
        service=call.service,
        endpoint=call.endpoint,
        metadata=call.metadata,
        deadline=call.deadline,
        reply_metadata=call.reply_metadata,
    )


def current() -> Call | None:
    """The call that is being handled; None outside of a handler."""
    return _current.get(None)


# -- metadata ----------------------------------------------------------------------------------

_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,256}")
_FORBIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_RESERVED = frozenset(
    """
    accept accept-encoding connection content-encoding content-length content-type date expect host
    keep-alive origin proxy-connection te timeout trailer transfer-encoding upgrade user-agent
    """.split()  # noqa: SIM905 - a list of so many words reads better so
)
_RESERVED_PREFIXES = ("micro-", "x-micro-", "proxy-", "sec-")
#: Most bytes of one metadata value.
METADATA_VALUE = 8 * 1024


def reserved(name: str) -> bool:
    """Whether a lower-case name belongs to the protocol; callers can neither set nor see it."""
    return name in _RESERVED or name.startswith(_RESERVED_PREFIXES)


def checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with lower-case names.

    Raises:
        InvalidArgument: a name or value cannot travel, or is reserved.
        TooLarge: a value is over 8 KiB.
    """
    checked: dict[str, str] = {}
    for name, value in metadata.items():
        lower = name.lower()
        if not _NAME.fullmatch(lower):
            raise InvalidArgument(f"metadata name {name[:80]!r}: letters, digits and - _ . only")
        if reserved(lower):
            raise InvalidArgument(f"metadata name {name!r} is reserved for the protocol")
        if _FORBIDDEN.search(value) or value != value.strip(" \t"):
            raise InvalidArgument(
                f"metadata {name!r}: a value has no CR, LF or NUL, no other control character, "
                "and no blank at its ends"
            )
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise InvalidArgument(f"metadata {name!r}: the value has half a character") from None
        if size > METADATA_VALUE:
            raise TooLarge(f"metadata {name!r} is over {METADATA_VALUE} bytes")
        checked[lower] = value
    return checked


# -- errors on the wire ------------------------------------------------------------------------
# Go Micro's form: {"id":"helloworld","code":400,"detail":"...","status":"Bad Request"}. Go's parser
# ignores what is ours: "kind", the name of our class, which keeps the sixteen codes apart;
# "executed", false where no handler saw the call; "final", true where repeating it is of no more
# use; "retry_after" in seconds; "details".

#: Most characters of an error's text, and of its other parts, as they travel; bytes of its details.
_DETAIL = 1000
_PART = 200
_DETAILS = 4096
#: Most seconds that a peer can ask for before it is asked again.
_RETRY_AFTER = 300.0
_PHRASES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    408: "Request Timeout",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Request Entity Too Large",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    499: "Client Closed Request",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}
_BY_STATUS: dict[int, type[MicroError]] = {
    400: InvalidArgument,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    408: DeadlineExceeded,
    409: AlreadyExists,
    412: FailedPrecondition,
    413: TooLarge,
    415: UnsupportedContentType,
    429: ResourceExhausted,
    499: Cancelled,
    500: Internal,
    501: Unimplemented,
    503: Unavailable,
}
#: What Go Micro's own server says when a handler or a method is missing.
_GO_NOT_FOUND = ("rpc: can't find service ", "rpc: can't find method ")
_GO_ILL_FORMED = "rpc: service/endpoint request ill-formed"


class _WireError(msgspec.Struct):
    id: str = ""
    code: int = 0
    detail: str = ""
    status: str = ""
    kind: str = ""
    executed: Any = None
    final: Any = None
    retry_after: Any = None
    details: Any = None


def encode_error(error: MicroError, *, id: str) -> str:
    """The JSON of an error, ASCII only so that it fits a header. ``id`` names who raises it.

    Details that are no JSON, or over 4 KiB, are left out: an error always travels.
    """
    import json

    fields: dict[str, Any] = {
        "id": (error.id or id)[:_PART],
        "code": error.status,
        "detail": error.detail[:_DETAIL].encode(errors="replace").decode(),
        "status": _PHRASES.get(error.status, ""),
        "kind": _kind(error),
        "retry_after": error.retry_after,
        "details": _sendable(error.details) if error.details else None,
    }
    told = {name: value for name, value in fields.items() if value}
    if error.sent is False:
        told["executed"] = False
    if error.final:
        told["final"] = True
    return json.dumps(told, separators=(",", ":"))


def _sendable(details: Mapping[str, object]) -> object:
    try:
        text = msgspec.json.encode(details)
        return msgspec.json.decode(text) if len(text) <= _DETAILS else None
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        return None


def _kind(error: MicroError) -> str:
    """The nearest class that travels; a program may have made subclasses of its own."""
    names = [cls.__name__ for cls in type(error).__mro__ if BY_NAME.get(cls.__name__) is cls]
    return names[0] if names else ""


def decode_error(text: str) -> MicroError:
    """The error that a peer sent: our form, Go Micro's, or the plain text of a Go handler."""
    try:
        wire = msgspec.json.decode(text, type=_WireError)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        text = text[:_DETAIL]
        if text.startswith(_GO_NOT_FOUND):
            return EndpointNotFound(text, remote=True)
        if text.startswith(_GO_ILL_FORMED):
            return InvalidArgument(text, remote=True)
        return Unknown(text, remote=True)
    kind = BY_NAME.get(wire.kind) or _BY_STATUS.get(wire.code, Unknown)
    error = kind(
        (wire.detail or wire.status)[:_DETAIL],
        id=wire.id[:_PART],
        details=wire.details if isinstance(wire.details, dict) else None,
        remote=True,
        sent=False if wire.executed is False else None,
        retry_after=_seconds(wire.retry_after),
    )
    error.final = wire.final is True
    return error


def _seconds(told: object) -> float | None:
    if isinstance(told, int | float) and told > 0:
        return min(float(told), _RETRY_AFTER)
    return None
