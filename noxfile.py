"""What developers and the CI run, one session each: ``python3 dev.py SESSION [ARGS]``."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
ALL_PYTHONS = "--all-pythons"
COVERAGE = "--coverage"
WHOLE = "--whole"

#: Every folder that is a distribution, core first.
DISTRIBUTIONS = [
    path.parent.relative_to(ROOT)
    for path in [ROOT / "core/pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
]
#: Most tests wait, for a process or a time to live; who has none left takes some of another's.
PARALLEL = ["-n", "5", "--dist", "worksteal"]
#: Some measure this machine, and run when all others are done.
OTHERS, ALONE = ["-m", "not alone"], ["-m", "alone", "tests/faults"]
#: Outside the tree all tests are collected, so that nothing they import is missing. Those run that
#: start what is installed, and a few of each suite; `tests` has run them all.
INSTALLED = "test_cli or test_plugin or test_installed or test_pytest_plugin or test_client"
OUTSIDE = ["-k", f"{INSTALLED} or register_then_get or half_close or use_after_close"]
#: The last one has to reach the goals; the first, if it is here, is shown beside it.
BENCHMARKED = ["3.11", "3.13"]
PYTHONS = nox.project.python_versions(nox.project.load_toml(ROOT / "core/pyproject.toml"))

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.envdir = ".venv/nox"  # goes, with .venv, when dev.py is run by another Python
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests", "lint", "types", "imports", "build"]

# pyenv hides the interpreters that are installed but not chosen; we want them all.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
os.environ["PATH"] = os.pathsep.join(
    [os.environ["PATH"], *map(str, sorted(PYENV.glob("versions/3.*/bin")))]
)


@nox.session
def demo(session: nox.Session) -> None:
    """Start an example service and call it from another process."""
    install(session)
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests; --coverage: of branches; --all-pythons: on each Python that is here."""
    if ALL_PYTHONS in session.posargs:
        rest = [arg for arg in session.posargs if arg != ALL_PYTHONS]
        for python in PYTHONS:
            session.notify(f"tests_on-{python}", rest)
    else:
        pytest(session)


@nox.session(python=PYTHONS, default=False)
def tests_on(session: nox.Session) -> None:
    """All tests, on one version of Python."""
    pytest(session)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """What must hold while registries, links and services fail, in part; --full; --seed N."""
    install(session, "tests", *go())
    # More at once than other tests, and with servers of their own: these mostly wait.
    parallel = [*PARALLEL, "-n", "6", *OTHERS, "tests/faults"]
    for arguments in (parallel, ALONE):
        session.run("pytest", *arguments, *session.posargs, success_codes=[0, 5])  # 5: none of them


@nox.session(default=False)
def conformance(session: nox.Session) -> None:
    """Run every conformance suite on every backend, and write what came of it in the docs."""
    install(session, "tests", "tools", *go())
    folders = [path / "tests" for path in DISTRIBUTIONS]
    suites = [str(path) for folder in folders for path in folder.glob("test_conformance*.py")]
    page = ["--conformance", "docs/conformance.md"]
    session.run("pytest", *PARALLEL, *page, *suites, *session.posargs)


@nox.session(default=False)
def interop(session: nox.Session) -> None:
    """Run a fleet with Go Micro on every registry, and write what came of it in the docs."""
    install(session, "tests", *go())
    page = ["--fleet", "docs/go-micro.md"]
    session.run("pytest", "-n", "4", *page, "tests/interop/test_fleet.py", *session.posargs)


@nox.session(python="3.11", default=False)
def fuzz(session: nox.Session) -> None:
    """Look for what decoders do not stand: [TARGET ...] [--seconds 60] [--save: in the corpus]."""
    install(session, "tests", "fuzz")
    session.run("python", "tests/fuzz/run.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format; --fix repairs what can be repaired."""
    install(session, "lint", distributions=False)
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--diff"]))


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy and pyright, and that typed clients find what is wrong."""
    install(session, "tests", "types")
    sources = os.pathsep.join(f"{path}/src" for path in DISTRIBUTIONS)
    files = ["conftest.py", "noxfile.py", "toxfile.py"]
    folders = [*map(str, DISTRIBUTIONS), "tests", "tools", "examples", "bench"]
    session.run("mypy", *folders, *files, env={"MYPYPATH": sources})
    session.run("pyright")
    for marker in [marker for path in DISTRIBUTIONS for marker in path.glob("src/*/py.typed")]:
        session.run("pyright", "--verifytypes", marker.parent.name, "--ignoreexternal")
    session.run("python", "tests/typing/check.py")


@nox.session
def imports(session: nox.Session) -> None:
    """Check the direction of dependency."""
    install(session, "imports")
    session.run("lint-imports", "--no-cache")


@nox.session
def build(session: nox.Session) -> None:
    """Build each distribution, or those named, and test it outside of this tree; --whole: fully."""
    install(session, "build", *go(), distributions=False)
    shutil.rmtree("dist", ignore_errors=True)
    names = {project_name(path): path for path in DISTRIBUTIONS}
    named = [arg for arg in session.posargs if arg != WHOLE]
    if not names.keys() >= set(named):
        session.error(f"known distributions: {', '.join(names)}")
    core, *_ = names
    chosen = named or names
    for name in dict.fromkeys([core, *chosen]):
        dist = ROOT / "dist" / names[name]
        with tempfile.TemporaryDirectory() as temp:
            source = f"{temp}/{name}"
            session.run("python", "tools/release.py", "stage", name, source)
            session.run("python", "-m", "build", "--outdir", str(dist), source)
        session.run("twine", "check", "--strict", *map(str, dist.iterdir()))
    session.env.update(servers(session))  # there is no tools/ where these tests run
    for name in chosen:
        folders = (ROOT / "dist" / names[core], ROOT / "dist" / names[name])
        try_out(session, *folders, [] if WHOLE in session.posargs else OUTSIDE)


@nox.session(venv_backend="none", default=False)
def release(session: nox.Session) -> None:
    """Prepare a release, push nothing: NAME [X.Y.Z, major, minor or patch] [--dry-run]."""
    session.run(sys.executable, "tools/release.py", "prepare", *session.posargs)


@nox.session(venv_backend="none", default=False)
def new_plugin(session: nox.Session) -> None:
    """Make plugins/NAME, complete but for what only its author can write."""
    session.run(sys.executable, "tools/new_plugin.py", *session.posargs)


@nox.session(default=False)
def protos(session: nox.Session) -> None:
    """Generate what the plugins' .proto files say; --check: fail where it is not current."""
    install(session, "protos", distributions=False)
    stale = []
    for proto in sorted(ROOT.glob("plugins/*/src/*/*.proto")):
        source = proto.parents[1]
        with tempfile.TemporaryDirectory() as temp:
            out = [f"--{kind}_out={temp}" for kind in ("python", "pyi")]
            session.run("python", "-m", "grpc_tools.protoc", f"-I{source}", *out, str(proto))
            made = {source / path.relative_to(temp): path for path in Path(temp).glob("*/*")}
            changed = [path for path, new in made.items() if not is_same(path, new)]
            for path in [] if "--check" in session.posargs else changed:
                shutil.copy(made[path], path)
        stale += changed
    for path in stale:
        session.log(f"{path.relative_to(ROOT)} has changed")
    if stale and "--check" in session.posargs:
        session.error("not what the .proto files make; run: python3 dev.py protos")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Write the tables that the code knows best; --check fails where one is not current."""
    install(session)
    session.run("python", "tools/tables.py", *session.posargs)


@nox.session(python=BENCHMARKED)
def bench(session: nox.Session) -> None:
    """Compare with others, side by side; options go to bench/run.py."""
    install(session, *go(), file="bench/requirements.txt")
    if session.python == BENCHMARKED[-1]:
        other = f"bench-{BENCHMARKED[0]}".replace(".", "-")
        python = Path(session.virtualenv.location).with_name(other) / "bin/python"
        beside = ["--beside", str(python)] if python.exists() else []
        session.run("python", "bench/run.py", *beside, *session.posargs)


def install(
    session: nox.Session, *groups: str, distributions: bool = True, file: str | None = None
) -> None:
    """Fill the session's environment, unless it already holds just this.

    The distributions are all named by path in one command: pip then looks for none of them, nor for
    the core that the plugins need, on the index, where the names belong to others.
    """
    wanted = dependencies(*groups) + (["-r", file] if file else [])
    if distributions:
        wanted += [arg for path in DISTRIBUTIONS for arg in ("-e", f"{path}[testing]")]
    sources = [
        *(path / "pyproject.toml" for path in DISTRIBUTIONS),
        *([Path(file)] if file else []),
    ]
    state = "\n".join([*wanted, *(path.read_text() for path in sources)])
    stamp = Path(session.virtualenv.location) / "installed.txt"
    if not stamp.exists() or stamp.read_text() != state:
        session.install(*wanted)
        stamp.write_text(state)


def is_same(one: Path, other: Path) -> bool:
    """Whether both are there, with the same content."""
    return one.exists() and one.read_bytes() == other.read_bytes()


def project_name(distribution: Path) -> str:
    """What the distribution in that folder is called."""
    name = nox.project.load_toml(ROOT / distribution / "pyproject.toml")["project"]["name"]
    assert isinstance(name, str)
    return name


def dependencies(*groups: str) -> list[str]:
    """What groups of pyproject.toml hold."""
    pyproject = nox.project.load_toml(ROOT / "pyproject.toml")
    return list(nox.project.dependency_groups(pyproject, *groups))


def go() -> list[str]:
    """The group that has Go, for the servers that tests need, where it is not installed."""
    return [] if shutil.which("go") else ["go"]


def servers(session: nox.Session) -> dict[str, str]:
    """Obtain the servers that tests need: the variables that name their programs."""
    shown = session.run("python", "tools/servers/provision.py", silent=True, stderr=None)
    assert isinstance(shown, str)
    return dict(line.split("=", 1) for line in shown.splitlines())


def pytest(session: nox.Session) -> None:
    """Run pytest, everything where nothing is named; COVERAGE takes half as much time again."""
    install(session, "tests", "tools", *go())
    if session.posargs not in ([], [COVERAGE]):
        session.run("pytest", *session.posargs)
        return
    servers(session)
    if not session.posargs:
        session.run("pytest", *PARALLEL, *OTHERS)
        session.run("pytest", *ALONE)
        return
    session.run("coverage", "erase")
    try:
        sources = ",".join(str(ROOT / path / "src") for path in DISTRIBUTIONS)
        session.run("coverage", "run", f"--source={sources}", "-m", "pytest", *PARALLEL, *OTHERS)
    finally:
        session.run("coverage", "combine", "--quiet")
        session.run("coverage", "report")


def try_out(session: nox.Session, core: Path, dist: Path, selected: list[str]) -> None:
    """Install a wheel alone in a fresh environment, and run tests of its sdist there.

    A plugin gets the core's wheel beside its own; no name of ours may come from the index.
    """
    wheels = sorted({str(wheel) for folder in (core, dist) for wheel in folder.glob("*.whl")})
    (sdist,) = dist.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as temp, session.chdir(temp):
        session.run(sys.executable, "-m", "virtualenv", "--quiet", "env", external=True)
        python = str(Path("env/bin/python").absolute())

        def run(*args: str, silent: bool = False) -> str:
            environment = {"PYTHONSAFEPATH": "1"}
            done = session.run(python, "-m", *args, external=True, env=environment, silent=silent)
            return str(done)

        run("pip", "install", "--quiet", *wheels)
        run("micro", "version")
        # Without what tests need, so that nothing is missing among what it needs by itself.
        if "BROKEN" in (shown := run("micro", "plugins", silent=True)):
            session.error(shown)
        run("pip", "install", "--quiet", *(f"{wheel}[testing]" for wheel in wheels))
        # Without uvloop, which nobody has to have.
        wanted = [need for need in dependencies("tests") if not need.startswith("uvloop")]
        run("pip", "install", "--quiet", *wanted)
        run("pip", "check")
        session.run(python, str(ROOT / "tools/provenance.py"), *wheels, external=True)
        with tarfile.open(sdist) as archive:
            archive.extractall(filter="data")
        (unpacked,) = Path(temp).glob("*/PKG-INFO")
        config = str(ROOT / "pyproject.toml")
        tests = str(unpacked.parent / "tests")
        run("pytest", "-c", config, "--rootdir", temp, *PARALLEL, *selected, tests)
