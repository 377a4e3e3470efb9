"""The columns of the fleet, and the matrix of what was found."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.interop.columns import VERSIONS, Column
from tests.interop.gophers import Gopher
from tests.interop.ours import new_name, our_process

from micro.testing import eventually
from micro.testing._promises import Outcome, promises, table
from micro.testing.servers import Server

#: The name of the property by which a test tells the end of the run its column.
COLUMN = "micro.fleet"
_BLOCK = re.compile(r"(<!-- fleet: (v[0-9.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "try the whole fleet, and write into that page what came of it"
    parser.getgroup("interop").addoption("--fleet", type=Path, metavar="FILE", help=what)


def pytest_configure(config: pytest.Config) -> None:
    what = "patient(names): in columns of these registries or versions only with --fleet"
    config.addinivalue_line("markers", what)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Have what a column needs obtained before the first test starts."""
    whole = config.getoption("--fleet", default=None) is not None
    left_out = []
    for item in items:
        column = _column(item)
        if column is None or not isinstance(item, pytest.Function):
            continue
        item.user_properties.append((COLUMN, str(column)))
        if not whole and (column.cannot or _is_for_the_patient(item, column)):
            left_out.append(item)
        elif not column.cannot:
            item.fixturenames = [*item.fixturenames, *column.fixtures]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _column(item: pytest.Item) -> Column | None:
    spec = getattr(item, "callspec", None)
    column = None if spec is None else spec.params.get("column")
    return column if isinstance(column, Column) else None


def _is_for_the_patient(item: pytest.Item, column: Column) -> bool:
    names = {name for mark in item.iter_markers("patient") for name in mark.args}
    return bool(names & {column.registry, column.version})


# -- fixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def column(request: pytest.FixtureRequest) -> Iterator[Column]:
    """The column of this test, which both sides are set to."""
    column: Column = request.param
    if column.cannot:
        pytest.skip(column.cannot)
    address = ""
    if column.registry != "mdns":
        server: Server = request.getfixturevalue(column.registry)
        server.start()
        address = server.address
    with pytest.MonkeyPatch.context() as patch:
        for name, value in column.environment(address).items():
            patch.setenv(name, value)
        yield column


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, column: Column) -> Path:
    """The program of the column's Go Micro."""
    path: Path = request.getfixturevalue(f"{VERSIONS[column.version]}_binary")
    return path


@pytest.fixture(scope="module")
def go(program: Path) -> Iterator[Gopher]:
    """A process of Go Micro, which tests leave alive."""
    with Gopher(program, new_name()) as gopher:
        yield gopher


@pytest.fixture(scope="module")
def ours(go: Gopher) -> Iterator[str]:
    """A service of ours that Go knows, in a process of its own, which tests leave alive."""
    name = new_name()
    with our_process(name):
        asyncio.run(eventually(lambda: go.knows(name)))
        yield name


@pytest.fixture
def name() -> str:
    return new_name()


# -- the matrix -----------------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the matrix; with --fleet, write it."""
    if hasattr(terminalreporter.config, "workerinput"):  # of pytest-xdist, which knows a part
        return
    from tests.interop.test_fleet import TestFleet

    outcomes = list(_outcomes(terminalreporter))
    tables: dict[str, str] = {}
    for version in VERSIONS:
        if of_version := [one for one in outcomes if one.backend.endswith(version)]:
            tables[version] = table(promises(TestFleet), of_version)
            terminalreporter.section(f"fleet with Go Micro {version}")
            terminalreporter.write(tables[version])
    page: Path | None = terminalreporter.config.getoption("--fleet", default=None)
    if page is not None:
        page.write_text(_BLOCK.sub(lambda block: _written(block, tables), page.read_text()))


def _written(block: re.Match[str], tables: dict[str, str]) -> str:
    """A version that was not tried keeps the table that it has."""
    text = tables.get(block[2])
    return block[0] if text is None else f"{block[1]}{text}{block[3]}"


def _outcomes(reporter: pytest.TerminalReporter) -> Iterator[Outcome]:
    """What came of each test of a column."""
    for category in ("passed", "skipped", "failed", "error"):
        for report in reporter.stats.get(category, ()):
            column = dict(getattr(report, "user_properties", ())).get(COLUMN)
            if column is not None and "::TestFleet::" in report.nodeid:
                test = report.nodeid.partition("[")[0].rpartition("::test_")[2]
                why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
                result = category.replace("error", "failed")
                yield Outcome(column, test, result, why.removeprefix("Skipped: "))
