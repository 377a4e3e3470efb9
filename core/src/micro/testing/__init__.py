"""For tests: of services (``serving``), and of backends (the conformance suites).

Needs the extra ``testing``: ``micro-core[testing]``.
"""

import pytest

# The suites' asserts tell what was compared only if pytest rewrites them before they are imported.
pytest.register_assert_rewrite(
    *(f"micro.testing.{name}" for name in ("access", "codec", "lifecycle", "pytest_plugin")),
    *(f"micro.testing.{name}" for name in ("registry", "transport")),
    *(f"micro.testing._{name}" for name in ("access_tls", "calls", "ends", "faults", "leaks")),
    *(f"micro.testing._{name}" for name in ("limits", "model", "nodes", "secure", "streams")),
    *(f"micro.testing._{name}" for name in ("survival", "unary", "watching")),
)

from micro.testing.access import AccessSuite, NewServer  # noqa: E402 - after the lines above
from micro.testing.codec import CodecSuite  # noqa: E402
from micro.testing.environment import NotAvailable  # noqa: E402
from micro.testing.proxy import FaultProxy  # noqa: E402
from micro.testing.pytest_plugin import available  # noqa: E402
from micro.testing.registry import RegistrySuite  # noqa: E402
from micro.testing.servers import ConsulServer, EtcdServer, NatsServer, Server  # noqa: E402
from micro.testing.services import serving  # noqa: E402
from micro.testing.transport import TransportSuite  # noqa: E402
from micro.testing.waiting import eventually  # noqa: E402

__all__ = [
    "AccessSuite",
    "CodecSuite",
    "ConsulServer",
    "EtcdServer",
    "FaultProxy",
    "NatsServer",
    "NewServer",
    "NotAvailable",
    "RegistrySuite",
    "Server",
    "TransportSuite",
    "available",
    "eventually",
    "serving",
]
