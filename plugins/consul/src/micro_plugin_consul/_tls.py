"""A look at the TLS of a server that cannot be reached."""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

from micro.access import tls_fault

#: Seconds for it.
_LOOK = 1.0


async def look(host: str, context: ssl.SSLContext) -> str:
    """What is wrong with a handshake with ``host``, as ``https://a:1``, that nothing follows.

    A server refuses a client's certificate after the handshake; what is sent to it then makes a
    reset of its answer.
    """
    address = urlsplit(host)
    try:
        async with asyncio.timeout(_LOOK):
            reader, writer = await asyncio.open_connection(
                address.hostname, address.port, ssl=context
            )
            try:
                await reader.read(1)
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError) as exc:
        return tls_fault(exc)
    return ""
