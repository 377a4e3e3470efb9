"""The rules of the house that no linter knows.

Each rule is a function from source text to what breaks it, and each is shown to find something.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import micro

ROOT = Path(__file__).parents[1]
PROJECTS = [*ROOT.glob("core/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
DISTRIBUTIONS = [path.parent for path in PROJECTS]
SOURCES = [path for dist in DISTRIBUTIONS for path in sorted(dist.glob("src/**/*.py"))]
LONGEST_FUNCTION = 60

every_source = pytest.mark.parametrize(
    "path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES]
)


# -- reading the environment ----------------------------------------------------------------------

_READERS = {"environ", "environb", "getenv", "getenvb"}


_OF_TESTS = re.compile(r"os\.environ\.get\(f?'MICRO_TEST_")


def environment_readers(source: str, *, of_tests: bool = False) -> Iterator[str]:
    """Lines that read the environment; those that get a MICRO_TEST variable only if asked."""
    tree = ast.parse(source)
    spared = {
        node.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and _OF_TESTS.match(ast.unparse(node))
        and not of_tests
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _READERS and node not in spared:
            yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = _READERS.intersection(alias.name for alias in node.names)
            yield from (f"{node.lineno}: from os import {name}" for name in names)


@every_source
def test_only_settings_reads_the_environment(path: Path) -> None:
    if path.name != "settings.py":
        of_tests = "testing" not in path.parts
        assert not list(environment_readers(path.read_text(), of_tests=of_tests))


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['HOME']",
        "import os\ndef f(): return os.getenv('HOME')",
        "import os as system\nsystem.environ.get('HOME')",
        "from os import environ as env",
        "import os\nos.environ.get('MICRO_REGISTRY')",
        "import os\nos.environ.get('MICRO_TEST_A', os.environ)",
    ],
)
def test_environment_readers_finds(source: str) -> None:
    assert list(environment_readers(source))


def test_environment_readers_may_spare_variables_of_tests() -> None:
    source = "import os\nos.environ.get(f'MICRO_TEST_{name}', '')"
    assert not list(environment_readers(source))
    assert list(environment_readers(source, of_tests=True))


# -- the length of functions --------------------------------------------------------------------


def long_functions(source: str) -> Iterator[str]:
    """Functions with more lines than LONGEST_FUNCTION, the docstring not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = _lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) else 0)
            if lines > LONGEST_FUNCTION:
                yield f"{node.lineno}: {node.name} has {lines} lines"


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@every_source
def test_no_function_is_long(path: Path) -> None:
    assert not list(long_functions(path.read_text()))


def test_long_functions_finds() -> None:
    body = "    pass\n" * LONGEST_FUNCTION
    docstring = '    """Say.\n\n    More.\n    """\n'
    assert list(long_functions(f"def f():\n{body}"))
    assert list(long_functions(f"async def f():\n{docstring}{body}"))
    assert not list(long_functions("def f():\n" + docstring + body.removeprefix("    pass\n")))


# -- broad excepts ------------------------------------------------------------------------------


def unexplained_excepts(source: str) -> Iterator[str]:
    """``except`` of everything, without a comment that says why."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and "#" not in lines[node.lineno - 1]:
            names = (
                {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                if node.type
                else {""}
            )
            reraises = isinstance(node.body[-1], ast.Raise)
            if names & {"", "Exception", "BaseException"} and not reraises:
                yield f"{node.lineno}: {lines[node.lineno - 1].strip()}"


@every_source
def test_broad_except_says_why(path: Path) -> None:
    assert not list(unexplained_excepts(path.read_text()))


@pytest.mark.parametrize(
    "what", ["", " Exception", " BaseException as exc", " (ValueError, Exception)"]
)
def test_unexplained_excepts_finds(what: str) -> None:
    assert list(unexplained_excepts(f"try:\n    f()\nexcept{what}:\n    pass"))
    assert not list(unexplained_excepts(f"try:\n    f()\nexcept{what}:  # as f may\n    pass"))
    assert not list(unexplained_excepts(f"try:\n    f()\nexcept{what}:\n    g()\n    raise"))


# -- what `import micro` loads ------------------------------------------------------------------

_LATER = ("micro.backends", "micro.cli", "micro.testing", "click", "httptools", "dns", "pytest")


def loaded_too_early(program: str) -> list[str]:
    """Modules of _LATER that a program loads in a fresh interpreter."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        text=True,
        capture_output=True,
        check=True,
    )
    later = tuple(f"{name}." for name in _LATER)
    return [name for name in shown.stdout.split() if f"{name}.".startswith(later)]


def test_import_micro_loads_no_backend_and_nothing_of_the_command() -> None:
    assert not loaded_too_early("import micro")


@pytest.mark.parametrize("name", ["click", "micro.backends.memory", "httptools"])
def test_loaded_too_early_finds(name: str) -> None:
    assert name in loaded_too_early(f"import micro, {name}")


# -- the public names ---------------------------------------------------------------------------


def unlisted(module: ModuleType) -> set[str]:
    """Names that are public and not in __all__, or the other way round."""
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    return public ^ set(module.__all__)


def test_all_is_what_can_be_imported() -> None:
    assert not unlisted(micro)
    assert len(micro.__all__) == len(set(micro.__all__))


def test_unlisted_finds() -> None:
    module = ModuleType("example")
    module.__dict__.update(__all__=["gone", "listed"], listed=1, forgotten=2, _private=3)
    assert unlisted(module) == {"gone", "forgotten"}


# -- the distributions --------------------------------------------------------------------------


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=lambda dist: dist.name)
def test_distribution_is_complete(dist: Path) -> None:
    assert (dist / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert all((dist / name).stat().st_size for name in ("README.md", "CHANGELOG.md"))
    assert list(dist.glob("src/*/py.typed"))


# -- where suites are found -----------------------------------------------------------------------

_SUITE = re.compile(r"^class Test\w+\((Registry|Access|Transport)Suite\)", re.MULTILINE)


def test_every_suite_is_where_the_run_that_writes_the_docs_looks_for_it() -> None:
    tests = [path for dist in DISTRIBUTIONS for path in dist.glob("tests/test_*.py")]
    found = [path.name for path in tests if _SUITE.search(path.read_text(encoding="utf-8"))]
    assert len(found) > 7
    assert [name for name in found if not name.startswith("test_conformance")] == []
