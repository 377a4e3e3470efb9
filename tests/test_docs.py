"""Every Python snippet of the documentation runs, and its tables tell what is."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CodeType, ModuleType

import pytest
from tools import tables

import micro
from micro.cli import _health, _report, _services, _upkeep
from micro.installed import GROUPS
from micro.settings import SETTINGS
from micro.testing import AccessSuite, RegistrySuite, TransportSuite
from micro.testing._promises import promises

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "core" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("plugins/**/README.md")),
]
PLUGINS = (ROOT / "docs" / "plugins.md").read_text()
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TOML = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[CodeType]:
    """The Python blocks of a page, each with the line numbers of the page."""
    text = page.read_text()
    blocks = []
    for match in _BLOCK.finditer(text):
        shifted = "\n" * text.count("\n", 0, match.start(1)) + match[1]
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        blocks.append(compile(shifted, str(page), "exec", flags, dont_inherit=True))
    return blocks


@asynccontextmanager
async def running(module: ModuleType, code: CodeType) -> AsyncIterator[None]:
    """The page's own service, for a snippet that calls it from a service of its own."""
    service = getattr(module, "service", None)
    if isinstance(service, micro.Service) and "web" in code.co_consts:
        async with service:
            yield
    else:
        yield


@pytest.mark.asyncio
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_every_snippet_runs(page: Path) -> None:
    module = ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module
    for code in snippets(page):
        async with running(module, code):
            result = eval(code, vars(module))
            if inspect.iscoroutine(result):
                await result


def test_there_are_snippets_to_run() -> None:
    assert sum(len(snippets(page)) for page in PAGES) >= 6


def test_settings_page_has_every_setting_and_no_other() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert re.findall(r"^\| `--(\w+)`", page, re.MULTILINE) == [one.name for one in SETTINGS]
    assert re.findall(r"`MICRO_(\w+)`", page) == [one.name.upper() for one in SETTINGS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_say_what_the_code_says(page: Path) -> None:
    assert page.read_text() == tables.current(page), "run: python3 dev.py docs"


# -- the page on micro bench and micro health --------------------------------------------------


def test_bench_page_has_every_field_and_every_problem() -> None:
    page = (ROOT / "docs" / "bench.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    named = [name for first, _ in rows for name in re.findall(r"`(\w+)`", first)]
    assert sorted(named) == sorted([*_report.Report.__struct_fields__, *_health.PROBLEMS])
    inner = {name: set(re.findall(r"`(\w+)`", text)) for name, text in rows}
    for name, shape in (
        ("`latency`", _report.Latency),
        ("`histogram`", _report.Row),
        ("`errors`", _report.Errors),
        ("`warm_up`", _report.Uncounted),
    ):
        assert inner[name] == set(shape.__struct_fields__)
    assert all(f"`{name}`" in page for name in _health.Answer.__struct_fields__)


def test_page_on_registering_has_every_event() -> None:
    page = (ROOT / "docs" / "register.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \|$", page, re.MULTILINE)
    named = {name for first in rows for name in re.findall(r"`(\w+)`", first)}
    assert named >= {*_services.EVENTS, *_upkeep.EVENTS}


# -- the page on plugins ---------------------------------------------------------------------------


def test_plugin_page_shows_the_example_and_its_test() -> None:
    assert (ROOT / "examples/dir_registry.py").read_text() in PLUGINS
    test = (ROOT / "examples/test_dir_registry.py").read_text()
    line = "from examples.dir_registry import DirRegistry\n"  # on the page it stands above
    assert test.replace(line, "") in PLUGINS
    assert line in test


def test_entry_points_of_the_plugin_page_are_those_that_are_looked_for() -> None:
    (block,) = _TOML.findall(PLUGINS)
    assert set(tomllib.loads(block)["project"]["entry-points"]) == set(GROUPS)


class Clone:
    """As much of the repository as the commands of the page need, and what they install there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.installed = folder / "installed"
        for name in ("LICENSE", "pyproject.toml", "core", "examples", "plugins/README.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(ROOT / name)

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        """Do what a line of the page says, with the tools that this process has."""
        match line.split():
            case ["python3", "dev.py", "new_plugin", *names]:
                command = [str(ROOT / "tools/new_plugin.py"), "--root", str(self.folder), *names]
            case ["python3", "dev.py", "tests", *paths]:
                command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
            case ["pip", "install", *paths]:
                offline = ["--no-deps", "--no-build-isolation", "--target", str(self.installed)]
                command = ["-m", "pip", "install", "--quiet", *offline, *paths]
            case ["micro", *arguments]:
                command = ["-m", "micro", *arguments]
            case _:
                raise AssertionError(f"no way to run {line!r} here")
        sources = [self.installed, *self.folder.glob("plugins/*/src")]
        packages = os.pathsep.join(map(str, sources))
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": packages},
            text=True,
            capture_output=True,
            check=False,
        )


@pytest.mark.timeout(240)
def test_commands_of_the_plugin_page_run(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    shown = []
    for line in "".join(_SHELL.findall(PLUGINS)).splitlines():
        command, _, remark = line.partition("  # ")
        ran = clone.run(command)
        shown.append(ran.stdout)
        assert (ran.returncode == 0) != remark.startswith("fails"), ran.stdout + ran.stderr
        if remark.startswith("fails"):
            assert "NotImplementedError: " in ran.stdout
    assert "scheme acme: registry" in shown[-1]


@pytest.mark.parametrize(
    ("kind", "suite", "backends"),
    [
        ("registry", RegistrySuite, ["consul", "etcd", "mdns", "memory", "nats", "nats-kv"]),
        ("access", AccessSuite, ["consul", "etcd", "nats", "nats-kv"]),
        ("transport", TransportSuite, ["http", "memory", "tcp"]),
    ],
)
def test_conformance_page_has_every_promise_of_every_backend_and_all_are_kept(
    kind: str, suite: type[object], backends: list[str]
) -> None:
    """Written by ``python3 dev.py conformance``."""
    page = (ROOT / "docs" / "conformance.md").read_text()
    block = page.partition(f"<!-- conformance: {kind} -->\n")[2].partition("<!-- end -->")[0]
    head, _, *rows = (line.strip("| ").split(" | ") for line in block.splitlines() if "|" in line)
    assert head == ["promise", *(f"`{name}`" for name in backends)]
    assert [row[0].replace(" ", "_") for row in rows] == promises(suite)
    assert {cell.rstrip("0123456789)") for row in rows for cell in row[1:]} <= {"yes", "", " "}
