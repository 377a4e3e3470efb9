"""etcd for micro: ``--registry etcd://user:secret@a:2379,b:2379/namespace?tls=true``.

gRPC is imported when the first backend connects.
"""

from __future__ import annotations

from micro.hookspecs import hookimpl
from micro_plugin_etcd._options import EtcdOptions
from micro_plugin_etcd._registry import EtcdRegistry

__all__ = ["EtcdOptions", "EtcdRegistry", "micro_backends"]


@hookimpl
def micro_backends() -> list[type[EtcdRegistry]]:
    """The backends of this plugin."""
    return [EtcdRegistry]
