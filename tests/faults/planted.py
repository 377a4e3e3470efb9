"""A program of a node with a bug in it: ``planted.py BUG PROGRAM [ARGUMENT ...]``."""
# ruff: noqa: B010 - to a type checker, a bug that is planted by an assignment is one

from __future__ import annotations

import math
import runpy
import sys
from typing import Any

from micro import service
from micro._overload import Lateness
from micro.backends import _http_wire, _tcp_frames, _tcp_link
from micro.call import Call
from micro.service import Service
from micro.transport import Listener


def drain_first() -> None:
    """Take no more calls, and only then tell that the node goes."""
    leave: Any = Service._leave

    async def planted(self: Service, *args: Any) -> None:
        for arg in args:
            if isinstance(arg, Listener):
                await arg.drain(7.0)
        await leave(self, *args)

    setattr(Service, "_leave", planted)


def no_grace() -> None:
    """Cut what runs."""
    setattr(service, "_GRACE", 0.0)


def no_deadline() -> None:
    """Do not hear how long a caller waits."""
    call_of: Any = _tcp_frames.call_of

    def planted(*args: Any) -> Call:
        call: Call = call_of(*args)
        call.deadline = None
        return call

    setattr(_tcp_frames, "call_of", planted)
    setattr(_http_wire, "_deadline", lambda _: math.inf)


def no_shedding() -> None:
    """Begin every call, however late."""

    def planted(self: Lateness, now: float) -> None:
        pass

    setattr(Lateness, "look", planted)


def no_limit() -> None:
    """Get the memory for a message, and then see whether it may be so large."""
    odd: Any = _tcp_link.Link.odd

    def planted(self: _tcp_link.Link, data: bytes, start: int) -> int:
        size = int.from_bytes(data[start : start + 4])
        if not data[start:].startswith(_tcp_frames.PREFACE):
            assert b"\1" * min(size, 64 << 20)
        end: int = odd(self, data, start)
        return end

    setattr(_tcp_link.Link, "odd", planted)


BUGS = {bug.__name__: bug for bug in (drain_first, no_grace, no_deadline, no_shedding, no_limit)}


def main(bug: str, program: str, *arguments: str) -> None:
    BUGS[bug]()
    sys.argv[:] = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
