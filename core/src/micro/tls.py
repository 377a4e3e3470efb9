"""TLS of a service, as a program asks for it."""

from __future__ import annotations

import os

import msgspec


class TLS(msgspec.Struct, frozen=True, kw_only=True):
    """TLS for a service, as server and as client: paths of files in PEM.

    ``cert`` and ``key`` are the service's own certificate (after it what leads to its authority)
    and its key, both or none; to serve they are needed. ``ca`` has the authorities that the
    certificates of others have to be of; without it those of the system. With ``ca`` callers need a
    certificate, unless ``anonymous`` takes those without one too.

    The files are read when the service starts, and again when they change.
    """

    cert: str | os.PathLike[str] = ""
    key: str | os.PathLike[str] = ""
    ca: str | os.PathLike[str] = ""
    anonymous: bool = False
