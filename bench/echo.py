"""Unary calls with a small message, side by side: what a call costs at 1, 64 and 256 callers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import msgspec
from bench.load import Job, Point
from bench.processes import free_port, output, running, wait_for
from bench.rounds import Spread, in_turns, spread

CALLERS = (1, 64, 256)
#: A name for the table; the module of bench/peers, less _server or _client, and its option.
PEERS: Mapping[str, tuple[str, ...]] = {
    "micro (uvloop)": ("micro",),
    "micro (asyncio loop)": ("micro", "--asyncio"),
    "grpc.aio (asyncio loop)": ("grpc",),
    "grpc.aio (uvloop)": ("grpc", "--uvloop"),
}
BASE = "grpc.aio (asyncio loop)"


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One competitor at one number of callers, over all rounds."""

    calls_per_s: Spread
    p50_us: Spread
    p99_us: Spread
    client_cpu_us: Spread
    server_cpu_us: Spread


def echo(rounds: int, seconds: float) -> dict[str, dict[str, Level]]:
    """By number of callers, then by competitor."""
    found: dict[str, dict[str, Level]] = {}
    for callers in CALLERS:
        competitors = {
            name: partial(_point, peer, callers, seconds) for name, peer in PEERS.items()
        }
        points = in_turns(competitors, rounds=rounds)
        found[str(callers)] = {name: _level(many) for name, many in points.items()}
    return found


def _point(peer: tuple[str, ...], callers: int, seconds: float) -> Point:
    """One measurement, by a fresh pair of processes."""
    name, *options = peer
    port = free_port()
    with running(f"{name}_server", port, *options) as server:
        wait_for(server, port)
        job = Job(
            port=port,
            server_pid=server.pid,
            callers=callers,
            warm_up=seconds / 2,
            seconds=seconds,
        )
        printed = output(f"{name}_client", *options, msgspec.json.encode(job).decode())
    return msgspec.json.decode(printed, type=Point)


def _level(points: list[Point]) -> Level:
    return Level(
        calls_per_s=spread(point.calls_per_s for point in points),
        p50_us=spread(point.p50_us for point in points),
        p99_us=spread(point.p99_us for point in points),
        client_cpu_us=spread(point.client_cpu_us for point in points),
        server_cpu_us=spread(point.server_cpu_us for point in points),
    )
