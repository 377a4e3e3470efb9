"""NATS for micro: ``--registry nats://a:4222,b:4222/namespace?timeout=2s``, and ``nats-kv:``.

nats-py is imported when the first backend connects.
"""

from __future__ import annotations

from micro.hookspecs import hookimpl
from micro.registry import Registry
from micro_plugin_nats._kv import NatsKVRegistry
from micro_plugin_nats._options import NatsKVOptions, NatsOptions
from micro_plugin_nats._registry import NatsRegistry

__all__ = ["NatsKVOptions", "NatsKVRegistry", "NatsOptions", "NatsRegistry", "micro_backends"]


@hookimpl
def micro_backends() -> list[type[Registry]]:
    """The backends of this plugin."""
    return [NatsRegistry, NatsKVRegistry]
