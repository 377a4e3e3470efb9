"""How a server's session answers calls: the same for each protocol on sockets."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from typing import Any

from micro.errors import Internal

_log = logging.getLogger("micro.server")

if sys.version_info >= (3, 12):

    def begun(
        work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop
    ) -> asyncio.Task[None]:
        """A task of its own for a call, which begins to run at once."""
        return asyncio.Task(work, loop=loop, eager_start=True)

else:

    def begun(
        work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop
    ) -> asyncio.Task[None]:
        """A task of its own for a call."""
        return loop.create_task(work)


def broke(endpoint: str, exc: BaseException) -> Internal:
    """What a caller is told of a fault of ours: nothing but its kind; the log has it."""
    _log.error("answering %s failed", endpoint[:200], exc_info=exc)
    return Internal(f"internal error: {type(exc).__name__}")
