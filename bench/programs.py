"""What peers are run with: Pythons, the Go program, wrk, servers of registries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
from bench.rows import PEERS, Load, Peer
from tools.servers.provision import Unobtainable, build_go, cached, obtain

HERE = Path(__file__).resolve().parent
#: wrk and the libraries that Debian and Ubuntu do not have by default.
_PACKAGES = ("wrk", "libluajit-5.1-2", "libluajit-5.1-common")
_WRAPPER = """\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH=$(echo "$here"/usr/lib/*-linux-gnu) exec "$here/usr/bin/wrk" "$@"
"""


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """Programs by path; None for what is not here."""

    beside: str | None
    go: str | None
    wrk: str | None
    #: Names of servers, as tools/servers has them.
    servers: frozenset[str] = frozenset()

    def has(self, load: Load, name: str) -> bool:
        """Whether that peer can take part."""
        if load.kind == "wrk" and self.wrk is None:
            return False
        peer = PEERS.get(name)
        if peer is None:
            return True
        if peer.server and peer.server not in self.servers:
            return False
        return (
            self.go if peer.program == "go" else self.beside if peer.beside else "."
        ) is not None

    def command(self, peer: Peer, *more: object) -> list[str]:
        """How a side of the peer is run."""
        if peer.program == "go":
            program = [str(self.go)]
        else:
            python = str(self.beside) if peer.beside else sys.executable
            program = [python, "-m", f"bench.peers.{peer.program}"]
        return [*program, *peer.options, *map(str, more)]


def find(beside: str | None) -> Programs:
    """Build and download what is missing; tell on stderr what cannot be had."""
    if beside is None:
        print("no second Python: --beside names one with the same packages", file=sys.stderr)
    return Programs(beside=beside, go=_go(), wrk=_wrk(), servers=_servers())


def _go() -> str | None:
    try:
        return str(build_go(HERE / "peers/go", ".", "gobench"))
    except Unobtainable as exc:
        print(f"without Go's peers: {exc}", file=sys.stderr)
        return None


def _servers() -> frozenset[str]:
    found: set[str] = set()
    for name in sorted({peer.server for peer in PEERS.values() if peer.server}):
        try:
            obtain(name)
            found.add(name)
        except Unobtainable as exc:
            print(f"without registry {name}: {exc}", file=sys.stderr)
    return frozenset(found)


def _wrk() -> str | None:
    if found := shutil.which("wrk"):
        return found
    try:
        return str(cached("wrk-debian", _unpack_wrk) / "wrk")
    except (OSError, subprocess.CalledProcessError) as exc:
        print(f"without wrk: {exc}; install it: sudo apt-get install wrk", file=sys.stderr)
        return None


def _unpack_wrk(folder: Path) -> None:
    """Take wrk from the system's own packages, which apt verifies; nothing is installed."""
    environment = os.environ | {"LC_ALL": "C"}
    subprocess.run(
        ["apt-get", "download", "-q", *_PACKAGES], cwd=folder, env=environment, check=True
    )
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    wrapper = folder / "wrk"
    wrapper.write_text(_WRAPPER)
    wrapper.chmod(0o755)
