"""Questions to the API of JetStream, and what its errors mean.

Source: https://github.com/nats-io/nats-architecture-and-design, ADR-1, and ``server/errors.json``
of https://github.com/nats-io/nats-server.
"""

from __future__ import annotations

from typing import Any

import msgspec

from micro.errors import (
    AlreadyExists,
    FailedPrecondition,
    MicroError,
    NotFound,
    ResourceExhausted,
    TooLarge,
    Unavailable,
)
from micro_plugin_nats._link import Link

_KINDS: dict[int, type[MicroError]] = {
    10059: NotFound,  # no such stream
    10058: AlreadyExists,  # a stream of this name, with other settings
    10054: TooLarge,
    **dict.fromkeys(
        (10023, 10028, 10047, 10077), ResourceExhausted
    ),  # the server, or a limit of it
    **dict.fromkeys((10039, 10076), Unavailable),  # no JetStream, or not for this account
}
#: From here on a status is the fault of the server.
_ITS_OWN = 500


async def ask(link: Link, what: str, request: object = None) -> dict[str, Any]:
    """The answer of the API.

    Raises:
        Unavailable: it does not answer.
        MicroError: it is an error.
    """
    body = b"" if request is None else msgspec.json.encode(request)
    answer = await link.ask(f"$JS.API.{what}", body)
    if answer.is_unheard:
        raise Unavailable(
            f"{link.where}: JetStream does not answer; start the server with -js, and give the "
            "account JetStream"
        )
    return _said(link, answer.data, what)


async def store(link: Link, subject: str, data: bytes, headers: dict[str, str]) -> None:
    """Publish to the stream of ``subject``, and wait until it is stored.

    Raises:
        NotFound: there is no such stream.
        MicroError: the server stores it not.
    """
    answer = await link.ask(subject, data, headers)
    if answer.is_unheard:
        raise NotFound(f"{link.where}: no stream keeps {subject}")
    _said(link, answer.data, subject)


def _said(link: Link, data: bytes, what: str) -> dict[str, Any]:
    try:
        said: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise Unavailable(f"{link.where}: {what}: no answer of JetStream: {exc}") from exc
    error = said.get("error")
    if error is None:
        return said
    code, number = error.get("code", 0), error.get("err_code", 0)
    kind = _KINDS.get(number, Unavailable if code >= _ITS_OWN else FailedPrecondition)
    raise kind(f"{link.where}: {what}: {error.get('description')} ({number})")
