"""``micro cert``: an authority for development and its certificates."""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import micro
from micro._x509 import read
from micro.cli import main
from micro.cli._output import Exit
from micro.settings import Settings

PATIENCE = 30
ID = "spiffe://micro.internal/ns/default/svc"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of an authority."""
    assert main(["cert", "ca", str(tmp_path / "certs")]) == Exit.OK
    return tmp_path / "certs"


def test_files_are_for_their_owner_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cert", "new", "web", "--ca", str(folder)]) == Exit.OK
    out = capsys.readouterr().out
    assert f"--tls_cert_file {folder}/web.pem --tls_key_file {folder}/web.key" in out
    names = {"ca.pem", "ca.key", "web.pem", "web.key"}
    assert {path.name for path in folder.iterdir()} == names
    assert mode(folder / "ca.key") == mode(folder / "web.key") == 0o600
    assert mode(folder) == 0o700
    for name in ("ca.key", "web.key"):
        assert (folder / name).read_text().splitlines()[1] not in out


def test_certificate_is_of_the_service_and_of_its_hosts(folder: Path) -> None:
    words = ("--host", "node.example", "--host", "10.0.0.7", "--namespace", "prod", "--days", "2")
    assert main(["cert", "new", "web", "--ca", str(folder), *words]) == Exit.OK
    der = ssl.PEM_cert_to_DER_cert((folder / "web.pem").read_text())
    found = read(der)
    assert found.uris == ("spiffe://micro.internal/ns/prod/svc/web",)
    assert found.names == ("localhost", "node.example")
    assert bytes([10, 0, 0, 7]) in der
    assert not found.fault()
    assert abs(found.ends - time.time() - 2 * 24 * 3600) < 60


def test_domain_is_that_of_the_authority(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    assert main(["cert", "ca", str(folder), "--domain", "acme.example"]) == Exit.OK
    assert main(["cert", "new", "web", "--ca", str(folder), "--out", str(tmp_path)]) == Exit.OK
    der = ssl.PEM_cert_to_DER_cert((tmp_path / "web.pem").read_text())
    assert read(der).uris == ("spiffe://acme.example/ns/default/svc/web",)


def test_certificate_ends_with_its_authority(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    assert main(["cert", "ca", str(folder), "--days", "1"]) == Exit.OK
    assert main(["cert", "new", "web", "--ca", str(folder), "--days", "90"]) == Exit.OK
    ends = [
        read(ssl.PEM_cert_to_DER_cert((folder / name).read_text())).ends
        for name in ("ca.pem", "web.pem")
    ]
    assert abs(ends[0] - ends[1]) <= 1


@pytest.mark.parametrize("command", [("ca",), ("new", "web", "--ca")])
def test_nothing_is_overwritten_unless_it_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    words = ["cert", *command, str(folder)]
    name = "ca" if command == ("ca",) else "web"
    if name == "web":
        assert main(words) == Exit.OK
    before = (folder / f"{name}.key").read_bytes()
    assert main(words) == Exit.USAGE
    assert "is there already; write over it with --force" in capsys.readouterr().err
    assert (folder / f"{name}.key").read_bytes() == before
    assert main([*words, "--force"]) == Exit.OK
    assert (folder / f"{name}.key").read_bytes() != before
    assert mode(folder / f"{name}.key") == 0o600


def test_half_of_a_pair_that_is_there_is_kept(folder: Path) -> None:
    (folder / "web.key").write_text("mine")
    assert main(["cert", "new", "web", "--ca", str(folder)]) == Exit.USAGE
    assert (folder / "web.key").read_text() == "mine"
    assert not (folder / "web.pem").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["new", "a/b", "--ca", "{}"], "InvalidArgument: service name 'a/b'"),
        (["new", "ca", "--ca", "{}"], "a service cannot be called 'ca' here"),
        (["new", "web", "--ca", "{}/none"], "none/ca.pem: No such file.* micro cert ca"),
        (["new", "web"], "Missing option '--ca'"),
        (["new", "web", "--ca", "{}", "--days", "0"], "0 is not in the range"),
        (["new", "web", "--ca", "{}", "--namespace", "a/b"], "--namespace: 'a/b'"),
        (["new", "web", "--ca", "{}", "--host", "ü.example"], "--host: 'ü.example'"),
        (["ca", "{}/other", "--domain", "A b"], "--domain: 'A b'"),
        (["ca", "{}/ca.pem"], "ca.pem"),
        (["other"], "No such command 'other'"),
    ],
)
def test_mistake_tells_what_to_write(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    capsys.readouterr()
    status = main(["cert", *(word.replace("{}", str(folder)) for word in words)])
    err = capsys.readouterr().err
    assert status == Exit.USAGE
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(text, err), err
    assert sorted(path.name for path in folder.iterdir()) == ["ca.key", "ca.pem"]


@pytest.mark.parametrize("spoil", ["ca.pem", "ca.key", "both"])
def test_authority_that_is_none_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str
) -> None:
    if spoil == "both":
        assert main(["cert", "ca", str(tmp_path / "other")]) == Exit.OK
        (folder / "ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    else:
        (folder / spoil).write_text("secret-canary")
    capsys.readouterr()
    assert main(["cert", "new", "web", "--ca", str(folder)]) == Exit.USAGE
    err = capsys.readouterr().err
    assert "has no certificate of `micro cert ca` and its key" in err
    assert "canary" not in err


def test_json_names_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["cert", "new", "web", "--ca", str(folder), "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out) == {
        "certificate": str(folder / "web.pem"),
        "key": str(folder / "web.key"),
        "ca": str(folder / "ca.pem"),
        "identity": f"{ID}/web",
    }


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cert"]) == Exit.USAGE
    assert "Make certificates of services" in capsys.readouterr().err


def test_without_cryptography_it_says_what_to_install(tmp_path: Path) -> None:
    """All else works without it."""
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from micro.cli import main; sys.exit(main(sys.argv[1:]))"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *words],
            text=True,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )

    done = run("cert", "ca", str(tmp_path / "certs"))
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert "micro cert needs the package cryptography: pip install cryptography" in done.stderr
    assert run("version").returncode == Exit.OK
    assert run("cert", "--help").returncode == Exit.OK


class Who:
    async def am(self) -> str:
        return micro.context().identity


@pytest.mark.asyncio
async def test_services_call_each_other_with_these_certificates(folder: Path) -> None:
    names, plugins = ("one", "two", "three"), micro.Plugins()
    services = []
    for name in names:
        assert main(["cert", "new", name, "--ca", str(folder)]) == Exit.OK
        own = (f"--tls_cert_file={folder / name}.pem", f"--tls_key_file={folder / name}.key")
        service = micro.Service(name, registry="memory://certified", plugins=plugins)
        service.handle(Who())
        services.append((service, Settings((*own, f"--tls_ca_file={folder / 'ca.pem'}"), {})))
    (one, one_s), (two, two_s), (three, three_s) = services
    async with one.opened(one_s), two.opened(two_s), three.opened(three_s):
        for caller in (one, two, three):
            for name in names:
                assert await caller.call(name, "Who.Am") == f"{ID}/{caller.name}"


@pytest.mark.asyncio
async def test_micro_call_takes_certificates_from_flags_and_variables(folder: Path) -> None:
    for name in ("helloworld", "me"):
        assert main(["cert", "new", name, "--ca", str(folder)]) == Exit.OK

    def files(name: str) -> dict[str, str]:
        return {
            "tls_cert_file": f"{folder}/{name}.pem",
            "tls_key_file": f"{folder}/{name}.key",
            "tls_ca_file": f"{folder}/ca.pem",
        }

    def variables(name: str) -> dict[str, str]:
        return {f"MICRO_{key.upper()}": value for key, value in files(name).items()}

    service = micro.Service("helloworld", registry="memory")
    service.handle(Who())
    async with service.opened(Settings((), variables("helloworld"))):
        async with service.client.watch("helloworld") as watch:
            address = watch.nodes[0].address
        call = [sys.executable, "-m", "micro", "call", "helloworld", "Who.Am", "--address", address]
        flags = [f"--{key}={value}" for key, value in files("me").items()]
        said = f'"{ID}/me"\n'
        assert await _run(call, variables("me")) == (Exit.OK, said)
        assert await _run([*call, *flags], {}) == (Exit.OK, said)
        status, text = await _run(call, {})
        assert status == Exit.UNAVAILABLE
        assert "speaks TLS; name its authority with --tls_ca_file" in text
        status, text = await _run([*call, f"--tls_ca_file={folder}/ca.pem"], {})
        assert status == Exit.UNAVAILABLE
        assert "it wants a certificate; give one with --tls_cert_file" in text
        call[4] = "other"
        status, text = await _run([*call, *flags], {})
        assert status == Exit.UNAVAILABLE
        assert "not of service 'other'" in text


async def _run(words: list[str], variables: dict[str, str]) -> tuple[int | None, str]:
    """Status, and what was printed."""
    environment = {"PATH": os.environ["PATH"], "MICRO_REGISTRY": "memory", **variables}
    process = await asyncio.create_subprocess_exec(
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
    )
    async with asyncio.timeout(PATIENCE):
        out, _ = await process.communicate()
    return process.returncode, out.decode()
