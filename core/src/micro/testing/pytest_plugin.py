"""The pytest plugin: fixtures of real servers, and two reports at the end of a run.

A project takes it by ``pytest_plugins = ["micro.testing.pytest_plugin"]``, in its topmost conftest.
A table shows each backend that went through a conformance suite. The last lines of the run say
which servers were not available, what helps, and how many tests that has cost. With the option
``--conformance FILE`` it writes into that page which backend keeps which promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from micro.backend import Backend
from micro.testing import _promises
from micro.testing.environment import NotAvailable, namespaced, program, required, running
from micro.testing.servers import ConsulServer, EtcdServer, NatsServer, Server

T = TypeVar("T")
S = TypeVar("S", bound=Server)

#: The names of properties by which reports of tests tell the end of the run, from any process.
NOT_AVAILABLE = "micro.not_available"
BACKEND = "micro.backend"
FEATURES = "micro.features"  # the suite's fixtures add it, once connected

# -- servers --------------------------------------------------------------------------------------


def available(name: str, obtain: Callable[[], T]) -> T:
    """What ``obtain`` returns; where it raises NotAvailable, the test is skipped.

    Where MICRO_TEST_REQUIRE names the server, the test fails instead. For a fixture::

        @pytest.fixture(scope="session")
        def redis_binary() -> Path:
            return available("redis", lambda: program("redis", "redis-server"))
    """
    try:
        return obtain()
    except NotAvailable as exc:
        text = f"{name} is not available: {exc}"
        if required(name):
            raise pytest.fail.Exception(text, pytrace=False) from exc
        raise pytest.skip.Exception(text) from exc


def killable(name: str) -> None:
    """Skip the test, which needs a server of its own, if MICRO_TEST_<NAME> gives a running one."""
    if running(name):
        variable = f"MICRO_TEST_{name.upper()}"
        exc = NotAvailable(f"{variable} names one that tests may not kill: `unset {variable}`")
        raise pytest.skip.Exception(f"{name} of its own is not available: {exc}") from exc


@pytest.fixture(scope="session")
def consul_binary() -> Path:
    """The program consul: what MICRO_TEST_CONSUL_BIN names, or the one on the PATH."""
    return available("consul", lambda: program("consul"))


@pytest.fixture(scope="session")
def etcd_binary() -> Path:
    """The program etcd: what MICRO_TEST_ETCD_BIN names, or the one on the PATH."""
    return available("etcd", lambda: program("etcd"))


@pytest.fixture(scope="session")
def nats_binary() -> Path:
    """The program nats-server: what MICRO_TEST_NATS_BIN names, or the one on the PATH."""
    return available("nats", lambda: program("nats", "nats-server"))


@pytest.fixture(scope="session")
def oldnats_binary() -> Path:
    """The program nats-server of before 2.11: what MICRO_TEST_OLDNATS_BIN names."""
    return available("oldnats", lambda: program("oldnats", "nats-server-2.10"))


@pytest.fixture(scope="module")
def consul(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ConsulServer]:
    """A Consul of this module's own: its tests may kill, pause and restart it."""
    with _of_its_own(ConsulServer, "consul", request, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module")
def etcd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer]:
    """An etcd of this module's own: its tests may kill, pause and restart it."""
    with _of_its_own(EtcdServer, "etcd", request, tmp_path_factory) as server:
        yield server


@pytest.fixture(scope="module")
def nats(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[NatsServer]:
    """A NATS server of this module's own: its tests may kill, pause and restart it."""
    with _of_its_own(NatsServer, "nats", request, tmp_path_factory) as server:
        yield server


@pytest.fixture
def consul_url(request: pytest.FixtureRequest) -> str:
    """The URL of a Consul that answers, with a namespace of this test's own."""
    return _namespace("consul", request)


@pytest.fixture
def etcd_url(request: pytest.FixtureRequest) -> str:
    """The URL of an etcd that answers, with a namespace of this test's own."""
    return _namespace("etcd", request)


@pytest.fixture
def nats_url(request: pytest.FixtureRequest) -> str:
    """The URL of a NATS server that answers, with a namespace of this test's own."""
    return _namespace("nats", request)


def _of_its_own(
    kind: Callable[[Path, Path], S],
    name: str,
    request: pytest.FixtureRequest,
    folders: pytest.TempPathFactory,
) -> S:
    killable(name)
    # Only now, since to obtain it may take minutes.
    binary: Path = request.getfixturevalue(f"{name}_binary")
    return kind(binary, folders.mktemp(name))


def _namespace(name: str, request: pytest.FixtureRequest) -> str:
    url = running(name)
    if not url:
        server: Server = request.getfixturevalue(name)
        server.start()  # an earlier test may have left it dead, or paused
        url = server.url
    return namespaced(url)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of the table of promises."""
    what = "write into this page, between its marks, which backend keeps which promise"
    parser.getgroup("micro").addoption("--conformance", type=Path, metavar="FILE", help=what)


# -- what tests tell the end of the run -----------------------------------------------------------


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note which backend a test of a suite is about."""
    tested: type = getattr(item, "cls", None) or object
    ours = [base for base in tested.__mro__ if base.__module__.startswith("micro.testing.")]
    suites = [base.__name__ for base in ours if base.__name__.endswith("Suite")]
    backend = getattr(tested, "backend", None)
    if suites and isinstance(backend, type) and issubclass(backend, Backend):
        kind = suites[0].removesuffix("Suite").lower()
        item.user_properties.append((BACKEND, f"{backend.schemes[0]} {kind}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which server a test would have needed."""
    report = yield
    if call.excinfo and isinstance(call.excinfo.value.__cause__, NotAvailable):
        report.user_properties.append((NOT_AVAILABLE, str(call.excinfo.value)))
    return report


# -- the end of the run ---------------------------------------------------------------------------

_Stats = Mapping[str, Sequence[pytest.TestReport]]

#: What pytest's lists of reports count as; of a test that is in two of them, the later one tells.
_OUTCOMES = {
    "passed": "passed",
    "xpassed": "passed",
    "skipped": "skipped",
    "xfailed": "skipped",
    "failed": "failed",
    "error": "failed",
}
_COLUMNS = ("passed", "skipped", "failed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show which backends went through a conformance suite, and how."""
    if hasattr(terminalreporter.config, "workerinput"):  # of pytest-xdist, which knows a part
        return
    if rows := _conformance(terminalreporter.stats):
        terminalreporter.section("conformance")
        for line in _aligned([("backend", *_COLUMNS, "features"), *rows]):
            terminalreporter.write_line(line)
    page: Path | None = terminalreporter.config.getoption("--conformance")
    if page is not None:
        from micro.testing.access import AccessSuite
        from micro.testing.registry import RegistrySuite
        from micro.testing.transport import TransportSuite

        suites = {"registry": RegistrySuite, "access": AccessSuite, "transport": TransportSuite}
        _promises.write(page, _outcomes(terminalreporter.stats), suites)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """Say below all else which servers were not available."""
    result = yield
    # There is none with -p no:terminal; what it writes in processes of pytest-xdist goes nowhere.
    reporter: pytest.TerminalReporter | None
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        for line in _not_available(reporter.stats):
            reporter.write_line(line, yellow=True)
    return result


def _not_available(stats: _Stats) -> Iterator[str]:
    """A line for each server, with what it has cost, and one for all that was skipped."""
    cost = Counter(
        (outcome, properties[NOT_AVAILABLE])
        for outcome, _, properties in _reported(stats)
        if NOT_AVAILABLE in properties
    )
    for (outcome, text), count in cost.items():
        yield f"{count} {outcome}: {text}"
    if cost and "skipped" in stats:
        yield f"{len(stats['skipped'])} skipped in all"


@dataclass
class _Tested:
    """A class that derives from a conformance suite."""

    backend: str
    features: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)


def _conformance(stats: _Stats) -> list[tuple[str, ...]]:
    """A row for each backend and what it can do, over all classes that test it."""
    classes: dict[str, _Tested] = {}
    for outcome, test, properties in _reported(stats):
        if BACKEND in properties:
            name = test.partition("[")[0].rpartition("::")[0]
            tested = classes.setdefault(name, _Tested(properties[BACKEND]))
            tested.features = properties.get(FEATURES, tested.features)
            tested.outcomes[test] = outcome
    rows: dict[tuple[str, str], Counter[str]] = {}
    for tested in classes.values():
        row = rows.setdefault((tested.backend, tested.features), Counter())
        row.update(tested.outcomes.values())
    return [
        (backend, *(str(row[outcome]) for outcome in _COLUMNS), features)
        for (backend, features), row in sorted(rows.items())
    ]


def _outcomes(stats: _Stats) -> Iterator[_promises.Outcome]:
    """What came of each test of a suite."""
    for category, result in _OUTCOMES.items():
        for report in stats.get(category, ()):
            backend = dict(getattr(report, "user_properties", ())).get(BACKEND)
            if backend is not None:
                name = report.nodeid.partition("[")[0].rpartition("::")[2]
                why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                yield _promises.Outcome(
                    backend, name.removeprefix("test_"), result, why.removeprefix("Skipped: ")
                )


def _reported(stats: _Stats) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Outcome, test and properties of each report."""
    for category, outcome in _OUTCOMES.items():
        for report in stats.get(category, ()):
            # A file that could not be collected has a report without any.
            properties: Iterable[tuple[str, object]] = getattr(report, "user_properties", ())
            yield outcome, report.nodeid, {key: str(what) for key, what in properties}


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of columns: the first and the last to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, last in rows:
        cells = [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=False)]
        yield "  ".join([first.ljust(widths[0]), *cells, last]).rstrip()
