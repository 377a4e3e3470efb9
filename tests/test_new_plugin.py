"""A new plugin is right in all but what its author has to write, and says what that is."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[1]

#: What an author writes, here for a server that is a dictionary of the same process.
CLIENT = {
    "__aenter__": """
import sys
servers = vars(sys).setdefault("sample servers", {})
self.records = servers.setdefault(self._url.hosts, {})
return self
""",
    "__aexit__": "pass",
}
REGISTRY = {
    "_put": """
import time
client.records[key] = (record, time.monotonic() + ttl)
""",
    "_read": """
import time
now = time.monotonic()
records = sorted((key, *kept) for key, kept in client.records.items() if key.startswith(prefix))
return now, [record for _, record, until in records if until > now]
""",
    "_delete": "client.records.pop(key, None)",
    "_changes": """
import asyncio
before = {(node.service, node.id): node for node in nodes}
while True:
    mark, records = await self._read(client, prefix)
    now = {(node.service, node.id): node for node in self._nodes(records)}
    for id_ in before.keys() - now.keys():
        yield mark, Change(kind="delete", node=before[id_])
    for id_, node in now.items():
        if before.get(id_) != node:
            yield mark, Change(kind="update" if id_ in before else "create", node=node)
    before = now
    yield mark, None
    await asyncio.sleep(0.01)
""",
}
CONFTEST = """
import uuid

import pytest


@pytest.fixture
def sample():
    return None


@pytest.fixture
def sample_url():
    return f"sample://in-process/{uuid.uuid4().hex}"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """As much of the repository as a plugin needs, and the plugin ``sample``."""
    (tmp_path / "core").mkdir()
    (tmp_path / "core/src").symlink_to(ROOT / "core/src")
    for file in ("LICENSE", "pyproject.toml", "core/pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    made = make(tmp_path, "sample")
    assert made.returncode == 0, made.stderr
    return tmp_path


def make(tree: Path, name: str) -> subprocess.CompletedProcess[str]:
    """Run the command that makes a plugin."""
    return run(tree, ROOT / "tools/new_plugin.py", "--root", tree, name)


def run(tree: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program in the tree, with the sources of the core and of ``sample``."""
    sources = [str(tree / "core/src"), str(tree / "plugins/sample/src")]
    paths = os.pathsep.join(sources)
    environment = {**os.environ, "PYTHONPATH": paths, "MYPYPATH": paths}
    return subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def outcomes(tree: Path) -> dict[str, str]:
    """How the plugin's tests ended: skipped, passed, what is to be written, or what is wrong."""
    report = tree / "report.xml"
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={report}"]
    ran = run(tree, "-m", "pytest", *options, "plugins/sample")
    assert report.exists(), ran.stdout + ran.stderr
    return {
        f"{test.get('classname')}.{test.get('name')}": _outcome(test)
        for test in ET.parse(report).iter("testcase")
    }


def _outcome(test: ET.Element) -> str:
    for outcome in test:
        if outcome.tag in ("failure", "error"):
            unwritten = re.search(r"NotImplementedError: ([\w.]+):", outcome.text or "")
            return unwritten[1] if unwritten else outcome.text or outcome.tag
        if outcome.tag == "skipped":
            return "skipped"
    return "passed"


def write(path: Path, bodies: Mapping[str, str]) -> None:
    """Write these methods, which only say what they should do."""
    lines = path.read_text().splitlines()
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in bodies
    ]
    for function in sorted(functions, key=lambda function: function.lineno, reverse=True):
        says = function.body[-1]
        assert isinstance(says, ast.Raise)
        body = bodies[function.name].strip().splitlines()
        lines[says.lineno - 1 : says.end_lineno] = [f"        {line}" for line in body]
        first = function.lineno - 1
        if "yield" in bodies[function.name]:
            lines[first] = lines[first].replace("    def", "    async def")
    path.write_text("\n".join(lines) + "\n")


def quicker(path: Path, old: str, new: str) -> None:
    """Change what makes the suite take its time."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_its_style_and_types_are_right(tree: Path) -> None:
    for check in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = run(tree, "-m", *check, "plugins")
        assert done.returncode == 0, done.stdout
    done = run(tree, "-m", "mypy", "--follow-imports=silent", "plugins/sample")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["x", "abcdefghijklmnop"])
def test_its_style_is_right_whatever_its_name(tree: Path, name: str) -> None:
    assert make(tree, name).returncode == 0
    for check in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = run(tree, "-m", *check, "plugins")
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "write one label"),
        ("Sample", "write one label"),
        ("a-b", "write one label"),
        ("a.b", "write one label"),
        ("../a", "write one label"),
        ("1a", "write one label"),
        ("abcdefghijklmnopq", "write one label"),
        ("sample", "plugins/sample is there already"),
        ("memory", "the core has this scheme"),
    ],
)
def test_a_name_is_refused(tree: Path, name: str, told: str) -> None:
    before = sorted(tree.glob("plugins/**/*"))

    done = make(tree, name)

    assert done.returncode == 1
    assert told in done.stderr
    assert sorted(tree.glob("plugins/**/*")) == before


def test_its_metadata_can_be_built(tree: Path) -> None:
    done = run(tree / "plugins/sample", "-m", "hatchling", "build", "-t", "wheel", "-d", tree)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tree.glob("*.whl")] == [
        "micro_plugin_sample-0.1.0-py3-none-any.whl"
    ]


def test_tox_has_environments_for_it(tree: Path) -> None:
    for file in ("tox.ini", "toxfile.py"):
        shutil.copy(ROOT / file, tree / file)
    shown = run(tree, "-m", "tox", "config", "-e", "py311-sample", "-k", "deps", "commands")
    assert "-e ./core[testing]\n  -e ./plugins/sample[testing]" in shown.stdout
    assert "commands = pytest plugins/sample/tests" in shown.stdout
    listed = run(tree, "-m", "tox", "list", "--no-desc").stdout.split()
    assert {f"py3{minor}-sample" for minor in (11, 12, 13, 14)} <= set(listed)


def test_without_a_server_just_the_conformance_tests_fail(tree: Path) -> None:
    found = outcomes(tree)
    failed = {test for test, outcome in found.items() if outcome == "command"}
    assert failed
    assert all(".test_conformance." in test for test in failed)
    assert {outcome for test, outcome in found.items() if ".test_plugin." in test} == {"passed"}
    assert set(found.values()) <= {"command", "passed", "skipped"}


@pytest.mark.timeout(180)
def test_failures_name_what_is_to_be_written_until_all_pass(tree: Path) -> None:
    package = tree / "plugins/sample/src/micro_plugin_sample"
    (tree / "plugins/sample/tests/conftest.py").write_text(CONFTEST)
    ended = {"passed", "skipped"}

    assert set(outcomes(tree).values()) - ended == {"Client.__aenter__"}

    write(package / "_client.py", CLIENT)
    assert set(outcomes(tree).values()) - ended == {"_put", "_read"}

    write(package / "_registry.py", REGISTRY)
    quicker(package / "_registry.py", "min_ttl=1.0", "min_ttl=0.2")
    quicker(
        tree / "plugins/sample/tests/test_conformance.py",
        "    backend =",
        "    model_examples = 5\n    backend =",
    )
    found = outcomes(tree)
    assert set(found.values()) == ended
    assert list(found.values()).count("passed") > list(found.values()).count("skipped")
