"""What is in use of the process, and whether it was given back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
from collections import Counter
from pathlib import Path

from micro.testing.waiting import eventually

_OPEN_FILES = Path("/proc/self/fd")


def held() -> dict[str, list[str]]:
    """What is in use, by name."""
    gc.collect()
    files = _OPEN_FILES.iterdir() if _OPEN_FILES.exists() else ()
    threads = [thread.name for thread in threading.enumerate()]
    return {
        "tasks": [task.get_name() for task in asyncio.all_tasks()],
        # Those of the loop's own pool stay with it.
        "threads": [name for name in threads if not name.startswith("asyncio_")],
        "open files": [_target(file) for file in files],
    }


async def given_back(before: dict[str, list[str]]) -> None:
    """Wait until no more is in use than ``before``."""

    def more() -> dict[str, list[str]]:
        return {
            kind: sorted((Counter(now) - Counter(before[kind])).elements())
            for kind, now in held().items()
            if len(now) > len(before[kind])
        }

    with contextlib.suppress(AssertionError):  # this one shows no names
        await eventually(lambda: not more())
    assert more() == {}


def blocks() -> int:
    """How many pieces of memory the interpreter has given out; one call needs a dozen."""
    gc.collect()
    return sys.getallocatedblocks()


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # that by which the folder was listed
        return "the list itself"
