"""The suites as ``micro verify`` runs them: on a server of its user's, which they may not stop."""

from __future__ import annotations

import pytest

from micro.testing import _verify
from micro.testing.registry import RegistrySuite
from micro.testing.servers import Server


class TestRegistry(RegistrySuite):
    """``backend``, ``seed`` and the sizes of the model are set for each run."""

    @pytest.fixture
    def url(self) -> str:
        return _verify.task().url

    @pytest.fixture
    def namespaced_url(self) -> str:
        return _verify.task().inner_url

    @pytest.fixture
    def server(self) -> Server | None:
        pytest.skip("it would stop the server, or cut the way to it")
