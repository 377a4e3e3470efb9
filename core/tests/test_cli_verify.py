"""``micro verify``: the suite finds what is broken, disturbs nobody, and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from micro.cli import _suite, _verify, main
from micro.cli._output import Exit
from micro.cli._suite import Event
from micro.cli._verify import Results

from .test_installed import Site

MICRO = str(Path(sys.executable).with_name("micro"))
#: Seconds that any one step may take.
PATIENCE = 50
FAULTY = '''
import asyncio
from micro.backends.memory import MemoryRegistry
from micro.errors import ServiceNotFound, Unavailable
from micro.hookspecs import hookimpl
from micro.registry import Change
from micro.url import URL

class Faulty(MemoryRegistry):
    """Its watch loses deletes."""
    schemes = ("faulty",)

    async def follow(self, service, mark):
        async for mark, item in super().follow(service, mark):
            if not (isinstance(item, Change) and item.kind == "delete"):
                yield mark, item

class Flat(MemoryRegistry):
    """It knows no namespaces."""
    schemes = ("flat",)

    def __init__(self, url):
        super().__init__(URL(scheme="flat", hosts=("one",)))

class Hanging(MemoryRegistry):
    """It never finds out that there are none."""
    schemes = ("hanging",)

    async def get(self, service):
        try:
            return await super().get(service)
        except ServiceNotFound:
            await asyncio.Event().wait()

class Telling(MemoryRegistry):
    """Its errors tell the password."""
    schemes = ("telling",)

    async def deregister(self, node):
        if node.id != "probe":
            raise Unavailable(f"{self.url.username} has {self.url.password}")
        await super().deregister(node)

@hookimpl
def micro_backends():
    return [Faulty, Flat, Hanging, Telling]
'''


class Told(NamedTuple):
    status: int
    said: dict[str, Any]
    err: str

    def outcomes(self) -> dict[str, str]:
        return {one["promise"]: one["outcome"] for one in self.said["promises"]}


Verify = Callable[..., Told]


@pytest.fixture
def verify(capfd: pytest.CaptureFixture[str]) -> Verify:
    def run(*arguments: str) -> Told:
        status = main(["verify", *arguments, "--json"])
        out, err = capfd.readouterr()
        return Told(status, json.loads(out) if out else {}, err)

    return run


@pytest.fixture
def faulty(verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verify]:
    """As ``verify``, where a plugin with broken registries is installed, too."""
    folder = tmp_path / "site"
    before = [*sys.path]
    site = Site(folder, monkeypatch)
    module = "faulty_registries"
    names: dict[str, str] = dict.fromkeys(["faulty", "flat", "hanging", "telling"], module)
    site.install("micro-plugin-faulty", backends=names, modules={module: FAULTY})
    monkeypatch.setattr(sys, "path", [str(folder), *before])
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{known}")
    yield verify
    site.forget()


# -- what comes of it -----------------------------------------------------------------------------


def test_promises_that_are_kept_are_told_and_counted(verify: Verify) -> None:
    told = verify("memory", "-k", "register_then_get or names_distinct or down_up", "--seed", "7")
    assert told.status == Exit.OK
    assert told.outcomes() == {
        "down_up": "skipped",
        "register_then_get": "passed",
        "names_distinct": "passed",
    }
    counts = {name: told.said[name] for name in ("passed", "failed", "skipped", "seed", "left")}
    assert counts == {"passed": 2, "failed": 0, "skipped": 1, "seed": 7, "left": []}
    assert told.said["features"] == "min_ttl=0.01 converge=0 history"


def test_a_watch_that_loses_deletes_is_found(faulty: Verify) -> None:
    told = faulty("faulty://here", "-k", "watch_create_update_delete or register_then_get")
    assert told.status == Exit.ERROR
    assert told.outcomes() == {
        "watch_create_update_delete": "failed",
        "register_then_get": "passed",
    }
    (broken,) = (one for one in told.said["promises"] if one["outcome"] == "failed")
    assert "TimeoutError" in broken["why"]
    assert "test_watch_create_update_delete" not in broken["why"]
    assert "await anext(watch)" in broken["text"]


def test_a_promise_that_never_ends_is_broken_and_the_others_are_told(
    faulty: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_suite, "_LONGEST", 6.0)
    told = faulty("hanging://here", "-k", "get_unknown or two_nodes")
    assert told.status == Exit.ERROR
    assert told.outcomes() == {"two_nodes_two_versions": "passed", "get_unknown": "failed"}
    assert "did not end within 6 s" in told.said["promises"][-1]["why"]


def test_people_read_a_line_a_promise_and_how_to_try_it_again(
    faulty: Verify, capfd: pytest.CaptureFixture[str]
) -> None:
    only = "deregister_only_that_node or get_unknown or lease_lost"
    assert main(["verify", "telling://here", "-k", only, "--seed=7"]) == Exit.ERROR
    out, err = capfd.readouterr()
    assert not err
    head, *lines = out.splitlines()
    assert head.startswith("registry telling://here, in the namespace verify-")
    assert [re.sub(r"  [(0-9].*", "", line) for line in lines[:4]] == [
        "  skipped  lease lost reregisters",
        "  FAILED   deregister only that node",
        "           micro.errors.Unavailable:  has",
        "  ok       get unknown",
    ]
    assert lines[4:] == [
        "",
        "3 promises: 1 ok, 1 failed, 1 skipped",
        "features: min_ttl=0.01 converge=0 history",
        "again: --seed 7 -k deregister_only_that_node",
    ]


def test_the_status_tells_what_is_left_behind() -> None:
    results = Results(url="etcd", namespace="x", seed=1)
    statuses: list[Exit] = []
    kept = Event(event="ended", promise="a", outcome="passed")
    for event in (kept, Event(event="swept", left=("etcd://: Unavailable",))):
        results.take(event)
        statuses.append(results.status)
    assert statuses == [Exit.OK, Exit.ERROR]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["memry"], Exit.USAGE, "did you mean 'memory'?"),
        (["tcp"], Exit.USAGE, "'tcp' is a transport; there is a suite for registries alone"),
        (["memory", "-k", "a a"], Exit.USAGE, "-k: Wrong expression"),
        (["memory", "-k", "nothing_like_it"], Exit.USAGE, "no promise matches 'nothing_like_it'"),
        (["memory?timeout=1"], Exit.USAGE, "unknown option 'timeout'"),
        ([], Exit.USAGE, "Missing argument"),
    ],
)
def test_what_cannot_be_verified_is_told(
    verify: Verify, arguments: list[str], status: Exit, says: str
) -> None:
    told = verify(*arguments)
    assert told.status == status
    assert says in json.loads(told.err)["detail"]
    assert not told.said


def test_a_registry_that_keeps_no_namespaces_apart_is_left_alone(faulty: Verify) -> None:
    told = faulty("flat://anything")
    assert told.status == Exit.ERROR
    assert "does not keep namespaces apart" in json.loads(told.err)["detail"]


def test_without_what_the_suites_need_it_says_how_to_get_it(
    verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "hypothesis" else found(name)
    )
    told = verify("memory")
    assert told.status == Exit.USAGE
    detail = json.loads(told.err)["detail"]
    assert detail == "micro verify needs the extra 'testing', or: pip install hypothesis"


# -- what it does not touch, nor follow -----------------------------------------------------------


def test_nothing_of_the_folder_is_followed_and_nothing_is_written_there(
    verify: Verify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    files = {
        "conftest.py": "raise RuntimeError('this conftest is of others')",
        "pytest.ini": "[pytest]\naddopts = --no-such-option\n",
        "random.py": "raise RuntimeError('this module is of others')",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(_verify, "_MODEL", (2, 3))
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    told = verify("memory", "-k", "model or get_unknown")
    assert told.outcomes() == {"model": "passed", "get_unknown": "passed"}
    assert {path.name for path in folder.rglob("*")} == files.keys()


def test_a_password_is_in_no_text(faulty: Verify) -> None:
    url = "telling://user:canary%2F7f%22b@here"
    told = faulty(url, "-k", "deregister_only_that_node")
    assert told.status == Exit.ERROR
    assert told.outcomes() == {"deregister_only_that_node": "failed"}
    assert "user has ***" in told.said["promises"][0]["why"]
    assert "canary" not in json.dumps(told.said) + told.err


# -- interrupted ----------------------------------------------------------------------------------


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [MICRO, "verify", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def test_an_interrupt_ends_it_and_tells_what_was_done_so_far() -> None:
    with running("memory", "-k", "get_unknown or two_watchers or model") as process:
        assert process.stdout is not None
        while "  ok       " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.INTERRUPTED
    assert err.startswith("interrupted; taking away what is registered")
    assert re.search(r"^(1 promise: 1|2 promises: 2) ok", out, re.MULTILINE)
