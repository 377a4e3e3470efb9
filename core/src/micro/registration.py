"""Staying registered: the one loop that keeps a node in a registry."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from micro.errors import ConfigError
from micro.registry import Node, Registry

_log = logging.getLogger("micro.registration")

#: Seconds that a registry has to be told that a node goes.
_FAREWELL = 2.0


class Registration:
    """Keeps a node registered: the first time, at each interval, and sooner after an error.

    ``tell`` hears why heartbeats begin to fail, and None when one succeeds again.
    """

    def __init__(
        self,
        registry: Registry,
        node: Node,
        ttl: float,
        interval: float,
        *,
        tell: Callable[[Exception | None], None] | None = None,
    ) -> None:
        if ttl < registry.features.min_ttl:
            raise ConfigError(
                f"register_ttl {ttl:g} s is below the least that {registry.url.scheme} keeps, "
                f"{registry.features.min_ttl:g} s"
            )
        self._registry = registry
        self._node = node
        self._ttl = ttl
        self._interval = interval
        self._tell = tell
        self._task: asyncio.Task[None] | None = None
        #: Whether the registry may know the node.
        self.registered: bool = False
        #: The moment of ``time.monotonic()`` at which it was told that the node goes.
        self.left: float = -math.inf

    async def start(self) -> None:
        """Register, and keep registered; again after a stop."""
        self.registered = True  # also when this is cut off
        await self._registry.register(self._node, ttl=self._ttl)
        self._task = asyncio.create_task(self._run(), name=f"micro.register {self._node.service}")

    async def stop(self) -> None:
        """Deregister; a registry that cannot be told forgets the node after its time to live."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if not self.registered:
            return
        try:
            async with asyncio.timeout(_FAREWELL):
                await self._registry.deregister(self._node)
        except Exception as exc:  # whatever a backend raises, the stop goes on
            _log.warning("%s: not deregistered: %r", self._node.service, exc)
        else:
            self.left = time.monotonic()
        self.registered = False

    async def _run(self) -> None:
        from random import uniform

        failing = False
        while True:
            retry = min(1.0, self._ttl / 10)
            await asyncio.sleep((retry if failing else self._interval) * uniform(0.9, 1.1))
            try:
                async with asyncio.timeout(self._ttl):
                    await self._registry.register(self._node, ttl=self._ttl)
            except Exception as exc:  # whatever a backend raises, the node must come back
                if not failing:
                    _log.warning("%s: heartbeat failed, trying on: %s", self._node.service, exc)
                    self._note(exc)
                failing = True
            else:
                if failing:
                    _log.info("%s: registered again", self._node.service)
                    self._note(None)
                failing = False

    def _note(self, error: Exception | None) -> None:
        if self._tell is not None:
            self._tell(error)
