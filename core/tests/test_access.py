"""What leads a backend to its servers: files for TLS, mistakes of TLS, and hosts."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from micro.access import ServerOptions, load_tls, read_file, split_host, tls_fault
from micro.errors import ConfigError
from micro.testing.certificates import Authority

NAME = "--registry: etcd"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("stranger"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("etcd-1", ("etcd-1", 2379)),
        ("etcd-1:1234", ("etcd-1", 1234)),
        ("10.0.0.1", ("10.0.0.1", 2379)),
        ("[::1]", ("[::1]", 2379)),
        ("[::1]:1234", ("[::1]", 1234)),
        ("::1", ("[::1]", 2379)),
    ],
)
def test_a_host_without_a_port_gets_the_one_that_is_usual(
    host: str, expected: tuple[str, int]
) -> None:
    assert split_host(host, 2379, NAME) == expected


def test_tls_is_spoken_only_where_an_option_asks_for_it(authority: Authority) -> None:
    assert load_tls(ServerOptions(), NAME) is None
    for options in (ServerOptions(tls=True), ServerOptions(ca=str(authority.ca))):
        assert isinstance(load_tls(options, NAME), ssl.SSLContext)


def test_a_file_that_cannot_be_used_is_told_with_its_option(
    authority: Authority, tmp_path: Path
) -> None:
    own, text, locked = authority.client(), tmp_path / "text", tmp_path / "locked"
    text.write_text("no PEM")
    key = load_pem_private_key(own.key.read_bytes(), None)
    under = BestAvailableEncryption(b"correct-horse")
    locked.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, under))
    missing = str(tmp_path / "missing")
    mistakes = {
        "option 'ca': cannot read": ServerOptions(ca=missing),
        "option 'ca': no certificates in PEM": ServerOptions(ca=str(text)),
        "option 'cert' needs option 'key'": ServerOptions(cert=str(own.certificate)),
        "option 'key' needs option 'cert'": ServerOptions(key=str(own.key)),
        "option 'cert': cannot read": ServerOptions(cert=missing, key=str(own.key)),
        "not a certificate and its key in PEM": ServerOptions(cert=str(text), key=str(own.key)),
        "the key is encrypted": ServerOptions(cert=str(own.certificate), key=str(locked)),
    }
    for told, options in mistakes.items():
        with pytest.raises(ConfigError) as caught:
            load_tls(options, NAME)
        assert caught.value.detail.startswith(f"{NAME}: option")
        assert told in caught.value.detail


def test_an_empty_option_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"said")
    assert read_file("ca", "", NAME) is None
    assert read_file("ca", str(tmp_path / "secret"), NAME) == b"said"


@pytest.mark.asyncio
async def test_a_certificate_of_another_authority_is_told_with_what_helps(
    authority: Authority, stranger: Authority
) -> None:
    async with _listening(authority) as port:
        told = await _fault(port, ServerOptions(ca=str(stranger.ca)))
        assert told.startswith("the server's certificate is not trusted: ")
        assert told.endswith("name its authority with ca=")
        assert await _fault(port, ServerOptions(ca=str(authority.ca))) == ""


@pytest.mark.asyncio
async def test_a_name_that_the_certificate_does_not_have_is_told(authority: Authority) -> None:
    async with _listening(authority) as port:
        told = await _fault(port, ServerOptions(ca=str(authority.ca)), host="elsewhere")
    assert told.endswith("use a host that it names")


@pytest.mark.asyncio
async def test_a_server_without_tls_is_told() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        told = await _fault(server.sockets[0].getsockname()[1], ServerOptions(tls=True))
    assert told == "the server does not speak TLS; leave tls, ca, cert and key away"


def test_what_is_not_of_tls_is_no_fault_of_tls() -> None:
    assert tls_fault(ConnectionRefusedError()) == ""
    assert tls_fault(None) == ""


def test_a_fault_of_tls_is_found_behind_the_error_that_it_caused() -> None:
    error = ConnectionError("cannot connect")
    error.__cause__ = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong")
    error.__cause__.reason = "WRONG_VERSION_NUMBER"
    assert tls_fault(error).startswith("the server does not speak TLS")


@asynccontextmanager
async def _listening(authority: Authority) -> AsyncIterator[int]:
    own = authority.server()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(own.certificate, own.key)

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def _fault(port: int, options: ServerOptions, host: str = "127.0.0.1") -> str:
    context = load_tls(options, NAME)
    assert context is not None
    try:
        _, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context, server_hostname=host
        )
    except (OSError, ssl.SSLError) as exc:
        return tls_fault(exc)
    writer.close()
    return ""
