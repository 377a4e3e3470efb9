"""The command line of a peer in Python: ``python -m bench.peers.NAME [OPTION ...] serve PORT``.

Or ``... call JOB``, which prints a Point as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from importlib import import_module
from typing import Any

from bench.load import Job, Point

Server = Callable[[int, list[str]], None]
Client = Callable[[Job], Coroutine[Any, Any, Point]]


def main(serve: Server, call: Client) -> None:
    *options, mode, what = sys.argv[1:]
    if mode == "serve":
        serve(int(what), options)
    else:
        print(json.dumps(run(call(Job(**json.loads(what))), uvloop="uvloop" in options)))


def run(main: Coroutine[Any, Any, Any], *, uvloop: bool) -> Any:
    """As ``asyncio.run``, on the loop that is asked for."""
    loop = import_module("uvloop").new_event_loop if uvloop else asyncio.new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)
