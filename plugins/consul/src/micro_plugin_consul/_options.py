"""What stands behind the ``?`` of a URL."""

from __future__ import annotations

from micro.access import ServerOptions


class ConsulOptions(ServerOptions, frozen=True):
    """The options of ``consul:``.

    Beside those that lead to a server, ``token_file`` holds the token, which then is in no URL.
    """

    token_file: str = ""
