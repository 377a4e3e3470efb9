"""Programs on etcd: unedited, chosen by any setting; and what they say of an etcd that refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from micro.testing.certificates import Authority
from micro.testing.servers import EtcdServer

EXAMPLE = Path(__file__).parents[1] / "examples/helloworld.py"
SECRET = "correct-horse"
#: Seconds that a program may take to start, or to end.
PATIENCE = 20


@dataclass(frozen=True)
class Choice:
    """How a program is told of etcd; ``URL`` and ``ADDRESS`` stand for those of the test's etcd."""

    flags: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    argument: str = ""

    def at(self, url: str, address: str) -> Choice:
        def filled(text: str) -> str:
            return text.replace("URL", url).replace("ADDRESS", address)

        variables = {f"MICRO_{name}": filled(text) for name, text in self.variables.items()}
        return Choice([filled(flag) for flag in self.flags], variables, filled(self.argument))


NOBODY = "etcd://127.0.0.1:1"
CHOICES = {
    "flag": Choice(["--registry", "URL"]),
    "variable": Choice([], {"REGISTRY": "URL"}),
    "variable and address": Choice([], {"REGISTRY": "etcd", "REGISTRY_ADDRESS": "ADDRESS"}),
    "argument": Choice(argument="URL"),
    "flag, not variable": Choice(["--registry", "URL"], {"REGISTRY": NOBODY}),
    "flag, not address": Choice(
        ["--registry", "URL"], {"REGISTRY": "etcd", "REGISTRY_ADDRESS": "127.0.0.1:1"}
    ),
    "flag, not argument": Choice(["--registry", "URL"], argument=NOBODY),
    "variable, not argument": Choice([], {"REGISTRY": "URL"}, argument=NOBODY),
}


@pytest.mark.parametrize("name", CHOICES)
def test_helloworld_on_etcd_is_found_and_called(
    name: str, etcd: EtcdServer, etcd_url: str, tmp_path: Path
) -> None:
    choice = CHOICES[name].at(etcd_url, etcd.address)
    with serving(choice, tmp_path) as registered:
        shown = registered.replace("etcd://", "").partition("/")[0]
        assert shown == etcd.address

        flags = [*choice.flags] or ([] if choice.variables else ["--registry", choice.argument])
        request = ["call", "helloworld", "Helloworld.Call", '{"name": "Alice"}']
        done = run(["-m", "micro", *request, *flags], choice.variables)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"message": "Hello Alice"}


@contextmanager
def serving(choice: Choice, folder: Path) -> Iterator[str]:
    """Helloworld, with what it says that it is registered with."""
    program = EXAMPLE
    if choice.argument:
        made = f'micro.Service("helloworld", registry={choice.argument!r})'
        program = folder / "helloworld.py"
        program.write_text(EXAMPLE.read_text().replace('micro.Service("helloworld")', made))
    command = [sys.executable, str(program), *choice.flags]
    environment = environment_with(choice.variables)
    popen = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(PATIENCE, popen.kill)
    watchdog.start()
    try:
        assert popen.stderr is not None
        said = popen.stderr.readline()
        found = re.search(r"serving at \S+, registered with (\S+)", said)
        assert found, said + popen.stderr.read()
        yield found[1]
    finally:
        watchdog.cancel()
        popen.kill()
        popen.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def refusing(
    etcd_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mapping[str, str]]:
    """What URLs are made of: an etcd that knows ``root``, and ``guest``, who may do nothing; one
    with TLS; and an authority that has not signed its certificate."""
    folder = tmp_path_factory.mktemp("refusing")
    shown, other = Authority.create(folder / "one").server(), Authority.create(folder / "other")
    with (
        EtcdServer(etcd_binary, folder / "login") as login,
        EtcdServer(etcd_binary, folder / "tls", tls=shown) as tls,
    ):
        ask(login, "auth/role/add", name="root")
        for user in ("root", "guest"):
            ask(login, "auth/user/add", name=user, password=SECRET)
        ask(login, "auth/user/grant", user="root", role="root")
        ask(login, "auth/enable")
        yield {"secret": SECRET, "login": login.address, "tls": tls.address, "ca": str(other.ca)}


@pytest.mark.parametrize(
    ("url", "status", "says"),
    [
        pytest.param("wrong-{secret}@{login}", 1, "wrong user name or password", id="password"),
        pytest.param("{secret}@{login}", 1, "permission denied", id="rights"),
        pytest.param("{secret}@{tls}?ca={ca}", 2, "is not trusted", id="authority"),
        pytest.param("{secret}@{tls}", 2, "the server speaks TLS", id="no TLS"),
        pytest.param("{secret}@{login}?tls=true", 2, "does not speak TLS", id="TLS"),
    ],
)
def test_a_program_that_etcd_refuses_ends_with_one_line_and_without_the_secret(
    url: str, status: int, says: str, refusing: Mapping[str, str]
) -> None:
    registry = f"etcd://guest:{url.format_map(refusing)}"

    done = run([str(EXAMPLE), "--registry", registry], {})

    assert done.returncode == status, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("helloworld: --registry: ")
    assert SECRET not in done.stdout + done.stderr


def run(words: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=environment_with(variables),
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's, but of what concerns us only ``variables``."""
    others = {name: text for name, text in os.environ.items() if not name.startswith("MICRO_")}
    return others | dict(variables)


def ask(server: EtcdServer, method: str, **said: str) -> None:
    """A request by etcd's gateway for JSON."""
    url = f"http://{server.address}/v3/{method}"
    urlopen(Request(url, json.dumps(said).encode(), method="POST"), timeout=5).close()
