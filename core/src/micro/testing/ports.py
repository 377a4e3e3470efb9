"""Ports of loopback for servers of tests."""

from __future__ import annotations

import random
import socket
from itertools import islice
from pathlib import Path

HOST = "127.0.0.1"


def unused_ports(count: int) -> tuple[int, ...]:
    """Ports of loopback on which nobody listens.

    They are none of those that the kernel gives to outgoing connections: while a server is down,
    no connection can take its port away.
    """
    # Not by the common generator: who seeds that for a test would get the same ports each time.
    tried = random.SystemRandom().sample(_lasting_ports(), 100)
    ports = tuple(islice(filter(_is_unused, tried), count))
    if len(ports) < count:
        raise RuntimeError(f"of 100 ports of {HOST} that were tried, {len(ports)} are unused")
    return ports


def _lasting_ports() -> range:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
        low, high = map(int, text.split())
    except OSError:
        low, high = 32_768, 65_535  # of what is known of kernels, the lowest and the highest
    below, above = range(10_000, low), range(high + 1, 65_536)
    most = max(below, above, key=len)
    return most if len(most) >= 1000 else range(10_000, 65_536)


def _is_unused(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
