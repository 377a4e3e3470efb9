"""How a client's channel connects: the same for each protocol on sockets."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from micro.deadline import Deadlines
from micro.errors import Unavailable
from micro.handshake import explained

if TYPE_CHECKING:
    from ssl import SSLContext

P = TypeVar("P", bound=asyncio.BaseProtocol)


async def connect(
    make: Callable[[], P], where: tuple[str, int], tls: SSLContext | None, *, timeout: float
) -> P:
    """The protocol of a connection to a host and a port, or to a path; use it in ``connecting``."""
    loop = asyncio.get_running_loop()
    host, port = where
    within = timeout if tls else None  # uvloop keeps a handshake that is cancelled for so long
    if port >= 0:
        _, made = await loop.create_connection(
            make, host, port, ssl=tls, ssl_handshake_timeout=within
        )
    else:
        name = "localhost" if tls else None  # a path has no other
        _, made = await loop.create_unix_connection(
            make, host, ssl=tls, server_hostname=name, ssl_handshake_timeout=within
        )
    return made


@contextmanager
def connecting(
    address: str, deadlines: Deadlines, *, secure: bool, timeout: float
) -> Iterator[None]:
    """Turns what fails within, or takes longer than ``timeout`` seconds, into Unavailable.

    No byte of a call was sent.
    """
    try:
        with deadlines.until(time.monotonic() + timeout):
            yield
    except (OSError, TimeoutError, ValueError) as exc:  # the last: of a host that is no name
        why = explained(exc, secure=secure) or _why(exc) or f"no answer in {timeout:g} s"
        raise Unavailable(f"{address}: {why}", sent=False) from exc


def _why(exc: Exception) -> str:
    if isinstance(exc, ConnectionRefusedError):
        return "connection refused; does the service run there?"
    if isinstance(exc, OSError) and not isinstance(exc, socket.gaierror):
        # asyncio writes "Connect call failed" over the system's own words.
        number = exc.errno or 0
        return os.strerror(number) if number in errno.errorcode else str(exc)
    return getattr(exc, "strerror", None) or str(exc)
