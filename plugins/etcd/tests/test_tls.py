"""TLS: what works, and mistakes, which are told at connect with what to do about them."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from micro.errors import ConfigError, Unavailable
from micro.registry import Node
from micro.testing.certificates import Authority, Identity
from micro.testing.ports import HOST
from micro.testing.servers import EtcdServer
from micro_plugin_etcd import EtcdRegistry

Connected = Callable[..., AbstractAsyncContextManager[EtcdRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
TIMEOUT = 3.0
#: Seconds that a busy machine gets.
SLACK = 2.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the servers do not trust."""
    return Authority.create(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def server(
    etcd_binary: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer]:
    """It speaks TLS, to all."""
    folder = tmp_path_factory.mktemp("tls")
    with EtcdServer(etcd_binary, folder, tls=authority.server()) as server:
        yield server


@pytest.fixture(scope="module")
def strict(
    etcd_binary: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EtcdServer]:
    """It wants a certificate of its clients."""
    folder = tmp_path_factory.mktemp("strict")
    identity = authority.server("strict")
    with EtcdServer(etcd_binary, folder, tls=identity, client_ca=authority.ca) as server:
        yield server


async def works(connected: Connected, url: str) -> None:
    async with connected(url) as registry:
        await registry.register(NODE, ttl=10)
        assert await registry.get("greeter") == (NODE,)
        await registry.deregister(NODE)


async def mistake(connected: Connected, url: str) -> str:
    """The text of the ConfigError, which comes in time."""
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        async with connected(url):
            pass
    assert time.monotonic() - began < TIMEOUT + SLACK
    text = str(caught.value)
    assert text.startswith("--registry: etcd")
    return text


def shown(identity: Identity) -> str:
    """Options for a client that shows this certificate."""
    return f"cert={identity.certificate}&key={identity.key}"


# -- what works -----------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("host", [HOST, "localhost"])
async def test_a_server_of_an_authority_of_ones_own_is_trusted_by_ca(
    connected: Connected, server: EtcdServer, authority: Authority, host: str
) -> None:
    await works(connected, f"etcd://{host}:{server.port}?ca={authority.ca}")


@pytest.mark.asyncio
async def test_a_client_shows_its_certificate(
    connected: Connected, strict: EtcdServer, authority: Authority
) -> None:
    identity = authority.client()
    await works(connected, f"{strict.url}?ca={authority.ca}&{shown(identity)}")


@pytest.mark.asyncio
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
async def test_without_ca_the_authorities_of_the_system_are_trusted(
    connected: Connected,
    server: EtcdServer,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    folder = authority.ca.parent
    shutil.copy(authority.ca, folder / "0123abcd.0")  # files of such names count in a folder
    monkeypatch.setenv("SSL_CERT_FILE", "/none.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/none")
    system = authority.ca if variable == "SSL_CERT_FILE" else folder
    monkeypatch.setenv(variable, str(system))
    await works(connected, f"{server.url}?tls=true")


@pytest.mark.asyncio
async def test_a_file_of_authorities_may_say_more_than_certificates(
    connected: Connected, server: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(f"# Főtanúsítvány\n{authority.ca.read_text()}", encoding="utf-8")
    await works(connected, f"{server.url}?ca={ca}")


# -- mistakes that the server's answer shows ------------------------------------------------------


@pytest.mark.asyncio
async def test_the_wrong_authority(
    connected: Connected, server: EtcdServer, stranger: Authority
) -> None:
    text = await mistake(connected, f"{server.url}?ca={stranger.ca}&timeout={TIMEOUT}")
    assert "the server's certificate is not trusted" in text
    assert "name its authority with ca=" in text


@pytest.mark.asyncio
async def test_an_authority_of_ones_own_that_was_not_named(
    connected: Connected, server: EtcdServer
) -> None:
    text = await mistake(connected, f"{server.url}?tls=true&timeout={TIMEOUT}")
    assert "name its authority with ca=" in text


@pytest.mark.asyncio
@pytest.mark.parametrize("wants_certificates", [False, True])
async def test_no_tls_to_a_server_that_speaks_it(
    connected: Connected, server: EtcdServer, strict: EtcdServer, wants_certificates: bool
) -> None:
    address = (strict if wants_certificates else server).address
    text = await mistake(connected, f"etcd://{address}?timeout={TIMEOUT}")
    assert "the server speaks TLS; add ?tls=true" in text


@pytest.mark.asyncio
async def test_tls_to_a_server_that_speaks_none(
    connected: Connected, etcd: EtcdServer, authority: Authority
) -> None:
    text = await mistake(connected, f"{etcd.url}?ca={authority.ca}&timeout={TIMEOUT}")
    assert "the server does not speak TLS; leave tls, ca, cert and key away" in text


@pytest.mark.asyncio
async def test_tls_to_the_port_for_peers_which_speaks_none(
    connected: Connected, etcd: EtcdServer, authority: Authority
) -> None:
    peers = f"{HOST}:{etcd._ports[1]}"  # it answers in plain HTTP/1.1
    text = await mistake(connected, f"etcd://{peers}?ca={authority.ca}&timeout={TIMEOUT}")
    assert "the server does not speak TLS; leave tls, ca, cert and key away" in text


@pytest.mark.asyncio
async def test_no_client_certificate(
    connected: Connected, strict: EtcdServer, authority: Authority
) -> None:
    text = await mistake(connected, f"{strict.url}?ca={authority.ca}&timeout={TIMEOUT}")
    assert "name a client certificate with cert= key=" in text


@pytest.mark.asyncio
async def test_a_client_certificate_of_another_authority(
    connected: Connected, strict: EtcdServer, authority: Authority, stranger: Authority
) -> None:
    files = f"ca={authority.ca}&{shown(stranger.client())}"
    text = await mistake(connected, f"{strict.url}?{files}&timeout={TIMEOUT}")
    assert "name a client certificate with cert= key=" in text


class Elsewhere(EtcdServer):
    """Its certificate is for another host."""

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1):
            return True


@pytest.mark.asyncio
async def test_a_certificate_for_another_host(
    connected: Connected, etcd_binary: Path, authority: Authority, tmp_path: Path
) -> None:
    identity = authority.service("elsewhere", uris=(), hosts=["etcd.example"])
    server = Elsewhere(etcd_binary, tmp_path, tls=identity)
    await asyncio.to_thread(server.start)
    try:
        for host in (HOST, "localhost"):
            url = f"etcd://{host}:{server.port}?ca={authority.ca}&timeout={TIMEOUT}"
            text = await mistake(connected, url)
            assert "use a host that it names" in text
            assert host in text
    finally:
        server.kill()


@pytest.mark.asyncio
async def test_a_mistake_at_one_host_of_several_is_told(
    connected: Connected, etcd: EtcdServer, server: EtcdServer, stranger: Authority
) -> None:
    hosts = f"{HOST}:1,{server.address}"
    text = await mistake(connected, f"etcd://{hosts}?ca={stranger.ca}&timeout={TIMEOUT}")
    assert "name its authority with ca=" in text


@pytest.mark.asyncio
@pytest.mark.parametrize("tls", ["", "tls=true&"])
async def test_a_server_that_is_not_there_is_no_mistake_of_tls(
    connected: Connected, tls: str
) -> None:
    with pytest.raises(Unavailable):
        async with connected(f"etcd://{HOST}:1?{tls}timeout={TIMEOUT}"):
            pass


@pytest.mark.asyncio
@pytest.mark.parametrize("tls", ["", "tls=true&"])
async def test_a_server_that_says_nothing_is_no_mistake_of_tls(
    connected: Connected, etcd: EtcdServer, tls: str
) -> None:
    began = time.monotonic()
    await asyncio.to_thread(etcd.pause)
    try:
        with pytest.raises(Unavailable):
            async with connected(f"{etcd.url}?{tls}timeout={TIMEOUT}"):
                pass
    finally:
        etcd.resume()
    assert time.monotonic() - began < TIMEOUT + SLACK


# -- mistakes in the files ------------------------------------------------------------------------


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> dict[str, str]:
    """Paths by a word for them."""
    client, other = authority.client(), authority.client("other")
    key = load_pem_private_key(client.key.read_bytes(), None)
    encrypted = key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"correct-horse")
    )
    (tmp_path / "encrypted").write_bytes(encrypted)
    (tmp_path / "garbage").write_bytes(b"\xff garbage")
    (tmp_path / "empty").touch()
    return {
        "CERT": str(client.certificate),
        "KEY": str(client.key),
        "OTHER_KEY": str(other.key),
        **{name.upper(): str(tmp_path / name) for name in ("encrypted", "garbage", "empty")},
        "MISSING": str(tmp_path / "missing"),
        "FOLDER": str(tmp_path),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("ca=MISSING", "option 'ca': cannot read MISSING: No such file or directory"),
        ("ca=FOLDER", "option 'ca': cannot read FOLDER: Is a directory"),
        ("ca=GARBAGE", "option 'ca': no certificates in PEM"),
        ("ca=EMPTY", "option 'ca': no certificates in PEM"),
        ("ca=KEY", "option 'ca': no certificates in PEM"),
        ("cert=CERT", "option 'cert' needs option 'key' beside it"),
        ("key=KEY", "option 'key' needs option 'cert' beside it"),
        ("cert=MISSING&key=KEY", "option 'cert': cannot read MISSING: No such file or directory"),
        ("cert=CERT&key=MISSING", "option 'key': cannot read MISSING: No such file or directory"),
        ("cert=GARBAGE&key=KEY", "options 'cert' and 'key': not a certificate and its key in PEM"),
        ("cert=CERT&key=GARBAGE", "options 'cert' and 'key': not a certificate and its key in PEM"),
        ("cert=CERT&key=OTHER_KEY", "options 'cert' and 'key': not a certificate and its key"),
        ("cert=CERT&key=ENCRYPTED", "the key is encrypted; give it without a passphrase"),
    ],
)
async def test_a_file_that_cannot_be_used_is_told_with_its_option(
    connected: Connected, files: dict[str, str], options: str, says: str
) -> None:
    for word in sorted(files, key=len, reverse=True):
        options, says = (text.replace(word, files[word]) for text in (options, says))
    text = await mistake(connected, f"etcd://{HOST}:1?{options}")
    assert says in text


@pytest.mark.asyncio
async def test_no_key_is_in_the_text_of_a_mistake(
    connected: Connected, files: dict[str, str], authority: Authority
) -> None:
    secret = authority.client().key.read_text().splitlines()[1]
    text = await mistake(connected, f"etcd://{HOST}:1?ca={files['KEY']}")
    assert secret not in text
