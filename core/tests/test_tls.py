"""TLS of services: its files, whose certificates are taken, and new ones in a running service.

The transports' own part is in the suite of ``micro.testing``.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import shutil
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

import micro
from micro import TLS, handshake, secured
from micro.secured import Secured
from micro.settings import Settings
from micro.testing import eventually
from micro.testing.certificates import Authority, Identity

from . import http_peer, native

TRANSPORTS = ("tcp", "http")
ID = "spiffe://micro.test/ns/default/svc"
#: Seconds in which a service has taken new files, which it looks at every 2 s; here more often.
TAKEN = 5.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ours")


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at all the time."""
    monkeypatch.setattr(secured, "_LOOK", 0.01)


def of(identity: Identity, **more: Any) -> TLS:
    return TLS(cert=identity.certificate, key=identity.key, ca=identity.ca, **more)


def settings(variables: Mapping[str, object], *flags: str) -> Settings:
    given = {f"MICRO_{name.upper()}": str(value) for name, value in variables.items()}
    return Settings(flags, given)


class Echo:
    """What the tests serve; it counts what reaches it."""

    def __init__(self) -> None:
        self.calls = 0
        self.peers: set[str] = set()

    @micro.endpoint(idempotent=True)
    async def who(self) -> str:
        self.calls += 1
        self.peers.add(micro.context().peer)
        return micro.context().identity

    async def tick(self) -> AsyncIterator[int]:
        for number in itertools.count():
            yield number
            await asyncio.sleep(0.01)


class Fleet:
    """Services of this process, over sockets, that find each other."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._plugins = micro.Plugins()

    async def start(
        self,
        name: str,
        given: TLS | None = None,
        handler: object = None,
        variables: Mapping[str, object] | None = None,
        **options: Any,
    ) -> micro.Service:
        service = micro.Service(
            name, registry="memory://fleet", tls=given, plugins=self._plugins, **options
        )
        if handler is not None:
            service.handle(handler, name="Echo")
        await self._stack.enter_async_context(service.opened(settings(variables or {})))
        return service

    async def address(self, caller: micro.Service, name: str) -> str:
        """Where a service listens."""
        async with caller.client.watch(name) as watch:
            return watch.nodes[0].address


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        yield Fleet(stack)


async def who(caller: micro.Service, name: str, **options: Any) -> Any:
    return await caller.client.call(name, "Echo.Who", **options)


# -- services that call each other ------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_services_call_each_other_and_know_who_calls(
    fleet: Fleet, authority: Authority, transport: str
) -> None:
    names = ("orders", "stock", "mail")
    services = [
        await fleet.start(name, of(authority.service(name)), Echo(), transport=transport)
        for name in names
    ]
    for caller in services:
        for name in names:
            assert await who(caller, name) == f"{ID}/{caller.name}"


@pytest.mark.asyncio
async def test_certificates_without_a_uri_go_by_their_names(
    fleet: Fleet, authority: Authority
) -> None:
    await fleet.start("orders", of(authority.service("orders", uris=(), hosts=["orders"])), Echo())
    web = authority.service("web", uris=(), hosts=["web"])
    both = authority.service("both", uris=(), hosts=["web", "www"])
    assert await who(await fleet.start("web", of(web)), "orders") == "web"
    assert await who(await fleet.start("web", of(both)), "orders") == ""


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_node_whose_certificate_is_of_another_service_is_not_called(
    fleet: Fleet, authority: Authority, transport: str
) -> None:
    """Whatever the registry says, and the address."""
    thief = Echo()
    web = await fleet.start("web", of(authority.service("web")), transport=transport)
    await fleet.start("thief", of(authority.service("thief")), thief, transport=transport)
    address = await fleet.address(web, "thief")
    lie = micro.Node(service="bank", id="bank-1", address=address)
    await (await web.client.registered()).register(lie, ttl=30)
    for options in ({}, {"address": address}):
        with pytest.raises(micro.Unavailable, match=r"svc/thief', not of service 'bank'") as caught:
            await who(web, "bank", **options)
        assert caught.value.sent is False
    assert not thief.calls
    assert await who(web, "thief", address=address) == f"{ID}/web"


@pytest.mark.asyncio
@pytest.mark.parametrize("direct", [False, True], ids=["registered", "address"])
async def test_services_at_one_address_share_no_connection(
    fleet: Fleet, authority: Authority, direct: bool
) -> None:
    """Else the first service called would vouch for the second."""
    one = Echo()
    web = await fleet.start("web", of(authority.service("web")))
    await fleet.start("one", of(authority.service("one")), one)
    address = await fleet.address(web, "one")
    registry = await web.client.registered()
    await registry.register(micro.Node(service="two", id="two-1", address=address), ttl=30)
    options = {"address": address} if direct else {}
    assert await who(web, "one", **options) == f"{ID}/web"
    with pytest.raises(micro.Unavailable, match="not of service 'two'"):
        await who(web, "two", **options)
    assert one.calls == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_address_without_a_service_is_checked_by_its_host(
    fleet: Fleet, authority: Authority, transport: str
) -> None:
    web = await fleet.start("web", of(authority.service("web")), transport=transport)
    for name, hosts in (("here", ["127.0.0.1"]), ("there", ["there.test"])):
        given = of(authority.service(name, hosts=hosts))
        await fleet.start(name, given, Echo(), transport=transport)
    assert await who(web, "", address=await fleet.address(web, "here")) == f"{ID}/web"
    with pytest.raises(micro.Unavailable, match="not for this host"):
        await who(web, "", address=await fleet.address(web, "there"))


@pytest.mark.asyncio
async def test_callers_from_another_trust_domain_are_refused(
    fleet: Fleet, authority: Authority
) -> None:
    echo = Echo()
    await fleet.start("echo", of(authority.service("echo")), echo)
    foreign = authority.service("web", uris=["spiffe://other.test/ns/default/svc/web"])
    with pytest.raises(micro.Unavailable):
        await who(await fleet.start("web", of(foreign)), "echo")
    assert not echo.calls


@pytest.mark.asyncio
async def test_anonymous_callers_are_taken_where_the_service_says_so(
    fleet: Fleet, authority: Authority, tmp_path: Path
) -> None:
    given = of(authority.service("echo"), anonymous=True)
    await fleet.start("echo", given, Echo())
    assert await who(await fleet.start("web", TLS(ca=authority.ca)), "echo") == ""
    assert await who(await fleet.start("a", of(authority.service("a"))), "echo") == f"{ID}/a"
    stranger = Authority.create(tmp_path / "stranger").service("a")
    bad = TLS(cert=stranger.certificate, key=stranger.key, ca=authority.ca)
    with pytest.raises(micro.Unavailable, match="refuses our certificate"):
        await who(await fleet.start("a", bad), "echo")


@pytest.mark.asyncio
async def test_caller_without_a_certificate_is_told_what_to_set(
    fleet: Fleet, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    echo = Echo()
    await fleet.start("echo", of(authority.service("echo")), echo)
    for given, text in ((TLS(ca=authority.ca), "--tls_cert_file"), (None, "--tls_ca_file")):
        for transport in TRANSPORTS:
            web = await fleet.start("web", given, transport=transport)
            with pytest.raises(micro.Unavailable, match=text) as caught:
                await who(web, "echo")
            assert caught.value.sent is False
    assert not echo.calls
    assert "did not return a certificate" in caplog.text


@pytest.mark.asyncio
async def test_client_with_tls_never_speaks_plainly(fleet: Fleet, authority: Authority) -> None:
    echo = Echo()
    await fleet.start("echo", None, echo)
    web = await fleet.start("web", of(authority.service("web")))
    with pytest.raises(micro.Unavailable, match="TLS"):
        await who(web, "echo")
    assert not echo.calls


@pytest.mark.asyncio
async def test_calls_within_a_process_need_no_certificates(fleet: Fleet) -> None:
    """No file is read, so that tests of a service run anywhere."""
    given = TLS(cert="nowhere.pem", key="nowhere.key", ca="nowhere.pem")
    service = await fleet.start("echo", given, Echo(), transport="memory")
    assert await who(service, "echo") == ""


@pytest.mark.asyncio
async def test_listening_beyond_this_machine_needs_no_leave_with_tls(
    fleet: Fleet, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"address": "0.0.0.0:0", "advertise": "127.0.0.1:9"}
    with pytest.raises(micro.ConfigError, match=r"--tls_cert_file.*--server_insecure"):
        await fleet.start("echo", None, Echo(), **options)
    await fleet.start("echo", of(authority.service("echo")), Echo(), **options)
    assert "without TLS" not in caplog.text


@pytest.mark.asyncio
async def test_plain_http_to_a_tls_port_is_told_so(fleet: Fleet, authority: Authority) -> None:
    echo = Echo()
    service = await fleet.start("echo", of(authority.service("echo")), echo)
    address = await fleet.address(service, "echo")
    got = await http_peer.exchange(address, http_peer.request("/Echo/Who", b"{}"))
    assert got.status == 400
    assert "this port speaks TLS" in json.loads(got.body)["detail"]
    assert not echo.calls


@pytest.mark.asyncio
async def test_curl_reads_a_tls_port_by_its_host_name(fleet: Fleet, authority: Authority) -> None:
    """As each HTTPS client does."""
    service = await fleet.start("echo", of(authority.service("echo"), anonymous=True), Echo())
    host, _, port = (await fleet.address(service, "echo")).rpartition(":")
    context = ssl.create_default_context(cafile=authority.ca)
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    writer.write(http_peer.request("/Echo/Who", b"{}"))
    assert (await http_peer.read_message(reader)).body == b'""\n'
    writer.close()
    await writer.wait_closed()


async def works(caller: micro.Service) -> bool:
    with suppress(micro.Unavailable):
        return bool(await who(caller, "echo"))
    return False


@pytest.fixture
def no_collection(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Garbage is collected only where it is asked for, as in a service that is set for serving."""
    monkeypatch.setattr(handshake, "_COLLECT", 0.0)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.asyncio
@pytest.mark.usefixtures("no_collection")
async def test_handshakes_that_peers_have_left_give_their_places_back(
    fleet: Fleet, authority: Authority
) -> None:
    limits = micro.Limits(connections=5)
    await fleet.start("echo", of(authority.service("echo")), Echo(), limits=limits)
    web = await fleet.start("web", of(authority.service("web")), retries=micro.Retries(attempts=1))
    host, _, port = (await fleet.address(web, "echo")).rpartition(":")
    for _ in range(20):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.transport.abort()
    await eventually(lambda: works(web))


@pytest.mark.asyncio
async def test_handshakes_are_bounded(fleet: Fleet, authority: Authority) -> None:
    limits = micro.Limits(connections=5, head_timeout=0.5)
    await fleet.start("echo", of(authority.service("echo")), Echo(), limits=limits)
    web = await fleet.start("web", of(authority.service("web")), retries=micro.Retries(attempts=1))
    host, _, port = (await fleet.address(web, "echo")).rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(5)]
    try:
        assert not await works(web)
        await eventually(lambda: works(web))
    finally:
        for _, writer in silent:
            writer.transport.abort()


# -- what a caller says to be ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_identity_in_a_header_is_dropped() -> None:
    calls: list[micro.Call] = []

    async def note(call: micro.Call, _: micro.Body) -> micro.Reply:
        calls.append(call)
        return micro.Reply(body=b"{}")

    async with (
        http_peer.connected_transport() as transport,
        http_peer.listening(transport, handler=note) as listener,
    ):
        for make in (http_peer.request, http_peer.go_request):
            said = make(Micro_Identity=f"{ID}/bank", X_Micro_Identity="root", Tenant="a")
            assert (await http_peer.exchange(listener.address, said)).status == 200
    assert [(call.identity, call.metadata) for call in calls] == [("", {"tenant": "a"})] * 2


@pytest.mark.asyncio
async def test_identity_in_native_metadata_is_refused() -> None:
    handler = native.Acting()
    head = native.named("Echo.Call", {"micro-identity": f"{ID}/bank"})
    kinds = (native.REQUEST, native.OPEN)
    async with native.listening(handler) as listener, native.greeted(listener.address) as peer:
        for stream, kind in enumerate(kinds, 1):
            peer.write(native.Frame(kind, native.RAW | native.METADATA, stream, 0, head))
            refused = await peer.until(native.ERROR)
            assert (refused.stream, refused.error) == (stream, "InvalidArgument")
    assert not handler.calls


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_files_come_from_the_environment_and_from_flags(
    fleet: Fleet, authority: Authority, tmp_path: Path
) -> None:
    good, other = authority.service("echo"), authority.service("other")
    plugins = micro.Plugins()
    service = micro.Service("echo", registry="memory", tls=of(other), plugins=plugins)
    service.handle(Echo())
    variables = {"tls_cert_file": good.certificate, "tls_key_file": tmp_path / "none"}
    with pytest.raises(micro.ConfigError, match=r"MICRO_TLS_KEY_FILE: tls_key_file .*none: cannot"):
        async with service.opened(settings(variables)):
            raise AssertionError("it must not start")
    async with service.opened(settings(variables, "--tls-key-file", str(good.key))):
        assert await who(service, "echo") == f"{ID}/echo"


@pytest.mark.asyncio
async def test_anonymous_is_a_switch(fleet: Fleet, authority: Authority) -> None:
    variables = {"tls_anonymous": "true"}
    await fleet.start("echo", of(authority.service("echo")), Echo(), variables)
    assert await who(await fleet.start("web", TLS(ca=authority.ca)), "echo") == ""


def test_key_is_nowhere_to_be_seen(authority: Authority) -> None:
    identity = authority.service("echo")
    secured = Secured(of(identity))
    line = identity.key.read_text().splitlines()[1]
    for shown in (repr(secured), repr(secured.given), str(vars(secured))):
        assert line not in shown


# -- files that cannot be used --------------------------------------------------------------------


def encrypted(key: Path) -> None:
    secret = load_pem_private_key(key.read_bytes(), None)
    locked = BestAvailableEncryption(b"passphrase")
    key.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))


def spoiled(authority: Authority, how: str) -> TLS:
    """TLS of the service ``echo`` with one mistake."""
    if how in _WRONG:
        return of(_WRONG[how](authority))
    good = authority.service("echo")
    given = of(good)
    match how:
        case "key missing":
            given = TLS(cert=good.certificate, ca=good.ca)
        case "cert missing":
            given = TLS(key=good.key)
        case "no cert":
            given = TLS(ca=good.ca)
        case "cert gone":
            good.certificate.unlink()
        case "key gone":
            good.key.unlink()
        case "ca gone":
            good.ca.unlink()
        case "cert garbage":
            good.certificate.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE")
        case "key garbage":
            good.key.write_text("secret-canary")
        case "ca garbage":
            good.ca.write_text("hello")
        case "other key":
            good.key.write_bytes(authority.service("other").key.read_bytes())
        case _:
            encrypted(good.key)
    return given


_WRONG: dict[str, Callable[[Authority], Identity]] = {
    "expired": lambda ours: ours.service("echo", lives=timedelta(hours=-1)),
    "authority": lambda ours: ours.service("echo", is_ca=True),
    "two uris": lambda ours: ours.service("echo", uris=[f"{ID}/echo", f"{ID}/web"]),
    "another's": lambda ours: ours.service("web"),
}
MISTAKES = {
    "key missing": "tls_cert_file .*: it needs --tls_key_file",
    "cert missing": "tls_key_file .*: it needs --tls_cert_file",
    "no cert": "a service that is called with TLS needs a certificate.*micro cert",
    "cert gone": "tls_cert_file .*echo.pem: cannot be read: No such file",
    "key gone": "tls_key_file .*echo.key: cannot be read: No such file",
    "ca gone": "tls_ca_file .*ca.pem: cannot be read: No such file",
    "cert garbage": "tls_cert_file .*echo.pem: it has no certificate in PEM",
    "key garbage": "tls_key_file .*echo.key: not a certificate and its key",
    "ca garbage": "tls_ca_file .*ca.pem: it has no certificates",
    "other key": "tls_cert_file .*, code: tls_key_file .*: the key is another one's",
    "encrypted key": "tls_key_file .*: the key is encrypted; give it without a passphrase",
    "expired": "tls_cert_file .*: this certificate has expired at .*; renew it",
    "authority": "this certificate is an authority's own",
    "two uris": "this certificate has 2 URI names, and may have one",
    "another's": "of '.*svc/web', so that callers of 'echo' refuse it.*micro cert new echo",
}


@pytest.mark.asyncio
@pytest.mark.parametrize("how", MISTAKES)
async def test_mistake_tells_its_setting_and_what_to_do(authority: Authority, how: str) -> None:
    secured = Secured(spoiled(authority, how))
    with pytest.raises(micro.ConfigError, match=f"^code: .*{MISTAKES[how]}") as caught:
        async with secured.kept(serves="echo"):
            raise AssertionError("it must not start")
    assert "canary" not in str(caught.value)


# -- new certificates -----------------------------------------------------------------------------


async def shown(address: str, ca: Path, own: Identity) -> bytes:
    """The certificate that a server shows to a new connection."""
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(own.certificate, own.key)
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return found
    finally:
        writer.transport.abort()


def der(identity: Identity) -> bytes:
    return ssl.PEM_cert_to_DER_cert(identity.certificate.read_text())


@pytest.mark.asyncio
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_new_certificate_is_taken_without_dropping_a_call_or_a_stream(
    fleet: Fleet, authority: Authority, transport: str
) -> None:
    echo, own = Echo(), authority.service("web")
    first = authority.service("echo")
    await fleet.start("echo", of(first), echo, transport=transport)
    web = await fleet.start("web", of(own), transport=transport)
    address = await fleet.address(web, "echo")
    old, stop = der(first), asyncio.Event()

    count = 0

    async def calling() -> None:
        nonlocal count
        while not stop.is_set():
            assert await who(web, "echo") == f"{ID}/web"
            count += 1

    async with (
        asyncio.TaskGroup() as group,
        web.client.stream("echo", "Echo.Tick", returns=int) as ticks,
    ):
        numbers = [await anext(ticks)]
        group.create_task(calling())
        for _ in range(3):
            renewed = der(authority.service("echo"))
            assert renewed != old

            async def is_new(renewed: bytes = renewed) -> bool:
                return await shown(address, authority.ca, own) == renewed

            await eventually(is_new, within=TAKEN)
        numbers += [await anext(ticks) for _ in range(3)]
        await eventually(lambda: count > 10)
        stop.set()
        assert web.client.counts.retries == 0
    assert numbers == [*range(len(numbers))]
    assert len(echo.peers) == 1


@pytest.mark.asyncio
@pytest.mark.usefixtures("often")
async def test_new_connections_of_a_client_show_its_new_certificate(
    fleet: Fleet, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "micro.tls")
    for name in ("early", "late"):
        await fleet.start(name, of(authority.service(name)), Echo())
    web = await fleet.start("web", of(authority.service("web")))
    assert await who(web, "early") == f"{ID}/web"
    authority.service("web", uris=[f"{ID}/renamed"])
    await eventually(lambda: "new certificates are taken" in caplog.text, within=TAKEN)
    assert await who(web, "late") == f"{ID}/renamed"
    assert await who(web, "early") == f"{ID}/web"


@pytest.mark.asyncio
@pytest.mark.usefixtures("often")
async def test_new_authority_is_taken_too(
    fleet: Fleet, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other")
    own = authority.service("echo", name="kept")
    echo = await fleet.start("echo", of(own), Echo())
    address = await fleet.address(echo, "echo")
    new, both = other.service("web"), tmp_path / "both.pem"
    both.write_bytes(authority.ca.read_bytes() + other.ca.read_bytes())
    caller = TLS(cert=new.certificate, key=new.key, ca=both)
    web = await fleet.start("web", caller)
    with pytest.raises(micro.Unavailable, match="unknown ca"):
        await who(web, "echo")
    shutil.copy(both, own.ca)

    async def taken() -> bool:
        with suppress(micro.Unavailable):
            return bool(await who(web, "echo", address=address))
        return False

    await eventually(taken, within=TAKEN)


@pytest.mark.asyncio
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("how", ["half a certificate", "other key", "expired", "gone", "another's"])
async def test_bad_new_certificate_is_told_once_and_the_old_one_stays(
    fleet: Fleet, authority: Authority, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.INFO, "micro.tls")
    first, own = authority.service("echo"), authority.service("web")
    old = der(first)
    service = await fleet.start("echo", of(first), Echo())
    address = await fleet.address(service, "echo")
    match how:
        case "half a certificate":
            first.certificate.write_bytes(first.certificate.read_bytes()[:300])
        case "other key":
            first.key.write_bytes(own.key.read_bytes())
        case "expired":
            authority.service("echo", lives=timedelta(hours=-1))
        case "gone":
            first.key.unlink()
        case _:
            authority.service("web", name="echo")
    await eventually(lambda: "the old ones stay" in caplog.text, within=TAKEN)
    for _ in range(20):  # meanwhile the files are looked at again and again
        assert await shown(address, authority.ca, own) == old
        assert await who(service, "echo") == f"{ID}/echo"
    assert told_of(caplog) == 1
    renewed = authority.service("echo")
    await eventually(lambda: "are taken" in caplog.text.replace("not taken", ""), within=TAKEN)
    assert await shown(address, authority.ca, own) == der(renewed)
    assert told_of(caplog) <= 2  # of half of the new pair, perhaps
    assert first.key.read_text().splitlines()[1] not in caplog.text


def told_of(caplog: pytest.LogCaptureFixture) -> int:
    """How often a bad certificate was told of."""
    return sum("the old ones stay" in record.getMessage() for record in caplog.records)


@pytest.mark.asyncio
@pytest.mark.usefixtures("often")
async def test_certificate_that_nobody_renews_is_told_of_once(
    fleet: Fleet, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """It has begun five minutes ago, and ends within the last tenth of its life."""
    ending = authority.service("echo", lives=timedelta(seconds=30))
    await fleet.start("echo", of(ending), Echo())
    await eventually(lambda: "it ends in 0 min; renew it" in caplog.text, within=TAKEN)
    await asyncio.sleep(0.05)
    assert caplog.text.count("renew it") == 1
