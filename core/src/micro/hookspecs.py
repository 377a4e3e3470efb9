"""The hooks that a plugin may implement.

Hooks are plain functions, never ``async def``. A plugin marks them with ``hookimpl``::

    from micro.hookspecs import hookimpl

    @hookimpl
    def micro_backends():
        return [EtcdRegistry]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from micro.backend import Backend

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker("micro")
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker("micro")


@hookspec
def micro_backends() -> Iterable[type[Backend[Any]]]:  # type: ignore[empty-body]
    """The backends that this plugin adds; each names its schemes."""
