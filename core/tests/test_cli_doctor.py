"""``micro doctor``: what is wrong is found, told with what helps, and nothing is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from micro.cli import _check_registry, _check_transport, main
from micro.cli._checks import quantile
from micro.cli._output import Exit
from micro.testing.certificates import Authority

from .test_installed import Site, site

__all__ = ["site"]  # a fixture

MICRO = str(Path(sys.executable).with_name("micro"))
#: Seconds that any one step may take.
PATIENCE = 30
REGISTRY = ["reach", "rights", "read", "watch", "clock", "latency", "clean-up"]
TRANSPORT = ["listen", "call", "latency"]
QUICK = ("--clock", "0", "--transport", "memory")

#: A registry in memory, with a fault for each name of a host.
FAULTY = """
import asyncio
import msgspec
from micro.backends.memory import MemoryRegistry
from micro.errors import PermissionDenied, ServiceNotFound
from micro.hookspecs import hookimpl
from micro.registry import Change, RegistryFeatures, Snapshot

LEFT = []

class Faulty(MemoryRegistry):
    schemes = ("faulty",)

    def __init__(self, url):
        super().__init__(url)
        self.fault = url.hosts[0]
        if self.fault == "patient":
            self.features = RegistryFeatures(min_ttl=60, converge=0.0, history=True)

    async def connect(self, connections):
        if self.fault == "silent":
            await asyncio.Event().wait()
        if self.fault == "broken":
            raise ValueError("a bug of the plugin")
        await super().connect(connections)

    async def register(self, node, *, ttl):
        if self.fault == "read-only":
            raise PermissionDenied("faulty: no right to write")
        if self.fault == "slow":
            await asyncio.sleep(0.3)
        if self.fault == "hasty" and node.id == "left-alone":
            ttl /= 2
        if self.fault == "slow clock" and node.id == "left-alone":
            ttl *= 30
        LEFT.append(node.id)
        await super().register(node, ttl=ttl)
        if self.fault == "secret":
            raise PermissionDenied("faulty: it is registered, and not shown to you")

    async def deregister(self, node):
        if self.fault == "sticky" and node.id != "watched":
            raise PermissionDenied("faulty: no right to delete")
        LEFT[:] = [id_ for id_ in LEFT if id_ != node.id]
        await super().deregister(node)

    async def get(self, service):
        if self.fault == "write-only":
            raise ServiceNotFound("faulty: nothing is shown to you")
        nodes = await super().get(service)
        if self.fault == "garbling":
            return tuple(msgspec.structs.replace(node, version="") for node in nodes)
        return nodes

    async def services(self):
        return () if self.fault == "secretive" else await super().services()

    async def follow(self, service, mark):
        async for mark, item in super().follow(service, mark):
            if self.fault == "deaf" and isinstance(item, Change) and item.kind == "delete":
                continue
            if self.fault == "late" and isinstance(item, Change):
                await asyncio.sleep(1.2)
            yield mark, item

@hookimpl
def micro_backends():
    return [Faulty]
"""


class Told(NamedTuple):
    """What ``micro doctor --json`` said."""

    status: int
    parts: dict[str, dict[str, Any]]

    def state(self, part: str, check: str) -> str:
        return str(self.finding(part, check)["state"])

    def finding(self, part: str, check: str) -> dict[str, Any]:
        (found,) = (one for one in self.parts[part]["checks"] if one["check"] == check)
        assert isinstance(found, dict)
        return found

    def states(self, part: str) -> dict[str, str]:
        return {one["check"]: one["state"] for one in self.parts[part]["checks"]}


Doctor = Callable[..., Told]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MICRO_") and "TEST" not in name]:
        monkeypatch.delenv(name)


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str]) -> Doctor:
    def run(*arguments: str) -> Told:
        status = main(["doctor", *arguments, "--json"])
        out, err = capfd.readouterr()
        assert not err
        said = json.loads(out)
        assert said["healthy"] == (status == Exit.OK)
        return Told(status, {part["kind"]: part for part in said["parts"]})

    return run


@pytest.fixture
def faulty(site: Site, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Told]:
    """What is told of a registry with this fault, by a doctor that waits for less long."""
    site.install("micro-plugin-faulty", backends={"faulty": "faulty"}, modules={"faulty": FAULTY})
    for name in ("_CONNECT", "_ASK", "_LOST", "_FAREWELL"):
        monkeypatch.setattr(_check_registry, name, 2.0)
    return lambda fault, *more: doctor(f"--registry=faulty://{fault}", *(more or QUICK))


# -- what is in order -----------------------------------------------------------------------------


def test_a_healthy_registry_and_transport_pass_every_check(doctor: Doctor) -> None:
    told = doctor("--registry", "memory")
    assert told.status == Exit.OK
    assert told.states("registry") == dict.fromkeys(REGISTRY, "ok")
    assert told.states("transport") == dict.fromkeys(TRANSPORT, "ok")
    assert told.finding("transport", "listen")["seen"].endswith("for tcp and http")


@pytest.mark.parametrize("transport", ["memory", "http", "tcp"])
def test_each_transport_listens_and_calls_itself(doctor: Doctor, transport: str) -> None:
    told = doctor("--registry=memory", "--clock=0", f"--transport={transport}")
    assert told.states("transport") == dict.fromkeys(TRANSPORT, "ok")


def test_where_each_choice_came_from_is_told(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICRO_REGISTRY", "memory")
    told = doctor("--clock=0")
    assert (told.parts["registry"]["url"], told.parts["registry"]["source"]) == (
        "memory",
        "MICRO_REGISTRY",
    )
    assert (told.parts["transport"]["url"], told.parts["transport"]["source"]) == (
        "tcp,http",
        "default",
    )


def test_an_address_that_replaces_the_hosts_is_told_as_a_source_too(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICRO_REGISTRY_ADDRESS", "elsewhere")
    told = doctor("--registry=memory", *QUICK)
    assert told.parts["registry"]["source"] == "--registry"
    monkeypatch.setenv("MICRO_REGISTRY", "memory://here")
    told = doctor(*QUICK)
    assert told.parts["registry"]["url"] == "memory://elsewhere"
    assert told.parts["registry"]["source"] == "MICRO_REGISTRY and MICRO_REGISTRY_ADDRESS"


def test_people_read_a_line_of_what_was_seen_and_one_of_what_helps(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--registry=memory", "--register_ttl=1ms", *QUICK]) == Exit.ERROR
    out, _ = capfd.readouterr()
    assert out.startswith("registry memory (from --registry)\n  FAILED   reach ")
    assert re.search(r"\n +-> set --register_ttl \(MICRO_REGISTER_TTL\) to 0.01s or more\n", out)
    assert "  skipped  rights     not tried, as 'reach' failed\n" in out
    assert "  ok       call " in out
    assert re.search(r"\n\d+ checks: \d+ ok, 1 failed, 5 skipped\n$", out)


def test_a_probe_lives_as_long_as_a_node_of_the_service_would(doctor: Doctor) -> None:
    told = doctor("--registry=memory", "--register_ttl=7s", *QUICK)
    assert told.finding("registry", "rights")["seen"].endswith("for 7 s")


def test_the_clock_is_watched_for_no_longer_than_asked(faulty: Callable[..., Told]) -> None:
    skipped = faulty("patient", "--register_ttl=60s", "--transport=memory")
    assert skipped.status == Exit.OK
    finding = skipped.finding("registry", "clock")
    assert finding["state"] == "skipped"
    assert finding["mend"] == "to allow it: --clock 120s"


# -- what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "why"),
    [("silent", "no answer in 2 s"), ("broken", "ValueError: a bug of the plugin")],
)
def test_of_several_hosts_the_one_that_does_not_do_is_named(
    faulty: Callable[..., Told], fault: str, why: str
) -> None:
    said = faulty(f"healthy,{fault}").finding("registry", "hosts")
    assert said["state"] == "warning"
    assert said["seen"] == f"1 of 2 hosts answer; {fault}: {why}"


@pytest.mark.parametrize(
    ("fault", "check", "seen", "mend"),
    [
        ("silent", "reach", "no answer in 2 s", "is it stopped, or overloaded?"),
        ("broken", "reach", "ValueError: a bug of the plugin", "--log_level debug"),
        ("read-only", "rights", "no right to write", "the right to read and to write"),
        ("write-only", "read", "is not found", "may this user read what it writes?"),
        ("garbling", "read", "found as another", "one cluster?"),
        ("secretive", "read", "not among all services", "one cluster?"),
        ("deaf", "watch", "did not see it go within", "does a proxy between"),
    ],
)
def test_a_fault_of_the_registry_is_found_and_what_needs_it_is_skipped(
    faulty: Callable[[str], Told], fault: str, check: str, seen: str, mend: str
) -> None:
    told = faulty(fault)
    assert told.status == Exit.ERROR
    assert seen in told.finding("registry", check)["seen"]
    assert mend in told.finding("registry", check)["mend"]
    states = told.states("registry")
    assert [name for name, state in states.items() if state == "failed"] == [check]
    assert states["clock"] == "skipped"
    assert told.states("transport") == dict.fromkeys(TRANSPORT, "ok")


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("hasty", r"was gone after \d{3} ms"),
        ("slow clock", r"is there still, after [4-9](\.\d+)? s"),
    ],
)
def test_a_clock_that_leases_cannot_follow_is_found(
    faulty: Callable[..., Told], fault: str, seen: str
) -> None:
    told = faulty(fault, "--transport=memory")
    assert told.state("registry", "clock") == "failed"
    assert re.search(seen, told.finding("registry", "clock")["seen"])
    assert "NTP" in told.finding("registry", "clock")["mend"]


@pytest.mark.parametrize(
    ("fault", "check"), [("late", "watch"), ("slow", "latency"), ("sticky", "clean-up")]
)
def test_what_works_and_should_be_better_is_a_warning(
    faulty: Callable[..., Told], fault: str, check: str
) -> None:
    told = faulty(fault, *QUICK, "--register_interval=2s")
    assert told.status == Exit.OK
    states = told.states("registry")
    assert [name for name, state in states.items() if state == "warning"] == [check]
    assert told.finding("registry", check)["mend"]


@pytest.mark.parametrize("fault", ["deaf", "garbling", "secret", "slow clock"])
def test_nothing_is_left_behind_whatever_fails(faulty: Callable[..., Told], fault: str) -> None:
    faulty(fault, "--transport=memory", "--clock=3s")
    assert not sys.modules["faulty"].LEFT


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["--registry=edcd"], "did you mean 'etcd'?"),
        (["--registry=memory", "--transport=quic"], "no transport has the scheme 'quic'"),
        (["--registry=memory", "--register_interval=1m"], "register_interval"),
        (["--registry=memory", "--extensions=missing"], "no extension has the name 'missing'"),
    ],
)
def test_settings_that_no_service_could_start_with_are_told(
    doctor: Doctor, arguments: list[str], seen: str
) -> None:
    told = doctor(*arguments)
    assert told.status == Exit.ERROR
    assert told.parts.keys() == {"settings"}
    assert seen in told.finding("settings", "settings")["seen"]
    assert told.finding("settings", "settings")["mend"]


# -- transports -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["http", "tcp", "tcp,http"])
def test_a_port_that_is_taken_is_told(
    doctor: Doctor, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_check_transport, "_GOES", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = doctor(
            *("--registry=memory", "--clock=0", f"--transport={transport}"),
            f"--server_address={address}",
        )
    assert told.status == Exit.ERROR
    finding = told.finding("transport", "listen")
    assert f"cannot listen at {address}: the port is in use" in finding["seen"]
    assert "end who listens there, or choose another address" in finding["mend"]
    assert told.states("transport") == {
        "listen": "failed",
        "call": "skipped",
        "latency": "skipped",
    }


def test_transports_are_well_in_any_order(doctor: Doctor) -> None:
    told = doctor("--registry=memory", "--clock=0", "--transport=http,tcp")
    assert told.status == Exit.OK


def test_an_address_beyond_this_machine_needs_tls_or_consent(doctor: Doctor) -> None:
    flags = ("--registry=memory", "--clock=0", "--server_address=0.0.0.0:0")
    refused = doctor(*flags)
    assert "without TLS" in refused.finding("transport", "listen")["seen"]
    assert doctor(*flags, "--server_insecure").status == Exit.OK


def test_an_advertised_address_that_does_not_answer_is_a_warning(doctor: Doctor) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        told = doctor("--registry=memory", "--clock=0", f"--server_advertise={address}")
    assert told.status == Exit.OK
    finding = told.finding("transport", "advertise")
    assert finding["state"] == "warning"
    assert f"{address}, which others are told, cannot be called from here" in finding["seen"]


def test_certificates_of_the_service_are_tried(doctor: Doctor, tmp_path: Path) -> None:
    mine, other = Authority.create(tmp_path / "mine"), Authority.create(tmp_path / "other")
    shown = mine.service("greeter")
    flags = ["--registry=memory", "--clock=0", f"--tls_cert_file={shown.certificate}"]
    flags += [f"--tls_key_file={shown.key}"]
    good = doctor(*flags, f"--tls_ca_file={mine.ca}")
    assert good.states("transport") == dict.fromkeys(["tls", *TRANSPORT], "ok")
    assert "svc/greeter" in good.finding("transport", "tls")["seen"]
    untrusted = doctor(*flags, f"--tls_ca_file={other.ca}")
    assert untrusted.state("transport", "call") == "failed"
    of_another = doctor(*flags, f"--tls_ca_file={mine.ca}", "--server_name=other")
    assert (
        "make one of its own: micro cert new other"
        in (of_another.finding("transport", "tls")["seen"])
    )
    assert of_another.state("transport", "listen") == "skipped"


# -- several at once, and interrupted -------------------------------------------------------------


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [MICRO, "doctor", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def test_doctors_at_once_do_not_disturb_each_other() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
    arguments = ("--clock=0", f"--server_address={address}", "--json")
    with running(*arguments) as one, running(*arguments) as two:
        for doctor in (one, two):
            out, err = doctor.communicate(timeout=PATIENCE)
            assert doctor.returncode == Exit.OK, out + err


def test_an_interrupt_ends_it_with_its_status() -> None:
    with running("--registry=memory", "--register_ttl=1h", "--clock=1h") as process:
        assert process.stdout is not None
        while " watch " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.INTERRUPTED
    assert not err.strip()


# -- mdns -----------------------------------------------------------------------------------------

_NEW_NETWORK = 0x40000000


def run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}, of iproute2")
    subprocess.run(command, check=True)


@pytest.fixture
def network() -> Iterator[Callable[..., None]]:
    """``network("ip", "link", ...)`` in a network of this test's own, with lo, which is down."""
    libc = ctypes.CDLL(None)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if not hasattr(libc, "unshare") or libc.unshare(_NEW_NETWORK) != 0:
            pytest.skip("needs a network namespace")
        try:
            yield run
        finally:
            assert libc.setns(home, _NEW_NETWORK) == 0
    finally:
        os.close(home)


def test_mdns_is_healthy_on_a_host_with_nothing_but_lo(
    doctor: Doctor, network: Callable[..., None]
) -> None:
    network("ip", "link", "set", "lo", "up")
    told = doctor("--registry=mdns")
    assert told.status == Exit.OK
    states = told.states("registry")
    assert states.pop("multicast") == "warning"
    assert states == dict.fromkeys(REGISTRY, "ok")
    assert told.finding("registry", "multicast")["seen"] == (
        "heard itself on lo: nodes of this host alone are seen"
    )


def test_mdns_hears_itself_on_each_interface(doctor: Doctor, network: Callable[..., None]) -> None:
    network("ip", "link", "set", "lo", "up")
    network("ip", "link", "add", "one", "type", "veth", "peer", "name", "two")
    network("ip", "addr", "add", "10.77.0.1/24", "dev", "one")
    for name in ("one", "two"):
        network("ip", "link", "set", name, "up")
    told = doctor("--registry=mdns", *QUICK)
    finding = told.finding("registry", "multicast")
    assert finding["state"] == "ok"
    assert "lo" in finding["seen"]
    assert "one" in finding["seen"]


def test_a_host_without_multicast_is_told_what_to_use(
    doctor: Doctor, network: Callable[..., None]
) -> None:
    told = doctor("--registry=mdns", *QUICK)
    assert told.status == Exit.ERROR
    assert "no interface takes multicast" in told.finding("registry", "reach")["seen"]
    assert told.state("registry", "multicast") == "skipped"


def test_multicast_that_does_not_come_back_is_told(
    doctor: Doctor, network: Callable[..., None]
) -> None:
    network("ip", "link", "set", "lo", "up")
    # Every packet is too long for it, so that it is dropped as by a firewall.
    network("tc", "qdisc", "add", "dev", "lo", "root", "bfifo", "limit", "1")
    told = doctor("--registry=mdns", *QUICK)
    assert told.status == Exit.ERROR
    finding = told.finding("registry", "multicast")
    assert finding["state"] == "failed"
    assert finding["seen"] == "heard itself on no interface; nothing came back on lo"
    assert "224.0.0.251, port 5353" in finding["mend"]


def test_quantiles_are_those_that_a_share_does_not_exceed() -> None:
    took = [float(number) for number in range(1, 101)]
    assert [quantile(took, share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([7.0], 0.5) == 7
