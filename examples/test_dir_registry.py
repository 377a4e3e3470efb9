"""The contract of registries, on the one of ``dir_registry.py``: this is all that it takes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from examples.dir_registry import DirRegistry

from micro.testing import RegistrySuite


class TestDirRegistry(RegistrySuite):
    backend = DirRegistry
    model_examples = 10  # it waits for each change to be polled

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"dir://{tmp_path}"

    @pytest.fixture
    def garbage(self, tmp_path: Path) -> Callable[[str], Awaitable[None]]:
        """Optional: how others could write there what is no node."""

        async def write(service: str) -> None:
            tmp_path.joinpath(f"{service}.broken.node").write_text("no JSON")

        return write
