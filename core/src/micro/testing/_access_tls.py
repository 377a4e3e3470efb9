"""What every registry on servers promises of TLS, as tests: what works, and mistakes, told."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from micro.errors import ConfigError, Unavailable
from micro.plugins import Plugins
from micro.testing._leaks import given_back, held
from micro.testing._nodes import RegistryCalls
from micro.testing.lifecycle import SLACK, nobody
from micro.testing.ports import HOST
from micro.testing.servers import Server

if TYPE_CHECKING:
    from micro.testing.certificates import Authority, Identity

#: Seconds that a call has, in options.
_TIMEOUT = 3.0

#: Options, and what is told of them; the words in capitals are paths.
_MISTAKES = [
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
]


class NewServer(Protocol):
    """Makes a server, not started. It shows ``tls``, and takes who shows one of ``client_ca``'s."""

    def __call__(
        self, folder: Path, *, tls: Identity | None = None, client_ca: Path | None = None
    ) -> Server: ...


class TLSCases(RegistryCalls):
    """The part of the contract about TLS."""

    @pytest.fixture(scope="class")
    @classmethod
    def new_server(cls) -> NewServer:
        raise TypeError(f"{cls.__name__} must give the fixture 'new_server'")

    @pytest.fixture(scope="class")
    @classmethod
    def authority(cls, tmp_path_factory: pytest.TempPathFactory) -> Authority:
        from micro.testing.certificates import Authority

        return Authority.create(tmp_path_factory.mktemp("authority"))

    @pytest.fixture(scope="class")
    @classmethod
    def stranger(cls, tmp_path_factory: pytest.TempPathFactory) -> Authority:
        """An authority that the servers do not trust."""
        from micro.testing.certificates import Authority

        return Authority.create(tmp_path_factory.mktemp("stranger"))

    @pytest.fixture(scope="class")
    @classmethod
    def secure(
        cls, new_server: NewServer, authority: Authority, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        """It speaks TLS, to all."""
        with new_server(tmp_path_factory.mktemp("tls"), tls=authority.server()) as server:
            yield server

    @pytest.fixture(scope="class")
    @classmethod
    def strict(
        cls, new_server: NewServer, authority: Authority, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        """It wants a certificate of its clients."""
        folder, own = tmp_path_factory.mktemp("strict"), authority.server("strict")
        with new_server(folder, tls=own, client_ca=authority.ca) as server:
            yield server

    @pytest.fixture
    def files(self, authority: Authority, tmp_path: Path) -> dict[str, str]:
        """Paths by a word for them."""
        client, other = authority.client(), authority.client("other")
        (tmp_path / "garbage").write_bytes(b"\xff garbage")
        (tmp_path / "empty").touch()
        return {
            "CERT": str(client.certificate),
            "KEY": str(client.key),
            "OTHER_KEY": str(other.key),
            **{name.upper(): str(tmp_path / name) for name in ("garbage", "empty")},
            "MISSING": str(tmp_path / "missing"),
            "FOLDER": str(tmp_path),
        }

    def to(self, hosts: str, options: str = "") -> str:
        """A URL of the backend."""
        return f"{self.backend.schemes[0]}://{hosts}?{options}&timeout={_TIMEOUT}"

    async def works(self, url: str) -> None:
        async with self.connected(url, Plugins()) as registry:
            await self.work(registry)

    async def mistake(self, url: str) -> str:
        """The text of the ConfigError, which comes in time."""
        began = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            async with self.connected(url, Plugins()):
                pass
        assert time.monotonic() - began < _TIMEOUT + SLACK
        text = str(caught.value)
        server, _, _ = self.backend.schemes[0].partition("-")  # nats, of nats-kv too
        assert text.startswith(f"test: {server}")
        return text

    # -- what works

    @pytest.mark.asyncio
    @pytest.mark.parametrize("host", [HOST, "localhost"])
    async def test_server_of_ones_own_authority_is_trusted_by_ca(
        self, secure: Server, authority: Authority, host: str
    ) -> None:
        await self.works(self.to(f"{host}:{secure.port}", f"ca={authority.ca}"))

    @pytest.mark.asyncio
    async def test_client_shows_its_certificate(self, strict: Server, authority: Authority) -> None:
        options = f"ca={authority.ca}&{_shown(authority.client())}"
        await self.works(self.to(strict.address, options))

    @pytest.mark.asyncio
    async def test_without_ca_the_authorities_of_the_system_are_trusted(
        self, secure: Server, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
        monkeypatch.setenv("SSL_CERT_DIR", "/none")
        await self.works(self.to(secure.address, "tls=true"))

    @pytest.mark.asyncio
    async def test_file_of_authorities_may_say_more_than_certificates(
        self, secure: Server, authority: Authority, tmp_path: Path
    ) -> None:
        ca = tmp_path / "ca.pem"
        ca.write_text(f"# Főtanúsítvány\n{authority.ca.read_text()}", encoding="utf-8")
        await self.works(self.to(secure.address, f"ca={ca}"))

    @pytest.mark.asyncio
    async def test_with_tls_nothing_is_left_open(
        self, strict: Server, authority: Authority
    ) -> None:
        url = self.to(strict.address, f"ca={authority.ca}&{_shown(authority.client())}")
        await self.works(url)  # what a library makes once, it may keep
        before = held()
        for _ in range(3):
            await self.works(url)
        await given_back(before)

    # -- mistakes that the server's answer shows

    @pytest.mark.asyncio
    async def test_other_authority_is_told(self, secure: Server, stranger: Authority) -> None:
        for options in (f"ca={stranger.ca}", "tls=true"):  # which are those of the system
            text = await self.mistake(self.to(secure.address, options))
            assert "the server's certificate is not trusted" in text
            assert "name its authority with ca=" in text

    @pytest.mark.asyncio
    async def test_plain_to_a_server_with_tls_is_told(self, secure: Server, strict: Server) -> None:
        for server in (secure, strict):
            text = await self.mistake(self.to(server.address))
            assert "the server speaks TLS" in text
            assert "add ?tls=true" in text or "name its authority with ca=" in text

    @pytest.mark.asyncio
    async def test_tls_to_a_server_without_is_told(
        self, url: str, server: Server, authority: Authority
    ) -> None:
        assert url, "has the server started"
        for options in (f"ca={authority.ca}", "tls=true"):
            text = await self.mistake(self.to(server.address, options))
            assert "the server does not speak TLS; leave tls, ca, cert and key away" in text

    @pytest.mark.asyncio
    async def test_missing_client_certificate_is_told(
        self, strict: Server, authority: Authority
    ) -> None:
        text = await self.mistake(self.to(strict.address, f"ca={authority.ca}"))
        assert "name a client certificate with cert= key=" in text

    @pytest.mark.asyncio
    async def test_client_certificate_of_another_authority_is_told(
        self, strict: Server, authority: Authority, stranger: Authority
    ) -> None:
        options = f"ca={authority.ca}&{_shown(stranger.client())}"
        text = await self.mistake(self.to(strict.address, options))
        assert "name a client certificate with cert= key=" in text

    @pytest.mark.asyncio
    async def test_certificate_for_another_host_is_told(
        self, new_server: NewServer, authority: Authority, tmp_path: Path
    ) -> None:
        identity = authority.service("elsewhere", uris=(), hosts=["elsewhere.example"])
        with new_server(tmp_path, tls=identity) as server:
            for host in (HOST, "localhost"):
                url = self.to(f"{host}:{server.port}", f"ca={authority.ca}")
                text = await self.mistake(url)
                assert "use a host that it names" in text
                assert host in text

    @pytest.mark.asyncio
    async def test_mistake_at_one_host_of_several_is_told(
        self, secure: Server, stranger: Authority
    ) -> None:
        with nobody(silent=False) as down:
            url = self.to(f"{down},{secure.address}", f"ca={stranger.ca}")
            assert "name its authority with ca=" in await self.mistake(url)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("tls", ["", "tls=true"])
    @pytest.mark.parametrize("silent", [False, True], ids=["refused", "silent"])
    async def test_server_that_is_not_there_is_no_mistake_of_tls(
        self,
        tls: str,
        silent: bool,  # noqa: FBT001 - pytest gives it by name
    ) -> None:
        began = time.monotonic()
        with nobody(silent=silent) as address, pytest.raises(Unavailable):
            await self.works(f"{self.backend.schemes[0]}://{address}?{tls}&timeout=1s")
        # To look for a mistake of TLS may take another second.
        assert time.monotonic() - began < 1 + 1 + SLACK

    # -- mistakes in the files

    @pytest.mark.asyncio
    @pytest.mark.parametrize(("options", "says"), _MISTAKES, ids=dict(_MISTAKES))
    async def test_file_that_cannot_be_used_is_told_with_its_option(
        self, files: dict[str, str], options: str, says: str
    ) -> None:
        for word in sorted(files, key=len, reverse=True):
            options, says = (text.replace(word, files[word]) for text in (options, says))
        assert says in await self.mistake(self.to(f"{HOST}:1", options))

    @pytest.mark.asyncio
    async def test_no_key_is_in_the_text_of_a_mistake(
        self, files: dict[str, str], authority: Authority
    ) -> None:
        secret = authority.client().key.read_text().splitlines()[1]
        assert secret not in await self.mistake(self.to(f"{HOST}:1", f"ca={files['KEY']}"))


def _shown(identity: Identity) -> str:
    """Options for a client that shows this certificate."""
    return f"cert={identity.certificate}&key={identity.key}"
