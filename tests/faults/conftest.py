"""The options of the faults, the fleet that they befall, and a table of what came of it."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.backends import BACKENDS, Backend
from tests.faults.calls import Served, Stage
from tests.faults.fleet import Fleet
from tests.faults.observers import Journal, Observed
from tests.faults.survivors import Survivors

from micro.registry import Registry

SEED = pytest.StashKey[int]()
#: The name of the property by which a test tells the end of the run what came of it.
FIGURES = "micro.faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--full", action="store_true", help="all faults, instead of some of each kind")
    group.addoption("--seed", type=int, help="what all chance follows from, to repeat a run")
    group.addoption(
        "--seeds", type=int, help="runs of churn on a real server; 40 times as many on memory"
    )
    group.addoption("--kills", type=int, help="how often each server of a registry is killed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")
    config.addinivalue_line("markers", "alone: measures this machine, so that no other may run")
    seed = config.getoption("--seed", None)
    if seed is None:
        seed = getattr(config, "workerinput", {}).get("faults_seed")
    config.stash[SEED] = random.SystemRandom().randrange(10**6) if seed is None else seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Have all processes of pytest-xdist follow the seed that is shown."""
    node.workerinput["faults_seed"] = node.config.stash[SEED]


def pytest_report_header(config: pytest.Config) -> str:
    return f"faults: --seed {config.stash[SEED]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full", default=False):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [
        (report.nodeid.rpartition("::")[2], value)
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "teardown"
        for name, value in report.user_properties
        if name == FIGURES
    ]
    if rows:
        terminalreporter.section("faults")
        for test, figures in rows:
            terminalreporter.write_line(f"{figures}  {test}")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full", default=False))


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest, full: bool) -> int:
    """How often a server is killed."""
    return request.config.getoption("--kills", default=None) or (20 if full else 2)


@pytest.fixture(scope="session")
def memory_seeds(full: bool, seeds: int) -> int:
    """Runs of churn on memory, of which each takes a quarter of a second."""
    return 40 * seeds if full or seeds > 1 else 8


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest, full: bool) -> int:
    """Runs of churn on a real server."""
    return request.config.getoption("--seeds", default=None) or (5 if full else 1)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """A test's own, so that it does the same alone as among others."""
    return random.Random(f"{request.config.stash[SEED]} {request.node.name}")


@pytest.fixture
def journal(request: pytest.FixtureRequest) -> Iterator[Journal]:
    """What is wrong of calls, and what this process logs as an error; told as the test ends."""
    journal = Journal(f"repeat it by: --seed {request.config.stash[SEED]}")
    logging.getLogger().addHandler(journal)
    yield journal
    gc.collect()  # what nobody has awaited says so now
    logging.getLogger().removeHandler(journal)
    try:
        journal.check()
    except AssertionError as exc:
        exc.add_note(journal.text)
        raise


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A service in another process; it has to be there at the end, without a complaint."""
    with Served(tmp_path) as served:
        yield served
        served.check()


@pytest.fixture
def stage(
    request: pytest.FixtureRequest,
    served: Served,
    journal: Journal,
    chance: random.Random,
    full: bool,
) -> Iterator[Stage]:
    stage = Stage(served, journal, chance, full=full)
    yield stage
    if stage.figures:
        request.node.user_properties.append((FIGURES, stage.figures))


@pytest.fixture
def backend() -> Backend:
    """The registry that a fleet uses, where the test names no other."""
    return BACKENDS["etcd"]


@pytest.fixture
def observed() -> Callable[[Registry, Journal], Observed]:
    """What the fleet's own parts use; its processes use the plugin itself."""
    return Observed


@pytest.fixture
def fleet(
    request: pytest.FixtureRequest,
    backend: Backend,
    tmp_path: Path,
    observed: Callable[[Registry, Journal], Observed],
) -> Iterator[Fleet]:
    """One that the test has to enter."""
    server = backend.made(request, tmp_path / backend.program)
    fleet = Fleet(backend, server, tmp_path, request.config.stash[SEED], observed)
    yield fleet
    if fleet.figures:
        request.node.user_properties.append((FIGURES, fleet.figures))


@pytest.fixture
def survivors(
    request: pytest.FixtureRequest,
    etcd_url: str,
    tmp_path: Path,
    chance: random.Random,
    journal: Journal,
) -> Iterator[Survivors]:
    """Nodes, and their callers, that the test has to start."""
    survivors = Survivors(tmp_path, etcd_url, chance)
    yield survivors
    if survivors.fates:
        request.node.user_properties.append((FIGURES, str(survivors)))
