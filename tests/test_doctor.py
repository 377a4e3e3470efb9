"""``micro doctor`` on real servers, healthy and broken: it finds what is, and leaves nothing."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

from micro.cli import _checks, main
from micro.cli._output import Exit
from micro.plugins import Plugins
from micro.registry import Registry
from micro.testing.certificates import Authority
from micro.testing.lifecycle import nobody
from micro.testing.servers import ConsulServer, EtcdServer, NatsServer, Server
from micro.url import URL

CHECKS = ["reach", "rights", "read", "watch", "clock", "latency", "clean-up"]
SECRET = "canary-7f3b"
#: Seconds that any one step may take.
PATIENCE = 50
SLACK = 2.0
QUICK = ("--clock=0", "--transport=memory")


class Place(NamedTuple):
    """A server of this module's own, and a namespace in it that nobody else has."""

    server: Server
    url: str


@pytest.fixture(params=["etcd", "consul", "nats", "nats-kv"])
def place(request: pytest.FixtureRequest) -> Place:
    scheme: str = request.param
    name = scheme.partition("-")[0]
    url: str = request.getfixturevalue(f"{name}_url")
    server: Server = request.getfixturevalue(name)
    return Place(server, url.replace(f"{name}://", f"{scheme}://"))


class Told(NamedTuple):
    status: int
    checks: dict[str, dict[str, Any]]
    text: str

    def states(self) -> dict[str, str]:
        return {name: check["state"] for name, check in self.checks.items()}

    def failed(self) -> tuple[str, str, str]:
        """The one check that failed, what was seen, and what helps."""
        (check,) = (one for one in self.checks.values() if one["state"] == "failed")
        return check["check"], check["seen"], check["mend"]


Doctor = Callable[..., Told]


@pytest.fixture
def doctor(capfd: pytest.CaptureFixture[str]) -> Doctor:
    def run(url: str, *arguments: str) -> Told:
        status = main(["doctor", f"--registry={url}", *(arguments or QUICK), "--json"])
        out, err = capfd.readouterr()
        (part,) = (part for part in json.loads(out)["parts"] if part["kind"] == "registry")
        return Told(status, {one["check"]: one for one in part["checks"]}, out + err)

    return run


def registered(url: str) -> tuple[str, ...]:
    """The services that are in the namespace."""

    async def ask() -> tuple[str, ...]:
        plugins = Plugins()
        kind: type[Registry] = Registry  # type: ignore[type-abstract]
        registry = plugins.create(kind, URL.parse(url))
        connections = plugins.connections()
        try:
            await registry.connect(connections)
            return await registry.services()
        finally:
            await registry.aclose()
            await connections.aclose()

    return asyncio.run(ask())


@contextmanager
def doctor_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "micro", "doctor", *arguments]
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


def wait_for(process: subprocess.Popen[str], check: str) -> None:
    """Read until this check has gone well."""
    assert process.stdout is not None
    while f"  ok       {check} " not in process.stdout.readline():
        assert process.poll() is None


# -- every kind of server -------------------------------------------------------------------------


def test_a_healthy_server_passes_every_check_and_nothing_is_left(
    place: Place, doctor: Doctor
) -> None:
    told = doctor(place.url, "--transport=memory")
    assert told.status == Exit.OK, told.text
    assert told.states() == dict.fromkeys(CHECKS, "ok")
    assert registered(place.url) == ()


def test_a_server_that_is_down_is_told(place: Place, doctor: Doctor) -> None:
    place.server.stop()
    told = doctor(place.url)
    assert told.status == Exit.ERROR
    check, seen, mend = told.failed()
    assert check == "reach"
    assert re.search("refused|Connect call failed", seen)
    assert seen.startswith("--registry: ")
    assert mend.startswith("start the server, or correct the address in --registry")
    assert set(told.states().values()) == {"failed", "skipped"}


def test_a_server_that_is_silent_is_told_in_time(place: Place, doctor: Doctor) -> None:
    place.server.pause()
    try:
        began = time.monotonic()
        told = doctor(f"{place.url}?timeout=1")
        assert time.monotonic() - began < 5 + SLACK
    finally:
        place.server.resume()
    check, seen, _ = told.failed()
    assert check == "reach"
    assert "no answer in 1 s" in seen


def test_a_dead_host_of_several_is_a_warning(place: Place, doctor: Doctor) -> None:
    address = place.server.address
    with nobody(silent=False) as dead:
        told = doctor(place.url.replace(address, f"{address},{dead},{address}"))
    assert told.status == Exit.OK, told.text
    assert {name for name, state in told.states().items() if state == "warning"} == {"hosts"}
    said = told.checks["hosts"]
    assert said["seen"].startswith("2 of 3 hosts answer; --registry: ")
    assert f"{dead}: connection refused" in said["seen"]
    assert said["mend"].endswith("start it, or correct its address in --registry")


@pytest.mark.parametrize("place", ["etcd"], indirect=True)
def test_hosts_that_all_answer_are_told(place: Place, doctor: Doctor) -> None:
    address = place.server.address
    local = address.replace("127.0.0.1", "localhost")
    told = doctor(place.url.replace(address, f"{address},{local}"))
    assert told.checks["hosts"]["seen"] == "all 2 hosts answer"


@pytest.mark.parametrize("place", ["etcd"], indirect=True)
def test_a_server_that_falls_silent_meanwhile_is_told_and_so_is_what_is_left(
    place: Place,
) -> None:
    flags = ("--transport=memory", "--register_ttl=5s")
    with doctor_process(f"--registry={place.url}?timeout=1", *flags) as process:
        wait_for(process, "watch")
        place.server.pause()
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            place.server.resume()
    assert process.returncode == Exit.ERROR, out + err
    assert "  FAILED   latency " in out
    assert "  warning  clean-up   a probe may be left: " in out
    assert "it goes by itself, 5 s after" in out


def test_an_interrupt_leaves_nothing(place: Place) -> None:
    with doctor_process(f"--registry={place.url}", "--transport=memory") as process:
        wait_for(process, "watch")
        assert len(registered(place.url)) == 1
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == Exit.INTERRUPTED
    assert not err.strip()
    assert registered(place.url) == ()


@pytest.mark.parametrize("place", ["etcd"], indirect=True)
def test_doctors_at_once_do_not_disturb_each_other(place: Place) -> None:
    arguments = (f"--registry={place.url}", *QUICK)
    with doctor_process(*arguments) as one, doctor_process(*arguments) as two:
        for process in (one, two):
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == Exit.OK, out + err
    assert registered(place.url) == ()


# -- etcd -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusing(
    etcd_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """What URLs are made of: an etcd with users, one with TLS, and two authorities."""
    folder = tmp_path_factory.mktemp("refusing")
    mine, other = Authority.create(folder / "one"), Authority.create(folder / "other")
    with (
        EtcdServer(etcd_binary, folder / "login", arguments=["--bcrypt-cost=4"]) as login,
        EtcdServer(etcd_binary, folder / "tls", tls=mine.server()) as tls,
    ):
        everything = {"key": "Lw==", "range_end": "MA=="}  # from / up to 0
        for user in ("root", "reader", "guest"):
            ask(login, "auth/user/add", name=user, password=SECRET)
            ask(login, "auth/role/add", name=user)
            ask(login, "auth/user/grant", user=user, role=user)
        ask(login, "auth/role/grant", name="reader", perm={"permType": "READ", **everything})
        ask(login, "auth/enable")
        yield {
            "secret": SECRET,
            "login": login.address,
            "tls": tls.address,
            "mine": str(mine.ca),
            "other": str(other.ca),
        }


def ask(server: EtcdServer, what: str, **said: object) -> None:
    request = Request(f"http://{server.address}/v3/{what}", json.dumps(said).encode())
    urlopen(request, timeout=5).close()


@pytest.mark.parametrize(
    ("url", "check", "seen", "mend"),
    [
        (
            "etcd://root:wrong-{secret}@{login}",
            "reach",
            "wrong user name or password",
            "give --registry a login that the server knows",
        ),
        (
            "etcd://guest:{secret}@{login}",
            "reach",
            "needs the right to read these keys",
            "the right to read and to write there, or use another user in --registry",
        ),
        (
            "etcd://reader:{secret}@{login}",
            "rights",
            "permission denied",
            "the right to read and to write there, or use another user in --registry",
        ),
        ("etcd://{tls}", "reach", "the server speaks TLS; add ?tls=true", "correct the setting"),
        ("etcd://{tls}?ca={other}", "reach", "certificate is not trusted", "correct the setting"),
        ("etcd://root:{secret}@{login}?tls=true", "reach", "does not speak TLS", "correct the"),
    ],
)
def test_an_etcd_that_refuses_is_told_with_what_helps(
    doctor: Doctor, refusing: Mapping[str, str], url: str, check: str, seen: str, mend: str
) -> None:
    told = doctor(url.format(**refusing))
    assert told.status == Exit.ERROR
    assert told.failed()[0] == check
    assert seen in told.failed()[1]
    assert mend in told.failed()[2]
    assert SECRET not in told.text


def test_an_etcd_with_users_and_one_with_tls_are_healthy(
    doctor: Doctor, refusing: Mapping[str, str]
) -> None:
    for url in ("etcd://root:{secret}@{login}/mine", "etcd://{tls}/mine?ca={mine}"):
        told = doctor(url.format(**refusing))
        assert told.status == Exit.OK, told.text
        assert SECRET not in told.text


# -- Consul ---------------------------------------------------------------------------------------

ROOT = "00000000-0000-0000-0000-000000000001"
ACLS = (
    'acl { enabled = true, default_policy = "deny", '
    f'tokens {{ initial_management = "{ROOT}", agent = "{ROOT}" }} }}'
)
NODES = 'node_prefix "" { policy = "read" }'
RULES = {
    "writer": f'service_prefix "prod/" {{ policy = "write" }} {NODES}',
    "reader": f'service_prefix "prod/" {{ policy = "read" }} {NODES}',
    "nothing": 'key_prefix "" { policy = "read" }',
}


@pytest.fixture(scope="module")
def denying(
    consul_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """What URLs are made of: a Consul that asks for tokens, and some tokens."""
    with ConsulServer(consul_binary, tmp_path_factory.mktemp("acl"), hcl=[ACLS]) as server:
        made = {"address": server.address}
        for name, rules in RULES.items():
            tell(server, "acl/policy", Name=name, Rules=rules)
            made[name] = tell(server, "acl/token", Policies=[{"Name": name}])["SecretID"]
        yield made


def tell(server: ConsulServer, what: str, **said: object) -> dict[str, Any]:
    url, headers = f"http://{server.address}/v1/{what}", {"X-Consul-Token": ROOT}
    request = Request(url, json.dumps(said).encode(), headers, method="PUT")
    with urlopen(request, timeout=10) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


@pytest.mark.parametrize(
    ("url", "seen", "mend"),
    [
        ("consul://:0{writer}@{address}/prod", "does not know the token", "a login that the"),
        ("consul://{address}/prod", "it asks for a token", "a login that the server knows"),
        ("consul://:{reader}@{address}/prod", "Permission denied", "the right to read and to"),
        ("consul://:{nothing}@{address}/prod", "Permission denied", "the right to read and to"),
    ],
)
def test_a_consul_that_refuses_is_told_with_what_helps(
    doctor: Doctor, denying: Mapping[str, str], url: str, seen: str, mend: str
) -> None:
    told = doctor(url.format(**denying))
    assert told.status == Exit.ERROR
    check, said, helps = told.failed()
    assert check in ("reach", "rights")
    assert seen in said
    assert mend in helps
    assert not [word for word in RULES if denying[word] in told.text]


def test_a_consul_with_tokens_is_healthy(doctor: Doctor, denying: Mapping[str, str]) -> None:
    told = doctor("consul://:{writer}@{address}/prod".format(**denying))
    assert told.status == Exit.OK, told.text


# -- NATS -----------------------------------------------------------------------------------------

USERS = """
authorization { users: [
  {user: all, password: SECRET},
  {user: deaf, password: SECRET, permissions: {publish: [">"], subscribe: ["_INBOX.>"]}},
  {user: mute, password: SECRET, permissions: {publish: ["_INBOX.>"], subscribe: [">"]}},
] }
"""


@pytest.fixture(scope="module")
def guarded(nats_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a NATS server with users."""
    folder = tmp_path_factory.mktemp("guarded")
    config = folder / "nats.conf"
    config.write_text(USERS.replace("SECRET", f'"{SECRET}"'))
    with NatsServer(nats_binary, folder, arguments=["-c", str(config)]) as server:
        yield server.address


@pytest.mark.parametrize(
    ("login", "seen", "mend"),
    [
        (f"nats://all:wrong-{SECRET}@", "Authorization|login", "a login that the server knows"),
        ("nats://", "Authorization|login", "a login that the server knows"),
        (f"nats://deaf:{SECRET}@", "[Pp]ermission", "the right to read and to write there"),
        (f"nats://mute:{SECRET}@", "[Pp]ermission", "the right to read and to write there"),
        (f"nats-kv://all:wrong-{SECRET}@", "Authorization|login", "a login that the server knows"),
        (f"nats-kv://mute:{SECRET}@", "[Pp]ermission", "the right to read and to write there"),
    ],
)
def test_a_nats_server_that_refuses_is_told_with_what_helps(
    doctor: Doctor, guarded: str, login: str, seen: str, mend: str
) -> None:
    told = doctor(f"{login}{guarded}")
    assert told.status == Exit.ERROR
    check, said, helps = told.failed()
    assert check in ("reach", "rights")
    assert re.search(seen, said)
    assert mend in helps
    assert SECRET not in told.text


@pytest.mark.parametrize("scheme", ["nats", "nats-kv"])
def test_a_nats_server_with_users_is_healthy(doctor: Doctor, guarded: str, scheme: str) -> None:
    told = doctor(f"{scheme}://all:{SECRET}@{guarded}")
    assert told.status == Exit.OK, told.text


# -- the page -------------------------------------------------------------------------------------


def test_the_page_has_every_check() -> None:
    page = (Path(__file__).parents[1] / "docs/doctor.md").read_text()
    sources = Path(_checks.__file__).parent.glob("_*.py")
    made = {name for path in sources for name in re.findall(r' run\("([a-z-]+)"', path.read_text())}
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) == made | {"settings"}
    assert all(f"`{name}`" in page for name in _checks.Finding.__struct_fields__)
