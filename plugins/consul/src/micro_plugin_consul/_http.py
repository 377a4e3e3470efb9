"""Requests to one host: the only module that imports aiohttp, whose errors end here."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlencode

import aiohttp

from micro.access import SPOKEN, tls_fault
from micro.errors import (
    Closed,
    InvalidArgument,
    MicroError,
    PermissionDenied,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unknown,
)

LOGIN = "consul://:TOKEN@host, or ?token_file=FILE"
RIGHTS = (
    'its policy needs service_prefix "NAMESPACE/" with read, to register with write, and '
    'node_prefix "" with read'
)
_CROWDED = (
    "too many connections from this host: run fewer programs there, or raise "
    "limits.http_max_conns_per_client of the agent"
)


class Mistaken(Unavailable):
    """It will not work until somebody mends a setting."""


class Failed(Unavailable):
    """The server answered that it cannot: it has no leader, or so it tells that it knows no id."""


class Answer(NamedTuple):
    """``at`` is the index, 0 where none is told; ``filtered``: some of it we may not see.

    ``status`` is how well something is that was found, where ``is_state``; else what came of it.
    """

    status: int
    body: bytes
    at: int
    filtered: bool
    is_state: bool


class Session:
    """Connections to the hosts of one client, each kept for ``kept`` seconds without use.

    ``name`` is what the texts of errors begin with. How many there are is for the caller to bound.
    """

    def __init__(self, name: str, tls: ssl.SSLContext | None, token: str, *, kept: float) -> None:
        self._name = name
        self._has_token = bool(token)
        self._closed = False
        self._session = aiohttp.ClientSession(
            # Not bounded here: to close it would cancel those who wait for a connection.
            connector=aiohttp.TCPConnector(limit=0, ssl=tls or True, keepalive_timeout=kept),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"} | ({"X-Consul-Token": token} if token else {}),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def aclose(self) -> None:
        self._closed = True
        await self._session.close()

    async def ask(
        self,
        host: str,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes | None = None,
        *,
        within: float,
    ) -> Answer:
        """What ``host``, as ``http://a:1``, answers: 200, or what some paths tell by another.

        Raises:
            ResourceExhausted: the server has too many connections of ours, or of this host's.
            Unavailable: it does not answer within so many seconds. Others are what it answers.
        """
        where = f"{self._name}: {host.partition('://')[2]}"
        url = f"{host}/v1/{path}?{urlencode(query)}"
        if self._closed:
            raise Closed(f"{self._name}: used after it was closed")
        try:
            async with (
                asyncio.timeout(within),
                self._session.request(method, url, data=body, allow_redirects=False) as response,
            ):
                answer = _answer(response, await response.read())
        except TimeoutError:
            raise Unavailable(f"{where}: no answer in {within:.3g} s") from None
        except (aiohttp.ClientError, OSError) as exc:
            raise self._translated(where, exc) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # So aiohttp tells those of a closed session who wait for the address of a host.
            raise Closed(f"{self._name}: closed during the call") from None
        if answer.status in (200, 401, 404) or answer.is_state:
            return answer
        raise self._refused(where, answer)

    def _translated(self, where: str, error: Exception) -> MicroError:
        if self._closed:
            return Closed(f"{self._name}: closed during the call")
        if why := tls_fault(error):
            return Mistaken(f"{where}: {why}")
        if isinstance(error, aiohttp.ClientConnectorError):
            refused = isinstance(error.os_error, ConnectionRefusedError)
            why = "connection refused; does Consul run there?" if refused else str(error.os_error)
            return Unavailable(f"{where}: {why}")
        return Unavailable(f"{where}: {str(error) or type(error).__name__}")

    def _refused(self, where: str, answer: Answer) -> MicroError:
        says = answer.body[:500].decode(errors="replace").strip()
        if answer.status == 403:
            return self._forbidden(says)
        if answer.status == 429:
            return ResourceExhausted(f"{where}: {says}: {_CROWDED}")
        if answer.status == 400 and "HTTPS server" in says:
            return Mistaken(f"{where}: {SPOKEN}")
        kind = {400: InvalidArgument, 413: TooLarge}.get(answer.status, Unknown)
        return (Failed if answer.status >= 500 else kind)(f"{where}: {answer.status}: {says}")

    def _forbidden(self, says: str) -> MicroError:
        if "ACL not found" in says:
            return Unauthenticated(f"{self._name}: Consul does not know the token of {LOGIN}")
        if not self._has_token:
            return Unauthenticated(f"{self._name}: {says}; it asks for a token: {LOGIN}")
        return PermissionDenied(f"{self._name}: {says}; {RIGHTS}")


def _answer(response: aiohttp.ClientResponse, body: bytes) -> Answer:
    index = response.headers.get("X-Consul-Index", "")
    return Answer(
        status=response.status,
        body=body,
        at=int(index) if index.isdecimal() else 0,
        filtered=response.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true",
        # By 429 and 503 an agent tells that a service has a warning, or is critical.
        is_state="X-Consul-Reason" in response.headers,
    )
