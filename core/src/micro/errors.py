"""Every exception of micro.

A caller catches the class that tells it what to do next; the text is for people::

    MicroError
    ├── Cancelled               the peer gave the call up
    ├── Unknown                 a peer failed and did not say how
    ├── InvalidArgument         mend the request
    │   └── DecodeError         bytes that are not what their content type says
    ├── DeadlineExceeded
    ├── NotFound
    │   ├── ServiceNotFound     nothing is registered under that name
    │   └── EndpointNotFound    the service runs, but has no such endpoint
    ├── AlreadyExists
    ├── PermissionDenied
    ├── ResourceExhausted       slow down
    │   └── TooLarge            a size limit
    ├── FailedPrecondition
    ├── Aborted
    ├── OutOfRange
    ├── Unimplemented
    │   └── Unsupported         this backend or version cannot do it
    │       └── UnsupportedContentType
    ├── Internal                a fault of the program, not of the caller
    ├── Unavailable             try again, or elsewhere
    ├── DataLoss
    ├── Unauthenticated
    └── (never sent to a peer)
        ├── ConfigError         a setting, a contract or a handler is wrong: stop and mend it
        ├── Closed              used after it was closed
        └── Gap                 a followed stream has a hole: take a new snapshot
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar


class Code(IntEnum):
    """The status codes of gRPC.

    Source: https://github.com/grpc/grpc/blob/master/doc/statuscodes.md
    """

    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class MicroError(Exception):
    """What every error of micro is.

    ``detail`` is the text; ``id`` names who raised it (a service, as in Go Micro) and is empty for
    errors of this process. ``details`` are JSON values for a program to read, 4 KiB of them at most
    when they travel. ``remote`` tells whether a peer sent it. ``sent`` is False when the call
    provably never reached a handler, so that it may be repeated without harm; None when unknown.
    ``retry_after`` are the seconds after which its sender wants to be asked again. ``final`` says
    that who raises it has done what repeating can do, so that no caller repeats it once more.
    """

    code: ClassVar[Code] = Code.UNKNOWN
    #: The number Go Micro and HTTP use for it.
    status: ClassVar[int] = 500
    final: bool = False

    def __init__(
        self,
        detail: str = "",
        *,
        id: str = "",
        details: Mapping[str, object] | None = None,
        remote: bool = False,
        sent: bool | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.id = id
        self.details: Mapping[str, object] = details or {}
        self.retry_after = retry_after
        self.remote = remote
        self.sent = sent

    def __str__(self) -> str:
        return f"{self.id}: {self.detail}" if self.id else self.detail


class Cancelled(MicroError):
    """A peer cancelled the call. Our own cancellation is always ``asyncio.CancelledError``."""

    code = Code.CANCELLED
    status = 499


class Unknown(MicroError):
    """A peer failed with nothing but a text, as a plain error of a Go handler does."""


class InvalidArgument(MicroError):
    """The request is wrong, whatever state the server is in."""

    code = Code.INVALID_ARGUMENT
    status = 400


class DecodeError(InvalidArgument):
    """Bytes are not what their content type, or the type asked for, says."""


class DeadlineExceeded(MicroError):
    """The time for the call ran out; it may or may not have been executed."""

    code = Code.DEADLINE_EXCEEDED
    status = 408


class NotFound(MicroError):
    """What was asked for does not exist."""

    code = Code.NOT_FOUND
    status = 404


class ServiceNotFound(NotFound):
    """Nothing is registered under this name."""


class EndpointNotFound(NotFound):
    """The service runs, but has no such endpoint."""


class AlreadyExists(MicroError):
    """What was to be created exists."""

    code = Code.ALREADY_EXISTS
    status = 409


class PermissionDenied(MicroError):
    """The caller is known and may not do this."""

    code = Code.PERMISSION_DENIED
    status = 403


class ResourceExhausted(MicroError):
    """A limit was reached; slow down."""

    code = Code.RESOURCE_EXHAUSTED
    status = 429


class TooLarge(ResourceExhausted):
    """A message or a field is over its size limit."""

    status = 413


class FailedPrecondition(MicroError):
    """The system is not in the state that the request needs."""

    code = Code.FAILED_PRECONDITION
    status = 412


class Aborted(MicroError):
    """A concurrent change won; read again and repeat."""

    code = Code.ABORTED
    status = 409


class OutOfRange(MicroError):
    """Past the valid range, as reading beyond an end."""

    code = Code.OUT_OF_RANGE
    status = 400


class Unimplemented(MicroError):
    """The peer knows the operation but does not offer it."""

    code = Code.UNIMPLEMENTED
    status = 501


class Unsupported(Unimplemented):
    """This backend, or this version, cannot do it."""


class UnsupportedContentType(Unsupported):
    """No codec is known for the content type of a message."""

    status = 415


class Internal(MicroError):
    """A fault of the program that answers; its log has more under the id in the text."""

    code = Code.INTERNAL
    status = 500


class Unavailable(MicroError):
    """The peer or the server cannot be reached, or is going away; try again or elsewhere."""

    code = Code.UNAVAILABLE
    status = 503


class DataLoss(MicroError):
    """Data is lost or corrupt beyond repair."""

    code = Code.DATA_LOSS
    status = 500


class Unauthenticated(MicroError):
    """The caller is not known: no credential, or a wrong one."""

    code = Code.UNAUTHENTICATED
    status = 401


class ConfigError(MicroError):
    """A setting, a contract or a handler is wrong. Never sent to a peer."""

    code = Code.INTERNAL


class Closed(MicroError):
    """Used after it was closed. Never sent to a peer."""

    code = Code.INTERNAL


class Gap(MicroError):
    """What is followed has a hole: only a new snapshot tells what holds. Never sent to a peer."""

    code = Code.INTERNAL


def _tree(base: type[MicroError]) -> dict[str, type[MicroError]]:
    found: dict[str, type[MicroError]] = {}
    for cls in base.__subclasses__():
        found[cls.__name__] = cls
        found |= _tree(cls)
    return found


#: The classes that travel, by name and by gRPC code: what an error on the wire turns into.
BY_NAME: dict[str, type[MicroError]] = {
    name: cls for name, cls in _tree(MicroError).items() if cls not in (ConfigError, Closed, Gap)
}
