"""Consul for micro: ``--registry consul://:TOKEN@a:8500,b:8500/namespace?timeout=2s``.

aiohttp is imported when the first backend connects.
"""

from __future__ import annotations

from micro.hookspecs import hookimpl
from micro_plugin_consul._options import ConsulOptions
from micro_plugin_consul._registry import ConsulRegistry

__all__ = ["ConsulOptions", "ConsulRegistry", "micro_backends"]


@hookimpl
def micro_backends() -> list[type[ConsulRegistry]]:
    """The backends of this plugin."""
    return [ConsulRegistry]
