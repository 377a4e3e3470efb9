"""What every transport promises of TLS, as tests: who is refused is so before a handler knows."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from micro.errors import InvalidArgument, Unavailable
from micro.secured import Secured
from micro.testing._calls import (
    MIB,
    Peer,
    TransportClients,
    dialled,
    echoes,
    endless,
    heard,
    listening,
    new_call,
    new_stream,
    read,
)
from micro.tls import TLS
from micro.transport import Channel, Listener, Transport

if TYPE_CHECKING:
    from micro.testing.certificates import Authority, Identity

_DOMAIN = "spiffe://micro.test/ns/default/svc"
_Signed = Callable[["Authority", "Authority"], "Identity"]

#: Certificates that nobody may show; the second authority is one that the other side does not know.
_NOBODYS: dict[str, _Signed] = {
    "of another authority": lambda _, other: other.service("suite"),
    "expired": lambda ours, _: ours.service("suite", lives=timedelta(hours=-1)),
    "with two URI names": lambda ours, _: ours.service(
        "suite", uris=[f"{_DOMAIN}/suite", f"{_DOMAIN}/web"]
    ),
    "of an authority itself": lambda ours, _: ours.service("suite", is_ca=True),
    "with a URI that is no SPIFFE ID": lambda ours, _: ours.service(
        "suite", uris=["https://micro.test/ns/default/svc/suite"]
    ),
    "of another trust domain": lambda ours, _: ours.service(
        "suite", uris=["spiffe://other.test/ns/default/svc/suite"]
    ),
}
#: Certificates that are in order, and not of the service ``suite``.
_ANOTHERS: dict[str, _Signed] = {
    "of another service": lambda ours, _: ours.service("other"),
    "of another namespace": lambda ours, _: ours.service(
        "suite", uris=["spiffe://micro.test/ns/other/svc/suite"]
    ),
    "of what is no service": lambda ours, _: ours.service(
        "suite", uris=["spiffe://micro.test/suite"]
    ),
    "of a longer name": lambda ours, _: ours.service("suite", uris=[f"{_DOMAIN}/suite/x"]),
    "of its host alone": lambda ours, _: ours.service("suite", uris=()),
}
_OLD = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)


class SecureCases(TransportClients):
    """The part of the contract about TLS, for transports that share a port."""

    @pytest.fixture
    def authority(self, tmp_path: Path) -> Authority:
        self.needs_sockets()
        from micro.testing.certificates import Authority

        return Authority.create(tmp_path / "ours")

    @pytest.fixture
    def stranger(self, tmp_path: Path) -> Authority:
        """One that nobody trusts."""
        from micro.testing.certificates import Authority

        return Authority.create(tmp_path / "others")

    @pytest_asyncio.fixture
    async def secured(self, authority: Authority) -> AsyncIterator[Secured]:
        """TLS of the service ``suite``."""
        async with _kept(authority.service("suite")) as secured:
            yield secured

    @pytest_asyncio.fixture
    async def caller(self, authority: Authority) -> AsyncIterator[Secured]:
        """TLS of the service ``web``, which calls it."""
        async with _kept(authority.service("web")) as secured:
            yield secured

    @pytest_asyncio.fixture
    async def secure(
        self, transport: Transport, peer: Peer, secured: Secured
    ) -> AsyncIterator[Listener]:
        async with listening(transport, peer, tls=secured.server()) as listener:
            yield listener

    @pytest.mark.asyncio
    async def test_calls_by_tls_tell_who_calls(
        self, transport: Transport, peer: Peer, secure: Listener, caller: Secured
    ) -> None:
        async with dialled(transport, secure.address, tls=caller.client("suite")) as channel:
            await echoes(channel)
            large = bytes(3 * MIB)
            assert (await channel.call(new_call(), large)).body == large
            assert await heard(channel, new_stream("Tail.Call"), large, b"end") == [large, b"end"]
        assert {call.identity for call in peer.calls} == {f"{_DOMAIN}/web"}

    @pytest.mark.asyncio
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    async def test_mtls_no_cert(
        self,
        transport: Transport,
        peer: Peer,
        secure: Listener,
        authority: Authority,
        version: ssl.TLSVersion,
    ) -> None:
        context = _calling(authority.ca, None)
        context.maximum_version = version
        async with dialled(transport, secure.address, tls=context) as channel:
            assert "it wants a certificate" in await _refused(channel)
        assert not peer.calls

    @pytest.mark.asyncio
    @pytest.mark.parametrize("whose", _NOBODYS)
    async def test_caller_with_a_certificate_that_is_nobodys(
        self,
        transport: Transport,
        peer: Peer,
        secure: Listener,
        caller: Secured,
        authority: Authority,
        stranger: Authority,
        whose: str,
    ) -> None:
        context = _calling(authority.ca, _NOBODYS[whose](authority, stranger))
        async with dialled(transport, secure.address, tls=context) as channel:
            await _refused(channel, sent=None)
        assert not peer.calls
        async with dialled(transport, secure.address, tls=caller.client("suite")) as channel:
            await echoes(channel)

    @pytest.mark.asyncio
    @pytest.mark.parametrize("whose", [*_ANOTHERS, *_NOBODYS])
    async def test_tls_wrong_name(
        self,
        transport: Transport,
        peer: Peer,
        caller: Secured,
        authority: Authority,
        stranger: Authority,
        whose: str,
    ) -> None:
        signed = {**_NOBODYS, **_ANOTHERS}[whose](authority, stranger)
        async with (
            listening(transport, peer, tls=_serving(signed)) as listener,
            dialled(transport, listener.address, tls=caller.client("suite")) as channel,
        ):
            assert "certificate" in await _refused(channel)
        assert not peer.calls

    @pytest.mark.asyncio
    async def test_without_a_service_the_host_is_checked(
        self, transport: Transport, peer: Peer, caller: Secured, authority: Authority
    ) -> None:
        for hosts, takes in ((["127.0.0.1"], True), (["127.0.0.2", "micro.test"], False)):
            context = _serving(authority.service("other", hosts=hosts))
            async with (
                listening(transport, peer, tls=context) as listener,
                dialled(transport, listener.address, tls=caller.client("")) as channel,
            ):
                if takes:
                    await echoes(channel)
                    peer.calls.clear()
                else:
                    assert "not for this host" in await _refused(channel)
        assert not peer.calls

    @pytest.mark.asyncio
    async def test_plaintext_to_a_tls_port_is_told(
        self, transport: Transport, peer: Peer, secure: Listener
    ) -> None:
        async with dialled(transport, secure.address) as channel:
            assert "speaks TLS; name its authority with --tls_ca_file" in await _refused(channel)
        assert not peer.calls

    @pytest.mark.asyncio
    async def test_tls_to_a_plaintext_port_is_told_and_never_gives_in(
        self, transport: Transport, peer: Peer, listener: Listener, caller: Secured
    ) -> None:
        async with dialled(transport, listener.address, tls=caller.client("suite")) as channel:
            assert "TLS" in await _refused(channel)
        assert not peer.calls

    @pytest.mark.asyncio
    @pytest.mark.parametrize("version", _OLD, ids=["1.0", "1.1"])
    async def test_old_tls_is_refused_by_both_sides(
        self,
        transport: Transport,
        peer: Peer,
        secure: Listener,
        caller: Secured,
        authority: Authority,
        version: ssl.TLSVersion,
    ) -> None:
        signed = authority.service("suite")
        old = _aged(_calling(authority.ca, signed), version)
        async with dialled(transport, secure.address, tls=old) as channel:
            assert "protocol version" in await _refused(channel)
        async with (
            listening(transport, peer, tls=_aged(_serving(signed), version)) as listener,
            dialled(transport, listener.address, tls=caller.client("suite")) as channel,
        ):
            await _refused(channel)
        assert not peer.calls

    @pytest.mark.asyncio
    async def test_caller_cannot_say_who_it_is(
        self, transport: Transport, peer: Peer, secure: Listener, caller: Secured
    ) -> None:
        async with dialled(transport, secure.address, tls=caller.client("suite")) as channel:
            await _claims(channel)
        assert [call.identity for call in peer.calls] == [f"{_DOMAIN}/web"] * 2

    @pytest.mark.asyncio
    async def test_caller_without_tls_is_nobody_whatever_it_says(
        self, channel: Channel, peer: Peer
    ) -> None:
        await _claims(channel)
        assert [call.identity for call in peer.calls] == ["", ""]


async def _claims(channel: Channel) -> None:
    """Say to be somebody, in each way there is; two calls are sent."""
    said = {"micro-identity": f"{_DOMAIN}/suite"}
    with pytest.raises(InvalidArgument, match="reserved"):
        await channel.call(new_call(metadata=said), b"")
    with pytest.raises(InvalidArgument, match="reserved"):
        await heard(channel, new_stream("Count.Call", metadata=said), b"1")
    await channel.call(new_call(identity=f"{_DOMAIN}/suite"), b"")
    await heard(channel, new_stream("Count.Call", identity=f"{_DOMAIN}/suite"), b"1")


@asynccontextmanager
async def _kept(identity: Identity) -> AsyncIterator[Secured]:
    secured = Secured(TLS(cert=identity.certificate, key=identity.key, ca=identity.ca))
    async with secured.kept():
        yield secured


async def _refused(channel: Channel, *, sent: bool | None = False) -> str:
    """What a call and a stream are told; ``sent`` None: it may not be known."""
    with pytest.raises(Unavailable) as caught:
        await channel.call(new_call(), b"a secret")
    assert caught.value.sent in (False, sent)
    with pytest.raises(Unavailable):
        await read(channel, new_stream("Echo.Call"), endless(b"a secret"))
    return str(caught.value)


def _calling(ca: Path, identity: Identity | None) -> ssl.SSLContext:
    """A client's, which takes any server of the authority and shows what it has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(ca)
    if identity is not None:
        context.load_cert_chain(identity.certificate, identity.key)
    return context


def _serving(identity: Identity) -> ssl.SSLContext:
    """A server's, which takes anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


def _aged(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """The same, of a time when there was no better version than this."""
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    return context
