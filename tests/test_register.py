"""``micro register``, ``micro deregister`` and ``micro services --watch`` on an etcd that fails."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.request import Request, urlopen

import pytest

from micro.record import decode_node
from micro.testing.servers import EtcdServer

#: Seconds that any one step may take.
PATIENCE = 30
#: What a program that nobody checks is registered by.
WORDS = ("--address", "127.0.0.1:9", "--check", "none", "--json")


class Told:
    """A command in a process of its own, and what it tells."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "micro", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def event(self, name: str) -> dict[str, Any]:
        """The next line, which is to be this event."""
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        watchdog.cancel()
        told: dict[str, Any] = json.loads(line)
        assert told["event"] == name, told
        return told

    def end(self) -> tuple[int, list[tuple[str, str]]]:
        """The status that it ends with after SIGTERM, and which events it tells before, and why."""
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=PATIENCE)
        lines = map(json.loads, said.splitlines())
        return self.process.returncode, [(line["event"], line["detail"]) for line in lines]


@contextmanager
def told(*words: str) -> Iterator[Told]:
    command = Told(*words)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.communicate()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "micro", *words],
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def ask(etcd: EtcdServer, path: str, **fields: str) -> dict[str, Any]:
    """The answer of etcd's JSON gateway, whose bytes are base64."""
    encoded = {name: base64.b64encode(text.encode()).decode() for name, text in fields.items()}
    request = Request(f"http://{etcd.address}/v3/kv/{path}", json.dumps(encoded).encode())
    with urlopen(request, timeout=PATIENCE) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_registered_program_is_go_micros_record_under_its_key(etcd: EtcdServer) -> None:
    etcd.start()
    words = (*WORDS, "--id", "n1", "--version", "1.5", "-m", "zone=a", "--registry", etcd.url)
    with told("register", "prices", *words) as command:
        command.event("registered")
        (entry,) = ask(etcd, "range", key="/micro/registry/prices/n1")["kvs"]
        record = base64.b64decode(entry["value"])
        assert command.end() == (0, [("deregistered", "SIGTERM")])
    assert json.loads(record) == {
        "name": "prices",
        "version": "1.5",
        "metadata": None,
        "endpoints": None,
        "nodes": [
            {
                "metadata": {
                    "transport": "http",
                    "protocol": "mucp",
                    "registry": "etcd",
                    "server": "mucp",
                    "zone": "a",
                },
                "id": "n1",
                "address": "127.0.0.1:9",
            }
        ],
    }
    assert decode_node(record).id == "n1"
    assert "kvs" not in ask(etcd, "range", key="/micro/registry/prices/n1")


def test_an_etcd_that_comes_and_goes_ends_neither_registration_nor_watch(
    etcd: EtcdServer, etcd_url: str
) -> None:
    etcd.kill()
    with told("register", "web", *WORDS, "--registry", etcd_url) as command:
        assert "connection refused" in command.event("outage")["detail"]
        etcd.start()
        assert "detail" not in command.event("registered")
        with told("services", "--watch", "--json", "--registry", etcd_url) as watching:
            node = watching.event("there")["id"]
            watching.event("live")
            etcd.kill()
            assert "etcd://" in watching.event("stale")["detail"]
            etcd.restart(keep_data=True)
            watching.event("live")
            assert json.loads(run("describe", "web", "--json", "--registry", etcd_url).stdout)
            with told("register", "other", *WORDS, "--registry", etcd_url) as other:
                assert other.event("registered")["service"] == "other"
                assert watching.event("create")["service"] == "other"
        assert command.end() == (0, [("deregistered", "SIGTERM")])
    assert node


def test_an_etcd_that_lost_its_data_has_the_program_again(etcd: EtcdServer, etcd_url: str) -> None:
    etcd.start()
    pace = ("--register-ttl", "4s", "--register-interval", "500ms")
    with told("register", "web", *WORDS, *pace, "--registry", etcd_url) as command:
        node = command.event("registered")["id"]
        etcd.kill()
        assert "connection refused" in command.event("outage")["detail"]
        etcd.restart(keep_data=False)
        assert command.event("registered")["detail"] == "the registry answers again"
        found = json.loads(run("describe", "web", "--json", "--registry", etcd_url).stdout)
        assert [one["id"] for one in found["nodes"]] == [node]
        etcd.kill()
        command.event("outage")
        assert command.end() == (0, [("orphaned", "SIGTERM")])


def test_deregister_takes_out_what_was_left_behind(etcd: EtcdServer, etcd_url: str) -> None:
    etcd.start()
    with told("register", "web", *WORDS, "--registry", etcd_url) as command:
        node = command.event("registered")["id"]
    done = run("deregister", "web", node, "--json", "--registry", etcd_url)
    line = json.loads(done.stdout)
    assert (done.returncode, line["event"], line["id"]) == (0, "deregistered", node)
    assert run("deregister", "web", node, "--registry", etcd_url).returncode == 3


def test_deregister_takes_out_nodes_of_go_whose_ids_are_longer_than_ours(
    etcd: EtcdServer,
) -> None:
    etcd.start()
    node = f"greeter.of.a.long.name-{'0' * 36}"
    record = {
        "name": "greeter",
        "version": "latest",
        "nodes": [{"id": node, "address": "127.0.0.1:9"}],
    }
    ask(etcd, "put", key=f"/micro/registry/greeter/{node}", value=json.dumps(record))
    done = run("deregister", "greeter", node, "--registry", etcd.url)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["register", "web", *WORDS], ["services", "--watch"]])
def test_rights_that_are_not_there_end_the_command(
    words: list[str], etcd: EtcdServer, etcd_url: str
) -> None:
    etcd.start()
    url = etcd_url.replace("etcd://", "etcd://nobody:nothing@")
    done = run(*words, "--registry", f"{url}?tls=true")
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not speak TLS" in done.stderr
