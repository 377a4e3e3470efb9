"""Running a service and its client in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from micro.client import Client
from micro.service import Service
from micro.settings import Settings

_IN_PROCESS = {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": "memory"}


@asynccontextmanager
async def serving(
    service: Service, environment: Mapping[str, str] = _IN_PROCESS
) -> AsyncIterator[Client]:
    """Run ``service`` inside this process and give the client that calls it.

    Nothing of the machine is touched: the registry and the transport are in memory, whatever URLs
    the program names, and the process's environment is not read. ``environment`` stands for it.

    Example::

        async with serving(service) as client:
            greeter = client("helloworld", Greeter, name="Helloworld")
            assert await greeter.call(Request("Alice")) == Response("Hello Alice")
    """
    async with service.opened(Settings(environment=environment)):
        yield service.client
