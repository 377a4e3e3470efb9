"""For tests: of services (``serving``), and of backends (the conformance suites).

Needs the extra ``testing``: ``micro-core[testing]``.
"""

import pytest

# The suites' asserts tell what was compared only if pytest rewrites them before they are imported.
pytest.register_assert_rewrite("micro.testing.registry", "micro.testing.transport")

from micro.testing.registry import RegistrySuite  # noqa: E402 - after the line above
from micro.testing.services import serving  # noqa: E402
from micro.testing.transport import TransportSuite  # noqa: E402
from micro.testing.waiting import eventually  # noqa: E402

__all__ = ["RegistrySuite", "TransportSuite", "eventually", "serving"]
