"""The servers that registries have, and what their plugins promise of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from micro.plugins import Plugins
from micro.registry import Registry
from micro.testing import Server
from micro.testing.pytest_plugin import killable
from micro.testing.servers import ConsulServer, EtcdServer, NatsServer
from micro.url import URL

#: Seconds that a busy machine may add to any bound of time.
SLACK = 2.0


@dataclass(frozen=True)
class Backend:
    """A kind of registry; all times are in seconds.

    ``ttl`` is a short time to live that it keeps, ``guest_ttl`` a shorter one. After an outage
    watches and reads say the same within ``agrees``. A watch that hears nothing knows so after
    ``silence``.
    """

    scheme: str
    server: Callable[[Path, Path], Server]
    ttl: float = 4.0
    guest_ttl: float = 2.0
    agrees: float = 2.0
    silence: float = 4.0

    @property
    def program(self) -> str:
        """The server's name, of fixtures and recipes."""
        return self.scheme.partition("-")[0]

    def url(self, address: str) -> str:
        return f"{self.scheme}://{address}"

    def registry(self, address: str) -> Registry:
        """A client's; not connected."""
        return Plugins().create(Registry, URL.parse(self.url(address)))  # type: ignore[type-abstract]

    def made(self, request: pytest.FixtureRequest, folder: Path) -> Server:
        """A server of a test's own, which the test has to start."""
        killable(self.program)
        return self.server(request.getfixturevalue(f"{self.program}_binary"), folder)


BACKENDS = {
    backend.scheme: backend
    for backend in (
        Backend("etcd", EtcdServer),
        Backend("consul", ConsulServer, agrees=5.0),
        Backend("nats", NatsServer),
        Backend("nats-kv", NatsServer),
    )
}
each = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
