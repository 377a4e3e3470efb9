"""The programs that tests of this repository need, by tools/servers/ where the machine has none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from tools.servers.provision import RECIPES, Unobtainable, obtain

from micro.testing import NotAvailable, available
from micro.testing.environment import running


def pytest_collection_finish(session: pytest.Session) -> None:
    """Obtain what is needed before the first test starts: a test has less time than a build."""
    fixtures = {
        fixture
        for item in session.items
        if isinstance(item, pytest.Function)
        for fixture in item.fixturenames
    }
    wanted = {fixture.partition("_")[0] for fixture in fixtures}  # etcd, etcd_binary, etcd_url
    for name in wanted.intersection(RECIPES):
        if not session.config.option.collectonly and not running(name):
            with suppress(Unobtainable):  # its fixture will say why
                obtain(name)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """What a test sets up of logging ends with it, as by core/tests/conftest.py."""
    ours = logging.getLogger("micro")
    handlers, level = list(logging.root.handlers), ours.level
    yield
    logging.root.handlers[:] = handlers
    ours.setLevel(level)


@pytest.fixture(scope="session")
def consul_binary() -> Path:
    """The program consul."""
    return available("consul", partial(_obtain, "consul"))


@pytest.fixture(scope="session")
def etcd_binary() -> Path:
    """The program etcd."""
    return available("etcd", partial(_obtain, "etcd"))


@pytest.fixture(scope="session")
def nats_binary() -> Path:
    """The program nats-server."""
    return available("nats", partial(_obtain, "nats"))


@pytest.fixture(scope="session")
def oldnats_binary() -> Path:
    """The program nats-server, of before 2.11."""
    return available("oldnats", partial(_obtain, "oldnats"))


@pytest.fixture(scope="session")
def gomicro_binary() -> Path:
    """A program that is a service of Go Micro, and a client of others."""
    return available("gomicro", partial(_obtain, "gomicro"))


@pytest.fixture(scope="session")
def gomicro3_binary() -> Path:
    """The same, of Go Micro 3."""
    return available("gomicro3", partial(_obtain, "gomicro3"))


@pytest.fixture(scope="session")
def gomicro5_binary() -> Path:
    """The same, of Go Micro 5."""
    return available("gomicro5", partial(_obtain, "gomicro5"))


def _obtain(name: str) -> Path:
    try:
        return obtain(name)
    except Unobtainable as exc:
        raise NotAvailable(str(exc)) from exc
