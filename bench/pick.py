"""What a client's pick of a node costs: ``python -m bench.pick NODES SECONDS`` prints a Point."""

from __future__ import annotations

import json
import sys
import time
from itertools import repeat

from bench.load import Point

from micro._targets import Counts, Peer, Target
from micro.call import Call
from micro.registry import Node
from micro.retries import Retries
from micro.selector import Selector

#: Picks between two looks at the clock.
_BATCH = 10_000


class _View:
    """Nodes that do not change."""

    def __init__(self, count: int) -> None:
        self.nodes = tuple(
            Node(service="bench", id=f"n{number}", address=f"10.0.0.1:{number + 1}")
            for number in range(count)
        )


async def _answers(_: Peer) -> bool:
    return True


def target(count: int) -> Target:
    """What a client has of a service with so many nodes."""
    return Target(
        _View(count),
        "bench",
        ("http",),
        Selector(),
        Retries(),
        Counts(),
        secure=False,
        answers=_answers,
        gone=lambda _: None,
    )


def measure(count: int, seconds: float) -> Point:
    """CPU time of a pick, and of counting the call, as in each call."""
    service = target(count)
    pool = service.pool
    call = Call(service="bench", endpoint="Bench.Pick")

    def batch() -> int:
        began = time.thread_time_ns()
        for _ in repeat(None, _BATCH):
            peer = pool.choose(service.peers(pool), call)
            peer.outstanding += 1
            peer.outstanding -= 1
        return time.thread_time_ns() - began

    batch()  # fills the pool, and caches
    spent = [batch()]
    while sum(spent) < seconds * 1e9:
        spent.append(batch())
    return {"pick_ns": min(spent) / _BATCH}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]))))
