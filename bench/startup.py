"""How long it takes to import micro, and to start a service."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
from bench.load import GREETING, NAME
from bench.processes import ROOT, SERVER_CORE, cpu_seconds, free_port, running, wait_for
from bench.rounds import Spread, in_turns, spread

_BODY = b'{"name":"%s"}' % NAME.encode()
_REQUEST = (
    b"POST /Helloworld/Call HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Cost(msgspec.Struct, frozen=True):
    """Milliseconds by the clock and of CPU, and the same as ratios to the base.

    A ratio is the median of the ratios round for round: a machine that is slow for a while is slow
    for both sides of them.
    """

    wall_ms: Spread
    cpu_ms: Spread
    wall_ratio: float
    cpu_ratio: float


def imports(rounds: int) -> dict[str, Cost]:
    """From the start of a process to its exit."""
    programs = {
        "python": "pass",
        "asyncio": "import asyncio",
        # The peers bring typing_extensions: msgspec loads it where it is, micro does not need it.
        "micro": "import sys; sys.modules['typing_extensions'] = None; import micro",
        "micro, with typing_extensions": "import micro",
    }
    competitors = {name: partial(_whole, program) for name, program in programs.items()}
    return _costs(competitors, "asyncio", rounds)


def starts(rounds: int) -> dict[str, Cost]:
    """From the start of a process to its first answer."""
    competitors = {
        "micro": partial(_to_answer, "micro_server"),
        "micro, asyncio loop": partial(_to_answer, "micro_server", "--asyncio"),
        "FastAPI + uvicorn": partial(_to_answer, "fastapi_server"),
        "FastAPI + uvicorn, asyncio loop": partial(_to_answer, "fastapi_server", "--asyncio"),
    }
    return _costs(competitors, "FastAPI + uvicorn", rounds)


def _costs(
    competitors: Mapping[str, Callable[[], tuple[float, float]]], base: str, rounds: int
) -> dict[str, Cost]:
    # The first two rounds write bytecode and fill the cache of files.
    found = in_turns(competitors, rounds=rounds, warm_up=2)
    return {
        name: Cost(
            spread(wall for wall, _ in pairs),
            spread(cpu for _, cpu in pairs),
            *(
                statistics.median(
                    one[part] / other[part] for one, other in zip(pairs, found[base], strict=True)
                )
                for part in (0, 1)
            ),
        )
        for name, pairs in found.items()
    }


def _whole(program: str) -> tuple[float, float]:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    os.sched_setaffinity(process.pid, {SERVER_CORE})
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return took * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def _to_answer(module: str, *args: str) -> tuple[float, float]:
    port = free_port()
    start = time.perf_counter()
    with running(module, port, *args) as process:
        answer = wait_for(process, port, _REQUEST)
        took = time.perf_counter() - start
        cpu = cpu_seconds(process.pid)
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head[:16] or msgspec.json.decode(body) != {"message": GREETING}:
        raise AssertionError(f"{module} answered {answer!r}")
    return took * 1e3, cpu * 1e3
