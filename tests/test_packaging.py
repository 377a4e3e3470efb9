"""Each distribution can be released on its own, and is what its metadata says.

The rules are functions from a folder to what breaks them there; each is shown to find something.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from micro.plugins import _KNOWN

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
RANGE = re.compile(r"micro-core(\[testing\])?>=\d+(\.\d+)*,<\d+(\.\d+)*")

#: The modules of a plugin that say what an interface promises, in terms of its client.
INTERFACES = {"__init__", "_registry", "_transport", "_broker", "_events", "_store", "_sync"}

INVENTED = '[project.urls]\nSource = "https://here"\n\n[tool.hatch.build.targets.wheel]'

Rule = Callable[[Path], Iterator[str]]


def project(folder: Path) -> dict[str, Any]:
    """The table [project] of a distribution."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def package(folder: Path) -> str:
    """The package that a distribution has, as its folder is called."""
    return "micro" if folder.name == "core" else f"micro_plugin_{folder.name}"


def needs(folder: Path) -> list[str]:
    """What it depends on, with and without extras."""
    table = project(folder)
    extras = table.get("optional-dependencies", {}).values()
    return [*table["dependencies"], *(need for extra in extras for need in extra)]


def name_of(requirement: str) -> str:
    """The name of a distribution, as an index compares it."""
    found = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0].lower()) if found else ""


# -- the rules for every distribution -------------------------------------------------------------


def incomplete_metadata(folder: Path) -> Iterator[str]:
    """Metadata that an index shows and that is missing, and files that it names."""
    table = project(folder)
    for key in ("description", "keywords"):
        if not table.get(key):
            yield key
    expected = {"license": "Apache-2.0", "license-files": ["LICENSE"], "readme": "README.md"}
    yield from (key for key, value in expected.items() if table.get(key) != value)
    if (folder / "LICENSE").read_text() != (ROOT / "LICENSE").read_text():
        yield "LICENSE is not that of the repository"
    if not (folder / "README.md").read_text().startswith(f"# {table['name']}\n"):
        yield "README.md does not begin with the name"


def wrong_classifiers(folder: Path) -> Iterator[str]:
    """Classifiers that are missing; the Pythons are those of the core."""
    here = project(folder)
    core = project(ROOT / "core")
    python = "Programming Language :: Python"
    wanted = {"Typing :: Typed", *(line for line in core["classifiers"] if line.startswith(python))}
    yield from sorted(wanted - set(here["classifiers"]))
    if here["requires-python"] != core["requires-python"]:
        yield "requires-python"


def wrong_version(folder: Path) -> Iterator[str]:
    """A version that others have on the index, or that the changelog does not tell."""
    version = project(folder)["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield f"{version} is not X.Y.Z"
    elif tuple(map(int, version.split("."))) <= (0, 0, 1):
        yield f"{version} is not above 0.0.1"
    changelog = (folder / "CHANGELOG.md").read_text()
    for heading in ("Unreleased", version):
        if f"\n## [{heading}]" not in changelog:
            yield f"CHANGELOG.md has no section [{heading}]"
    if "https://keepachangelog.com/" not in changelog:
        yield "CHANGELOG.md does not say how it is kept"


def untyped(folder: Path) -> Iterator[str]:
    """A package that type checkers pass over, or that is not in the wheel."""
    source = f"src/{package(folder)}"
    if not (folder / source / "py.typed").is_file():
        yield f"{source}/py.typed"
    built = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    if built["targets"]["wheel"] != {"packages": [source]}:
        yield "the wheel is not that package alone"
    if not {"src", "tests", "CHANGELOG.md"} <= set(built["targets"]["sdist"]["include"]):
        yield "the sdist has not all that tests need"


def invented_urls(folder: Path) -> Iterator[str]:
    """URLs in the sources: building takes them from the repository that it builds in."""
    yield from project(folder).get("urls", {})


def bad_pins(folder: Path) -> Iterator[str]:
    """Needs of ours that are not the core by range; a plugin needs no other plugin."""
    ours = [need for need in needs(folder) if name_of(need).split("-")[0] == "micro"]
    if folder.name == "core":
        yield from (need for need in ours if need != "micro-core")
        return
    yield from (need for need in ours if not RANGE.fullmatch(need))
    if not any(RANGE.fullmatch(need) for need in project(folder)["dependencies"]):
        yield "no micro-core>=X,<Y"


# -- the rules for plugins ------------------------------------------------------------------------


def wrong_names(folder: Path) -> Iterator[str]:
    """Names that do not follow from the folder's."""
    table = project(folder)
    if table["name"] != f"micro-plugin-{folder.name}":
        yield table["name"]
    points = table.get("entry-points", {}).get("micro.backends", {})
    if folder.name not in points:
        yield f"micro.backends has no scheme {folder.name}"
    yield from (f"{name} = {value}" for name, value in points.items() if value != package(folder))


def wrong_schemes(folder: Path) -> Iterator[str]:
    """Entry points that the package does not keep, and the other way round."""
    name = package(folder)
    shown = json.loads(
        python_of(
            folder,
            f"import json, {name} as plugin\n"
            "print(json.dumps([s for b in plugin.micro_backends() for s in b.schemes]))",
        )
    )
    points = project(folder)["entry-points"]["micro.backends"]
    yield from sorted(set(shown) ^ set(points))


def early_imports(folder: Path) -> Iterator[str]:
    """Distributions, other than the core and its own, that importing the package loads."""
    core = {"micro-core", *map(name_of, project(ROOT / "core")["dependencies"])}
    later = set(map(name_of, needs(folder))) - core
    shown = python_of(folder, f"import sys, {package(folder)}\nprint(*sys.modules)").split()
    where = packages_distributions()
    for module in sorted({name.partition(".")[0] for name in shown}):
        yield from (f"{module} of {d}" for d in where.get(module, ()) if name_of(d) in later)


def forbidden_imports(folder: Path) -> Iterator[str]:
    """Imports of other plugins, of what is not public, of the client library by an interface."""
    own = package(folder)
    clients = {
        module
        for module, where in packages_distributions().items()
        if {name_of(need) for need in needs(folder)} & set(map(name_of, where))
    } - {"micro", "msgspec"}
    for path in sorted(folder.glob("src/**/*.py")):
        for module in imported(path):
            top = module.partition(".")[0]
            if top.startswith("micro_plugin_") and top != own:
                yield f"{path.name}: {module}"
            if top == "micro" and re.search(r"\.(_|backends|testing|cli)", module):
                yield f"{path.name}: {module}"
            if top in clients and path.stem in INTERFACES:
                yield f"{path.name}: {module}"


def imported(path: Path) -> Iterator[str]:
    """All that a module imports, names of ``from`` included, but for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def long_modules(folder: Path) -> Iterator[str]:
    """Modules of a plugin above 250 lines: what is common belongs to the core."""
    for path in sorted(folder.glob("src/**/*.py")):
        lines = len(path.read_text().splitlines())
        most = 30 if path.name == "__init__.py" else 250
        if lines > most and not path.name.endswith("_pb2.py"):
            yield f"{path.name} has {lines} lines"


def python_of(folder: Path, program: str) -> str:
    """What a program says in a fresh interpreter that has the package, installed or not."""
    paths = [folder / "src", ROOT / "core/src"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, text=True, capture_output=True, check=True
    )
    return done.stdout


EVERYWHERE: list[Rule] = [
    incomplete_metadata,
    wrong_classifiers,
    wrong_version,
    untyped,
    invented_urls,
    bad_pins,
]
OF_PLUGINS: list[Rule] = [
    wrong_names,
    wrong_schemes,
    early_imports,
    forbidden_imports,
    long_modules,
]


@pytest.mark.parametrize("rule", EVERYWHERE, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("folder", [ROOT / "core", *PLUGINS], ids=lambda folder: folder.name)
def test_no_distribution_has(folder: Path, rule: Rule) -> None:
    assert not list(rule(folder))


@pytest.mark.parametrize("rule", OF_PLUGINS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("folder", PLUGINS, ids=lambda folder: folder.name)
def test_no_plugin_has(folder: Path, rule: Rule) -> None:
    assert not list(rule(folder))


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A plugin as the repository makes it."""
    tree = tmp_path / "repository"
    shutil.copytree(ROOT / "tools/new_plugin", tree / "tools/new_plugin")
    for file in ("LICENSE", "core/pyproject.toml"):
        (tree / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tree / file)
    tool = str(ROOT / "tools/new_plugin.py")
    command = [sys.executable, tool, "--root", str(tree), "sample"]
    subprocess.run(command, check=True, capture_output=True)
    return tree / "plugins/sample"


@pytest.mark.parametrize("rule", [*EVERYWHERE, *OF_PLUGINS], ids=lambda rule: rule.__name__)
def test_a_new_plugin_has_no(plugin: Path, rule: Rule) -> None:
    assert not list(rule(plugin))


@pytest.mark.parametrize(
    ("rule", "file", "old", "new"),
    [
        (incomplete_metadata, "pyproject.toml", "keywords =", "authors ="),
        (incomplete_metadata, "LICENSE", "Apache", "Another"),
        (incomplete_metadata, "README.md", "# micro-plugin-sample", "# Sample"),
        (wrong_classifiers, "pyproject.toml", '    "Typing :: Typed",\n', ""),
        (wrong_classifiers, "pyproject.toml", ">=3.11", ">=3.12"),
        (wrong_version, "pyproject.toml", 'version = "0.1.0"', 'version = "0.0.1"'),
        (wrong_version, "pyproject.toml", 'version = "0.1.0"', 'version = "0.1.0rc1"'),
        (wrong_version, "CHANGELOG.md", "## [0.1.0]", "## [0.2.0]"),
        (wrong_version, "CHANGELOG.md", "## [Unreleased]", "## Coming"),
        (untyped, "pyproject.toml", '"src/micro_plugin_sample"', '"src"'),
        (untyped, "pyproject.toml", '"tests", ', ""),
        (invented_urls, "pyproject.toml", "[tool.hatch.build.targets.wheel]", INVENTED),
        (bad_pins, "pyproject.toml", "micro-core>=0.1,<0.2", "micro-core==0.1.0"),
        (bad_pins, "pyproject.toml", "micro-core>=0.1,<0.2", "micro-core>=0.1"),
        (bad_pins, "pyproject.toml", "micro-core>=0.1,<0.2", "micro-plugin-etcd>=0.1,<0.2"),
        (wrong_names, "pyproject.toml", '"micro-plugin-sample"', '"micro-sample"'),
        (wrong_names, "pyproject.toml", "sample =", "other ="),
        (wrong_names, "pyproject.toml", '= "micro_plugin_sample"', '= "sample"'),
        (wrong_schemes, "src/micro_plugin_sample/_registry.py", '("sample",)', '("other",)'),
        (early_imports, "pyproject.toml", "dependencies = [", 'dependencies = ["hypothesis",'),
        (forbidden_imports, "pyproject.toml", "dependencies = [", 'dependencies = ["hypothesis",'),
        (forbidden_imports, "src/micro_plugin_sample/_registry.py", "micro.url", "micro._url"),
        (forbidden_imports, "src/micro_plugin_sample/_client.py", "micro.url", "micro.testing"),
        (long_modules, "src/micro_plugin_sample/__init__.py", "@hookimpl", "\n" * 30),
    ],
)
def test_rule_finds(plugin: Path, rule: Rule, file: str, old: str, new: str) -> None:
    path = plugin / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    if "hypothesis" in new:
        module = plugin / "src/micro_plugin_sample/_registry.py"
        module.write_text(f"{module.read_text()}\nimport hypothesis\n")

    assert list(rule(plugin))


def test_core_imports_no_plugin() -> None:
    modules = [name for path in ROOT.glob("core/src/**/*.py") for name in imported(path)]
    assert "micro.errors.ConfigError" in modules
    assert not [name for name in modules if name.startswith("micro_plugin_")]


def test_core_points_to_no_plugin_that_is_not_here() -> None:
    assert set(_KNOWN.values()) <= {project(folder)["name"] for folder in PLUGINS}


def test_no_text_installs_the_core_by_name() -> None:
    texts = [
        *ROOT.glob("*.*"),
        *(path for name in ("core", "docs", "plugins", "tools", ".github", ".ci")
          for path in ROOT.glob(f"{name}/**/*")),
    ]  # fmt: skip
    found = re.compile(r"pip install [^\n`]*\bmicro-core\b")
    assert not [
        path
        for path in texts
        if path.is_file() and path.suffix in {".md", ".py", ".toml", ".yml", ".ini"}
        if found.search(path.read_text())
    ]
