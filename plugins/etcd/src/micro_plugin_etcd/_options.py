"""What stands behind the ``?`` of a URL."""

from __future__ import annotations

from micro.access import ServerOptions


class EtcdOptions(ServerOptions, frozen=True):
    """The options of ``etcd:``.

    Beside those that lead to a server, ``password_file`` holds the password, which then is in no
    URL.
    """

    password_file: str = ""
