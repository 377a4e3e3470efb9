"""What stands behind the ``?`` of a URL."""

from __future__ import annotations

import msgspec


class EtcdOptions(msgspec.Struct, frozen=True):
    """The options of ``etcd:``.

    ``timeout`` bounds each call, in seconds, over all hosts together. ``tls`` turns TLS on, as do
    the files: ``ca`` holds the authorities to trust instead of the system's, ``cert`` and ``key``
    are the client's own, all PEM. ``password_file`` holds the password, which then is in no URL.
    """

    timeout: float = 5.0
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    password_file: str = ""

    @property
    def wants_tls(self) -> bool:
        return self.tls or bool(self.ca or self.cert or self.key)
