"""TLS: what works, and mistakes, which are told at connect with what to do about them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from micro.errors import ConfigError, Unavailable
from micro.registry import Node
from micro.testing.certificates import Authority, Identity
from micro.testing.ports import HOST, unused_ports
from micro.testing.servers import ConsulServer
from micro_plugin_consul import ConsulRegistry

Connected = Callable[..., AbstractAsyncContextManager[ConsulRegistry]]

NODE = Node(service="greeter", id="greeter-1", address="127.0.0.1:9301")
TIMEOUT = 3.0
#: Seconds that a busy machine gets.
SLACK = 2.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that the server does not trust."""
    return Authority.create(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def addresses(
    consul_binary: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """One agent: where it speaks TLS, by the words of its certificate, and where it does not."""
    (port,) = unused_ports(1)
    shown = authority.server()
    tls = (
        f'cert_file = "{shown.certificate}", key_file = "{shown.key}", ca_file = "{shown.ca}", '
        "verify_incoming = true"
    )
    hcl = (f"ports {{ https = {port} }}", f"tls {{ https {{ {tls} }} }}")
    with ConsulServer(consul_binary, tmp_path_factory.mktemp("tls"), hcl=hcl) as server:
        yield {"tls": f"{HOST}:{port}", "localhost": f"localhost:{port}", "plain": server.address}


def shown(identity: Identity) -> str:
    """Options for a client that shows this certificate."""
    return f"ca={identity.ca}&cert={identity.certificate}&key={identity.key}"


async def mistake(connected: Connected, url: str) -> str:
    """The text of the ConfigError, which comes in time."""
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        async with connected(url):
            pass
    assert time.monotonic() - began < TIMEOUT + SLACK
    text = str(caught.value)
    assert text.startswith("--registry: consul")
    return text


@pytest.mark.asyncio
@pytest.mark.parametrize("host", ["tls", "localhost"])
async def test_a_client_shows_its_certificate_to_a_server_of_an_authority_of_ones_own(
    connected: Connected, addresses: dict[str, str], authority: Authority, host: str
) -> None:
    files = shown(authority.client())
    async with connected(f"consul://{addresses[host]}/{host}?{files}") as registry:
        await registry.register(NODE, ttl=10)
        assert await registry.get("greeter") == (NODE,)
        await registry.deregister(NODE)


@pytest.mark.asyncio
async def test_the_wrong_authority(
    connected: Connected, addresses: dict[str, str], stranger: Authority
) -> None:
    for options in (f"ca={stranger.ca}", "tls=true"):
        text = await mistake(connected, f"consul://{addresses['tls']}?{options}")
        assert "the server's certificate is not trusted" in text
        assert "name its authority with ca=" in text


@pytest.mark.asyncio
async def test_no_client_certificate(
    connected: Connected, addresses: dict[str, str], authority: Authority
) -> None:
    text = await mistake(connected, f"consul://{addresses['tls']}?ca={authority.ca}")
    assert "name a client certificate with cert= key=" in text


@pytest.mark.asyncio
async def test_a_client_certificate_of_another_authority(
    connected: Connected, addresses: dict[str, str], authority: Authority, stranger: Authority
) -> None:
    other = stranger.client()
    files = f"ca={authority.ca}&cert={other.certificate}&key={other.key}"
    text = await mistake(connected, f"consul://{addresses['tls']}?{files}")
    assert "name a client certificate with cert= key=" in text


@pytest.mark.asyncio
async def test_no_tls_to_a_server_that_speaks_it(
    connected: Connected, addresses: dict[str, str]
) -> None:
    text = await mistake(connected, f"consul://{addresses['tls']}")
    assert "the server speaks TLS; add ?tls=true" in text


@pytest.mark.asyncio
async def test_tls_to_a_server_that_speaks_none(
    connected: Connected, addresses: dict[str, str], authority: Authority
) -> None:
    text = await mistake(connected, f"consul://{addresses['plain']}?ca={authority.ca}")
    assert "the server does not speak TLS; leave tls, ca, cert and key away" in text


@pytest.mark.asyncio
@pytest.mark.parametrize("tls", ["", "tls=true&"])
async def test_a_server_that_is_not_there_is_no_mistake_of_tls(
    connected: Connected, tls: str
) -> None:
    with pytest.raises(Unavailable):
        async with connected(f"consul://{HOST}:1?{tls}timeout={TIMEOUT}"):
            pass


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> dict[str, str]:
    """Paths by a word for them."""
    client, other = authority.client(), authority.client("other")
    (tmp_path / "garbage").write_bytes(b"\xff garbage")
    return {
        "CERT": str(client.certificate),
        "KEY": str(client.key),
        "OTHER": str(other.key),
        "GARBAGE": str(tmp_path / "garbage"),
        "MISSING": str(tmp_path / "missing"),
    }


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("ca=MISSING", "option 'ca': cannot read MISSING: No such file or directory"),
        ("ca=GARBAGE", "option 'ca': no certificates in PEM"),
        ("ca=KEY", "option 'ca': no certificates in PEM"),
        ("cert=CERT", "option 'cert' needs option 'key' beside it"),
        ("key=KEY", "option 'key' needs option 'cert' beside it"),
        ("cert=MISSING&key=KEY", "option 'cert': cannot read MISSING: No such file or directory"),
        ("cert=GARBAGE&key=KEY", "options 'cert' and 'key': not a certificate and its key in PEM"),
        ("cert=CERT&key=OTHER", "options 'cert' and 'key': not a certificate and its key"),
    ],
)
async def test_a_file_that_cannot_be_used_is_told_with_its_option(
    connected: Connected, files: dict[str, str], options: str, says: str
) -> None:
    for word, path in files.items():
        options, says = options.replace(f"={word}", f"={path}"), says.replace(word, path)
    text = await mistake(connected, f"consul://{HOST}:1?{options}")
    assert says in text


@pytest.mark.asyncio
async def test_with_tls_nothing_is_left_open(
    connected: Connected, addresses: dict[str, str], authority: Authority
) -> None:
    before = asyncio.all_tasks()
    for _ in range(3):
        async with connected(f"consul://{addresses['tls']}?{shown(authority.client())}") as one:
            await one.services()
    assert asyncio.all_tasks() == before
