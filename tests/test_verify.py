"""``micro verify`` on real servers: it touches nothing of others, and leaves nothing of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from micro.cli import main
from micro.cli._output import Exit
from micro.cli._verify import _Place
from micro.plugins import Plugins
from micro.registry import Node, Registry
from micro.testing.servers import ConsulServer, EtcdServer
from micro.url import URL

ROOT = Path(__file__).parents[1]
SECRET = "canary-7f3b"
#: Seconds that any one step may take.
PATIENCE = 50
#: Promises that are quick to try, and leave nodes behind that others have to take away.
ONLY = "register_then_get or names_distinct or namespaces_isolated or list_200"

#: As the example, but with nodes of services that nobody can deregister.
STICKY = """
from micro.errors import PermissionDenied
from examples_dir_registry import DirRegistry as Base, hookimpl

class DirRegistry(Base):
    async def deregister(self, node):
        if node.id != "probe":
            raise PermissionDenied("dir: no right to delete")
        await super().deregister(node)

@hookimpl
def micro_backends():
    return [DirRegistry]
"""


def entries(server: EtcdServer, prefix: bytes = b"/") -> dict[bytes, tuple[bytes, int]]:
    """Keys of an etcd that begin so, with their values and how often they were written."""
    end = prefix[:-1] + bytes([prefix[-1] + 1])
    said = {"key": base64.b64encode(prefix).decode(), "range_end": base64.b64encode(end).decode()}
    request = Request(f"http://{server.address}/v3/kv/range", json.dumps(said).encode())
    with urlopen(request, timeout=5) as answer:
        found: list[dict[str, Any]] = json.load(answer).get("kvs", [])
    decode = base64.b64decode
    return {decode(one["key"]): (decode(one["value"]), int(one["mod_revision"])) for one in found}


def put(server: EtcdServer, key: bytes, value: bytes) -> None:
    said = {"key": base64.b64encode(key).decode(), "value": base64.b64encode(value).decode()}
    request = Request(f"http://{server.address}/v3/kv/put", json.dumps(said).encode())
    urlopen(request, timeout=5).close()


@contextmanager
def verifying(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "micro", "verify", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


@pytest.mark.parametrize("namespace", ["", "/staging"])
def test_entries_of_others_stay_as_they_are_and_none_of_ours_is_left(
    etcd: EtcdServer, namespace: str, capfd: pytest.CaptureFixture[str]
) -> None:
    etcd.start()
    for key in (b"/micro/registry/a/1", b"/staging/micro/registry/a/1", b"/other", b"/verify-1/x"):
        put(etcd, key, b'{"name": "a", "nodes": [{"id": "1", "address": "127.0.0.1:1"}]}')
    before = entries(etcd)
    status = main(["verify", f"{etcd.url}{namespace}", "-k", ONLY, "--json"])
    told = json.loads(capfd.readouterr().out)
    assert status == Exit.OK, told
    assert told["passed"] == 4
    assert told["namespace"].startswith(f"{namespace}/verify-".lstrip("/"))
    assert entries(etcd) == before


@pytest.mark.parametrize("scheme", ["consul", "nats-kv"])
def test_nodes_of_others_stay_on_other_servers_too(
    scheme: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    name = scheme.partition("-")[0]
    url = request.getfixturevalue(f"{name}_url").replace(f"{name}://", f"{scheme}://")
    only = ONLY.removesuffix(" or list_200")
    theirs = Node(service="theirs", id="a", address="127.0.0.1:1")

    async def exchange() -> tuple[list[str], int, dict[str, Any]]:
        async with connected(url) as outside:
            await outside.register(theirs, ttl=60)
            status = await asyncio.to_thread(main, ["verify", url, "-k", only, "--json"])
            told = json.loads(capfd.readouterr().out)
            assert await outside.get("theirs") == (theirs,)
            async with connected(url.rpartition("/")[0] + f"/{told['namespace']}") as ours:
                return [*await ours.services(), *await outside.services()], status, told

    found, status, told = asyncio.run(exchange())
    assert status == Exit.OK, told
    assert told["passed"] == 3
    assert found == ["theirs"]


def test_what_a_server_keeps_of_nodes_whose_time_is_over_is_taken_away(
    consul: ConsulServer, consul_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["verify", consul_url, "-k", "ttl_expires", "--json"])
    told = json.loads(capfd.readouterr().out)
    assert (status, told["passed"], told["left"]) == (Exit.OK, 1, []), told
    with urlopen(f"http://{consul.address}/v1/agent/services", timeout=5) as answer:
        kept: dict[str, Any] = json.load(answer)
    assert not [id_ for id_ in kept if id_.startswith(told["namespace"])]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Registry]:
    plugins = Plugins()
    kind: type[Registry] = Registry  # type: ignore[type-abstract]
    registry, connections = plugins.create(kind, URL.parse(url)), plugins.connections()
    try:
        await registry.connect(connections)
        yield registry
    finally:
        await registry.aclose()
        await connections.aclose()


def test_an_interrupt_takes_away_what_a_test_has_registered(
    etcd: EtcdServer, etcd_url: str
) -> None:
    before = entries(etcd)
    with verifying(etcd_url, "-k", "get_unknown or heartbeat_keeps_alive") as process:
        deadline = time.monotonic() + PATIENCE
        while not any(b"/suite-" in key and key not in before for key in entries(etcd)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.INTERRUPTED, out + err
    assert entries(etcd) == before


def test_a_kill_of_the_command_ends_the_tests_and_takes_away_what_they_registered(
    etcd: EtcdServer, etcd_url: str, tmp_path: Path
) -> None:
    before = entries(etcd)
    only = ("-k", "heartbeat_keeps_alive")
    with verifying(etcd_url, *only, TMPDIR=str(tmp_path)) as process:
        deadline = time.monotonic() + PATIENCE
        while not any(b"/suite-" in key and key not in before for key in entries(etcd)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
    deadline = time.monotonic() + 7  # the test itself would take 10
    while entries(etcd) != before or list(tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_does_not_answer_is_told_before_anything_is_tried(
    etcd: EtcdServer, etcd_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    etcd.stop()
    url = etcd_url.replace("://", f"://user:{SECRET}@")
    assert main(["verify", url]) == Exit.UNAVAILABLE
    out, err = capfd.readouterr()
    assert "connection refused" in err
    assert SECRET not in out + err
    etcd.start()


def test_a_server_that_goes_meanwhile_is_told_with_what_is_left(
    etcd: EtcdServer, etcd_url: str
) -> None:
    with verifying(f"{etcd_url}?timeout=1", "-k", "heartbeat_keeps_alive", "--json") as process:
        deadline = time.monotonic() + PATIENCE
        while not any(b"/suite-" in key for key in entries(etcd)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        etcd.stop()
        out, err = process.communicate(timeout=PATIENCE)
    etcd.start()
    assert process.returncode == Exit.ERROR, out + err
    told = json.loads(out)
    assert told["failed"] == 1
    assert all("connection refused" in text for text in told["left"])
    assert len(told["left"]) == 2


@pytest.mark.parametrize("sticks", [False, True])
def test_a_plugin_of_others_is_verified_alike(tmp_path: Path, *, sticks: bool) -> None:
    site = tmp_path / "site"
    info = site / "micro_plugin_dir-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: micro-plugin-dir\nVersion: 1.0\n")
    module = "sticky" if sticks else "examples_dir_registry"
    (info / "entry_points.txt").write_text(f"[micro.backends]\ndir = {module}\n")
    (site / "sticky.py").write_text(STICKY)
    (site / "examples_dir_registry.py").write_text((ROOT / "examples/dir_registry.py").read_text())
    url = f"dir://{tmp_path}/nodes"
    with verifying(url, "-k", "register_then_get or deregister_only", PYTHONPATH=str(site)) as one:
        out, err = one.communicate(timeout=PATIENCE)
    left = [path.name for path in (tmp_path / "nodes").rglob("*.node")]
    if sticks:
        assert one.returncode == Exit.ERROR, out + err
        assert re.search(r"\nLEFT BEHIND until .*: PermissionDenied: dir: no right to delete", out)
        assert left
    else:
        assert one.returncode == Exit.OK, out + err
        assert not left


@pytest.mark.parametrize(
    ("url", "own", "inner"),
    [
        ("etcd://a:1,b:2", r"etcd://a:1,b:2/verify-X", "/other"),
        ("etcd://u:p%2F@a/prod/?tls=true", r"etcd://u:p%2F@a/prod/verify-X?tls=true", "/other"),
        ("etcd", "etcd:///verify-X", "/other"),
        ("memory", "memory://verify/verify-X", "/other"),
        ("memory://here", "memory://here/verify-X", "/other"),
        ("mdns://?timeout=2", "mdns:///X?timeout=2", "x"),
        ("mdns:///staging", "mdns:///X", "x"),
    ],
)
def test_it_works_in_a_namespace_inside_of_the_url(url: str, own: str, inner: str) -> None:
    place = _Place(url)
    server, question, options = own.partition("?")
    before, _, after = server.partition("X")
    assert place.own.startswith(before)
    assert place.own.endswith(after + question + options)
    assert place.inner == place.own.replace(question, inner + question, 1) if question else True
    assert place.own != _Place(url).own
