"""What the machine of a test has of real servers: the variables ``MICRO_TEST_...``.

For each server NAME, ``MICRO_TEST_<NAME>_BIN`` is the program to start, and ``MICRO_TEST_<NAME>``
the URL of a running one to use instead. ``MICRO_TEST_REQUIRE`` lists the names, or says ``all``,
without which a run has failed.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


class NotAvailable(Exception):
    """A server cannot be had here; the text says why and what helps, in one line."""


def program(name: str, command: str = "") -> Path:
    """The program of a server: MICRO_TEST_<NAME>_BIN, or else ``command`` (its name) on the PATH.

    Raises:
        NotAvailable: there is none.
    """
    variable = f"{name.upper()}_BIN"
    wanted = _variable(variable) or command or name
    found = shutil.which(wanted)
    if found is None:
        raise NotAvailable(
            f"no {wanted}: install it, or `export MICRO_TEST_{variable}=/path/to/it`"
        )
    return Path(found).absolute()


def running(name: str) -> str:
    """The URL of the server to use, from MICRO_TEST_<NAME>; empty if tests start their own."""
    return _variable(name.upper())


def required(name: str) -> bool:
    """Whether MICRO_TEST_REQUIRE says that a run without this server has failed."""
    names = _variable("REQUIRE").split(",")
    return "all" in names or name in names


def namespaced(url: str) -> str:
    """``url`` with a namespace that no other test has, inside of the one that it may have."""
    server, mark, options = url.partition("?")
    scheme, _, rest = server.partition("://")
    return f"{scheme}://{rest.rstrip('/')}/test-{uuid.uuid4().hex[:12]}{mark}{options}"


def _variable(name: str) -> str:
    return os.environ.get(f"MICRO_TEST_{name}", "")
