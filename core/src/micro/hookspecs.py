"""The hooks that a plugin may implement.

Hooks are plain functions, never ``async def``. A plugin marks them with ``hookimpl``::

    from micro.hookspecs import hookimpl

    @hookimpl
    def micro_backends():
        return [EtcdRegistry]

An installed distribution names the module of its hooks in its entry points: ``micro.backends`` has
one for each scheme, ``micro.commands`` one for each command, ``micro.extensions`` one for each
extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

from micro.backend import Backend

if TYPE_CHECKING:
    import click

    from micro.service import Service

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker("micro")
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker("micro")


@hookspec
def micro_backends() -> Iterable[type[Backend[Any]]]:  # type: ignore[empty-body]
    """The backends that this plugin adds; each names its schemes."""


@hookspec
def micro_commands() -> Iterable[click.Command]:  # type: ignore[empty-body]
    """The commands that this plugin adds to ``micro``.

    Their module is loaded when one of them is invoked; it is another than that of the backends, so
    that it needs no client library.
    """


@hookspec
def micro_configure(service: Service) -> None:
    """Add to a service, before it starts: ``handle``, ``wrap_handler``, ``wrap_client``.

    Called once for each service that names the extension.
    """
