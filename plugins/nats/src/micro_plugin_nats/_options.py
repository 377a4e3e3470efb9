"""What stands behind the ``?`` of a URL."""

from __future__ import annotations

from micro.access import ServerOptions


class NatsOptions(ServerOptions, frozen=True):
    """The options of ``nats:``.

    Beside those that lead to a server, ``password_file`` holds the password, or without a user the
    token, which then is in no URL.
    """

    password_file: str = ""


class NatsKVOptions(NatsOptions, frozen=True):
    """The options of ``nats-kv:``, which has those of ``nats:`` too.

    ``bucket`` is the key-value bucket; it is made where there is none. ``bucket_ttl`` is for
    servers before 2.11 alone, which have one time to live for all of a bucket that is made.
    """

    bucket: str = "micro-registry"
    bucket_ttl: float = 30.0
