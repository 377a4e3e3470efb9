"""Tests of transports and services run on asyncio's own loop and, where installed, on uvloop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping

import pytest
from hypothesis import settings

# Speed belongs to the benchmarks; here it would be that of a busy machine.
settings.register_profile("micro", deadline=None)
settings.load_profile("micro")

_ON_BOTH = (
    "TransportSuite",
    "test_deadline.py",
    "test_http.py",
    "test_http_client.py",
    "test_http_refused.py",
    "test_http_streams.py",
    "test_port.py",
    "test_proxy.py",
    "test_service.py",
    "test_tcp.py",
    "test_tcp_client.py",
    "test_tcp_server.py",
    "test_tcp_streams.py",
    "test_tls.py",
)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    bases = item.cls.__mro__ if isinstance(item, pytest.Function) and item.cls else ()
    if not {item.path.name, *(base.__name__ for base in bases)}.isdisjoint(_ON_BOTH):
        try:
            import uvloop
        except ImportError:
            return loops
        loops["uvloop"] = uvloop.new_event_loop
    return loops


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a test sets up of logging ends with it."""
    ours = logging.getLogger("micro")
    handlers, level = list(logging.root.handlers), ours.level
    yield
    logging.root.handlers[:] = handlers
    ours.setLevel(level)
