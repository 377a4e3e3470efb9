"""The one port: protocols that share it, its addresses, its limits, TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from micro.backend import Connections
from micro.backends.http import HTTPTransport
from micro.backends.tcp import TCPTransport
from micro.call import Body, Call, Handler, Reply
from micro.errors import ConfigError, InvalidArgument, Unavailable
from micro.plugins import Plugins
from micro.port import Session, SocketTransport, open_port
from micro.testing import eventually
from micro.testing.certificates import Authority
from micro.transport import Channel, Limits, Listener, TransportFeatures
from micro.url import URL

from .native import GOAWAY, HELLO, PREFACE, SOON, Acting, Peer, hello, reply, request

SLACK = 2.0


# -- two toys, of which neither is like the other -------------------------------------------------


class Toy(SocketTransport):
    """A protocol of lines, each of which calls an endpoint; a protocol for a port and no more."""

    features = TransportFeatures(name="toy")
    prefix: ClassVar[bytes]
    session: ClassVar[type[ToySession]]

    async def connect(self, connections: Connections) -> None:
        """Nothing to be made."""

    async def aclose(self) -> None:
        """Nothing to be given back."""

    async def dial(
        self,
        address: str,
        limits: Limits,
        *,
        tls: ssl.SSLContext | None = None,
        timeout: float,
    ) -> Channel:
        raise NotImplementedError

    def claims(self, head: bytes) -> bool | None:
        if head.startswith(self.prefix):
            return True
        return None if self.prefix.startswith(head) else False

    def accept(self, handler: Handler, limits: Limits) -> Session:
        return self.session(handler, limits)


class ToySession(Session):
    def __init__(self, handler: Handler, limits: Limits) -> None:
        super().__init__()
        self._handler = handler
        self._limits = limits
        self._rest = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.expires = time.monotonic() + self._limits.idle

    def read(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            task = asyncio.create_task(self._serve(line.split(b" ", 1)[1]))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    async def _serve(self, body: bytes) -> None:
        reply = await self._handler(Call(service="suite", endpoint="Echo.Call"), body)
        assert isinstance(reply.body, bytes)
        self._transport.write(reply.body + b"\n")

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._draining and not self._tasks:
            self._transport.close()

    def drain(self) -> None:
        self._draining = True
        if not self._tasks:
            self._transport.close()

    def expire(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def running(self) -> Collection[asyncio.Task[None]]:
        return self._tasks


class LineSession(ToySession, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.read(data)


class BufferSession(ToySession, asyncio.BufferedProtocol):
    """With a buffer so small that what was read before it was there does not fit."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        super().__init__(handler, limits)
        self._buffer = bytearray(5)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.read(bytes(self._buffer[:nbytes]))


class LineTransport(Toy):
    schemes = ("line",)
    alpn = "line"
    prefix = b"LINE "
    session = LineSession


class BufferTransport(Toy):
    schemes = ("buffer",)
    alpn = "buffer"
    prefix = b"LINT "
    session = BufferSession


ALL = (TCPTransport, LineTransport, BufferTransport, HTTPTransport)


@asynccontextmanager
async def port(
    handler: Handler,
    address: str = "127.0.0.1:0",
    *,
    kinds: Sequence[type[SocketTransport]] = ALL,
    tls: ssl.SSLContext | None = None,
    **limits: Any,
) -> AsyncIterator[Listener]:
    transports = [kind(URL.parse(kind.schemes[0])) for kind in kinds]
    connections = Plugins().connections()
    for transport in transports:
        await transport.connect(connections)
    listener = await open_port(address, transports, handler, Limits(**limits), tls=tls)
    try:
        yield listener
    finally:
        await listener.aclose()
        for transport in transports:
            await transport.aclose()


@asynccontextmanager
async def opened(address: str, context: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    if address.startswith("unix:"):
        pair = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, number = address.rpartition(":")
        pair = await asyncio.open_connection(host.strip("[]"), int(number), ssl=context)
    try:
        yield Peer(*pair)
    finally:
        pair[1].transport.abort()


async def is_closed(peer: Peer) -> bool:
    return await peer.rest() == []


#: What each protocol says first, and what comes back.
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
FIRST = {
    "tcp": (PREFACE + hello().encode() + request(1, body=b"a").encode(), reply(1, b"a").encode()),
    "line": (b"LINE hello\n", b"hello\n"),
    "buffer": (b"LINT hello there\n", b"hello there\n"),
    "http": (GET, b"HTTP/1.1 200 OK\r\n"),
}


async def converse(peer: Peer, protocol: str) -> None:
    """What was written is answered."""
    if protocol == "tcp":
        assert (await peer.read()).kind == HELLO
    answer = FIRST[protocol][1]
    assert await peer.exactly(len(answer)) == answer


# -- protocols ------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("protocol", sorted(FIRST))
async def test_each_connection_gets_its_protocol(protocol: str) -> None:
    """However its first bytes are split."""
    said = FIRST[protocol][0]
    async with port(Acting()) as listener:
        for cut in range(1, min(len(said), 30)):
            async with opened(listener.address) as peer:
                await peer.send(said[:cut])
                await asyncio.sleep(0.001)
                await peer.send(said[cut:])
                await converse(peer, protocol)


@pytest.mark.asyncio
@pytest.mark.parametrize("protocol", sorted(FIRST))
async def test_order_of_the_transports_does_not_matter(protocol: str) -> None:
    async with (
        port(Acting(), kinds=tuple(reversed(ALL))) as listener,
        opened(listener.address) as peer,
    ):
        await peer.send(FIRST[protocol][0])
        await converse(peer, protocol)


@pytest.mark.asyncio
async def test_protocols_share_the_port_at_once() -> None:
    async with port(Acting()) as listener, asyncio.TaskGroup() as tasks:

        async def talk(protocol: str) -> None:
            async with opened(listener.address) as peer:
                for byte in FIRST[protocol][0]:
                    await peer.send(bytes([byte]))
                    await asyncio.sleep(0)
                await converse(peer, protocol)

        for protocol in (*FIRST, *FIRST):
            tasks.create_task(talk(protocol))


@pytest.mark.asyncio
async def test_what_comes_after_the_first_bytes_goes_the_same_way() -> None:
    async with port(Acting()) as listener:
        for protocol, word in (("line", b"LINE"), ("buffer", b"LINT")):
            async with opened(listener.address) as peer:
                lines = [word + b" %d" % number for number in range(1000)]
                await peer.send(b"\n".join(lines) + b"\n")
                for number in range(1000):
                    answer = b"%d\n" % number
                    assert await peer.exactly(len(answer)) == answer, protocol


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "said", [b"\0", b"LIN?", b"\x16\x03\x01\x02\x00\x01\x00", b"LINE" * 10], ids=repr
)
async def test_what_no_protocol_claims_is_hung_up_on(said: bytes) -> None:
    async with (
        port(Acting(), kinds=(TCPTransport, LineTransport, BufferTransport)) as listener,
        opened(listener.address) as peer,
    ):
        await peer.send(said)
        began = time.monotonic()
        assert await is_closed(peer)
        assert time.monotonic() - began < SLACK


class Undecidable(LineTransport):
    """Never sure."""

    def claims(self, head: bytes) -> bool | None:
        assert len(head) <= 24
        return None


@pytest.mark.asyncio
async def test_protocol_that_does_not_know_with_24_bytes_does_not_get_it() -> None:
    async with port(Acting(), kinds=(Undecidable, BufferTransport)) as listener:
        async with opened(listener.address) as peer:
            await peer.send(b"LINT " + b"x" * 18)
            await asyncio.sleep(0.05)
            await peer.send(b"yz\n")
            assert await peer.exactly(21) == b"x" * 18 + b"yz\n"


@pytest.mark.asyncio
@pytest.mark.parametrize("said", [b"", b"L", b"MICRO1\r"])
async def test_undecided_connection_is_closed_after_the_head_timeout(said: bytes) -> None:
    async with port(Acting(), head_timeout=0.3) as listener, opened(listener.address) as peer:
        began = time.monotonic()
        await peer.send(said)
        assert await is_closed(peer)
        assert 0.3 <= time.monotonic() - began < 0.3 + 0.5 + SLACK


@pytest.mark.asyncio
async def test_expired_session_is_told_and_others_are_not() -> None:
    async with port(Acting(), idle=0.3) as listener:
        async with opened(listener.address) as idle:
            await idle.send(b"LINE a\n")
            assert await idle.exactly(2) == b"a\n"
            assert await is_closed(idle)


# -- limits and ends ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_connections_over_the_limit_are_hung_up_on() -> None:
    """Undecided ones count too; one that ends makes room."""
    async with port(Acting(), connections=2) as listener:
        async with opened(listener.address) as first:
            await first.send(b"LINE a\n")
            assert await first.exactly(2) == b"a\n"
            async with opened(listener.address) as undecided, opened(listener.address) as third:
                await undecided.send(b"LI")
                assert await is_closed(third)
                await first.send(b"LINE b\n")
                assert await first.exactly(2) == b"b\n"

            async def accepted() -> bool:
                async with opened(listener.address) as peer:
                    peer.write(b"LINE c\n")
                    try:
                        return await peer.exactly(2) == b"c\n"
                    except (asyncio.IncompleteReadError, ConnectionError):
                        return False

            await eventually(accepted)


@pytest.mark.asyncio
async def test_drain_ends_all_protocols_when_their_calls_have_ended() -> None:
    release = asyncio.Event()
    running = 0

    async def wait(call: Call, body: Body) -> Reply:
        nonlocal running
        running += 1
        await release.wait()
        return Reply(body=body)

    async with port(wait) as listener:
        async with (
            opened(listener.address) as tcp,
            opened(listener.address) as line,
            opened(listener.address) as buffer,
            opened(listener.address) as undecided,
        ):
            await tcp.send(FIRST["tcp"][0])
            await line.send(FIRST["line"][0])
            await buffer.send(FIRST["buffer"][0])
            await undecided.send(b"L")
            assert (await tcp.read()).kind == HELLO
            await eventually(lambda: running == 3)
            draining = asyncio.create_task(listener.drain(SOON))
            assert await is_closed(undecided)
            assert (await tcp.read()).kind == GOAWAY
            with pytest.raises(OSError):  # noqa: PT011 - how it is refused depends on the system
                async with opened(listener.address):
                    pass
            assert not draining.done()
            release.set()
            await converse(line, "line")
            await converse(buffer, "buffer")
            assert await tcp.rest() == [reply(1, b"a")]
            await draining


@pytest.mark.asyncio
async def test_drain_is_over_after_its_grace_and_closing_cancels_what_runs() -> None:
    handler = Acting()
    async with port(handler) as listener, opened(listener.address) as peer:
        await peer.send(PREFACE + hello().encode() + request(1, "Wait.Call").encode())
        await eventually(lambda: handler.running)
        began = time.monotonic()
        await listener.drain(0.2)
        assert 0.19 <= time.monotonic() - began < 0.2 + SLACK
        assert handler.running
        await listener.aclose()
        assert not handler.running
        assert handler.cancelled == 1
        await listener.aclose()
        await listener.drain(1)


@pytest.mark.asyncio
async def test_handler_that_ignores_its_cancellation_does_not_hold_the_port() -> None:
    release = asyncio.Event()
    running = False

    async def stubborn(call: Call, body: Body) -> Reply:
        nonlocal running
        running = True
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        running = False
        return Reply(body=b"")

    async with port(stubborn) as listener, opened(listener.address) as peer:
        await peer.send(b"LINE a\n")
        await eventually(lambda: running)
        began = time.monotonic()
        await listener.aclose()
        assert time.monotonic() - began < SLACK
        release.set()
        await eventually(lambda: not running)


@pytest.mark.asyncio
async def test_handler_is_cancelled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clean-up goes on, whoever asks again, as when its connection is lost later."""
    sessions: list[LineSession] = []
    steps: list[str] = []

    async def careful(call: Call, body: Body) -> Reply:
        steps.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            steps.append("cancelled")
            await asyncio.sleep(0.1)
            steps.append("cleaned up")
        raise AssertionError

    def accept(self: LineTransport, handler: Handler, limits: Limits) -> Session:
        sessions.append(LineSession(handler, limits))
        return sessions[0]

    monkeypatch.setattr(LineTransport, "accept", accept)
    async with port(careful) as listener, opened(listener.address) as peer:
        await peer.send(b"LINE a\n")
        await eventually(lambda: steps)
        (task,) = sessions[0].running()
        sessions[0].port.cancel(task)
        await eventually(lambda: "cancelled" in steps)
        sessions[0].port.cancel(task)
        await listener.aclose()
        assert steps == ["begun", "cancelled", "cleaned up"]


# -- addresses ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_free_port_is_told_and_one_in_use_is_refused() -> None:
    async with port(Acting()) as listener:
        assert listener.address.startswith("127.0.0.1:")
        assert not listener.address.endswith(":0")
        with pytest.raises(ConfigError, match="the port is in use; choose another, or port 0"):
            async with port(Acting(), listener.address):
                pass
    async with port(Acting(), listener.address):
        pass


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("address", "text"),
    [("192.0.2.1:0", "no such address"), ("unix:/no/such/folder/s", "No such file or directory")],
)
async def test_address_that_cannot_be_listened_at_is_told(address: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        async with port(Acting(), address):
            pass
    assert address in str(caught.value)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "address", ["", "unix:", "unix:relative", "host", "host:", ":8080", "a:65536"]
)
async def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="write host:port, as"):
        async with port(Acting(), address):
            pass


@pytest.mark.asyncio
async def test_ipv6_address_has_brackets() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6")
    async with port(Acting(), "[::1]:0") as listener:
        assert listener.address.startswith("[::1]:")
        async with opened(listener.address) as peer:
            await peer.send(b"LINE a\n")
            assert await peer.exactly(2) == b"a\n"


@pytest.mark.asyncio
async def test_path_is_a_socket_while_the_port_is_open(tmp_path: Path) -> None:
    path = tmp_path / "s"
    handler = Acting()
    async with port(handler, f"unix:{path}") as listener:
        assert listener.address == f"unix:{path}"
        assert path.is_socket()
        async with opened(listener.address) as peer:
            await peer.send(FIRST["tcp"][0])
            await converse(peer, "tcp")
        assert handler.calls[0].peer
        await listener.drain(1)
        assert not path.exists()
    assert not path.exists()


@pytest.mark.asyncio
async def test_path_that_is_in_use_is_refused(tmp_path: Path) -> None:
    """And still works for who uses it, also when nobody there takes new connections."""
    path = tmp_path / "s"
    async with port(Acting(), f"unix:{path}") as listener:
        with pytest.raises(ConfigError, match="another process listens there"):
            async with port(Acting(), listener.address):
                pass
        async with opened(listener.address) as peer:
            await peer.send(b"LINE a\n")
            assert await peer.exactly(2) == b"a\n"
    busy = socket.socket(socket.AF_UNIX)
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    with busy:
        busy.bind(str(path))
        busy.listen(0)
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(str(path))
        with pytest.raises(ConfigError, match="another process listens there"):
            async with port(Acting(), f"unix:{path}"):
                pass
        assert path.is_socket()
        for one in waiting:
            one.close()


@pytest.mark.asyncio
async def test_path_of_a_process_that_has_gone_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    assert path.is_socket()
    async with port(Acting(), f"unix:{path}") as listener, opened(listener.address) as peer:
        await peer.send(b"LINE a\n")
        assert await peer.exactly(2) == b"a\n"


@pytest.mark.asyncio
async def test_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "important"
    path.write_text("kept")
    link = tmp_path / "link"
    link.symlink_to(path)
    for one in (path, link):
        with pytest.raises(ConfigError, match="no socket"):
            async with port(Acting(), f"unix:{one}"):
                pass
    assert path.read_text() == "kept"
    assert link.is_symlink()


@pytest.mark.asyncio
async def test_path_that_another_has_taken_over_is_not_removed(tmp_path: Path) -> None:
    """As in a restart, where the new process listens before the old one has ended its calls."""
    path = tmp_path / "s"
    async with port(Acting(), f"unix:{path}") as old:
        await old.drain(0)
        async with port(Acting(), f"unix:{path}") as new:
            await old.aclose()
            async with opened(new.address) as peer:
                await peer.send(b"LINE a\n")
                assert await peer.exactly(2) == b"a\n"


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def serving(authority: Authority) -> ssl.SSLContext:
    identity = authority.server()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(identity.certificate, identity.key)
    return context


def trusting(authority: Authority, *alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if alpn:
        context.set_alpn_protocols(alpn)
    return context


@pytest.mark.asyncio
@pytest.mark.parametrize("protocol", sorted(FIRST))
@pytest.mark.parametrize("negotiates", [False, True])
async def test_protocols_share_a_port_with_tls(
    authority: Authority, serving: ssl.SSLContext, protocol: str, negotiates: bool
) -> None:
    alpn = {one.schemes[0]: one.alpn for one in ALL}[protocol]
    context = trusting(authority, *([alpn] if negotiates else []))
    async with port(Acting(), tls=serving) as listener:
        async with opened(listener.address, context) as peer:
            said = FIRST[protocol][0]
            await peer.send(said[:3])
            await asyncio.sleep(0.01)
            await peer.send(said[3:])
            await converse(peer, protocol)


@pytest.mark.asyncio
async def test_negotiated_protocol_decides(authority: Authority, serving: ssl.SSLContext) -> None:
    """Whatever the first bytes look like."""
    async with port(Acting(), tls=serving) as listener:
        async with opened(listener.address, trusting(authority, "buffer")) as peer:
            await peer.send(b"LINE a\n")
            assert await peer.exactly(2) == b"a\n"
        async with opened(listener.address, trusting(authority, "micro/1")) as peer:
            await peer.send(b"LINE hello there, whoever you are\n")
            assert [frame.kind for frame in await peer.rest()] == [GOAWAY]


@pytest.mark.asyncio
async def test_protocol_that_nobody_knows_is_decided_by_its_bytes(
    authority: Authority, serving: ssl.SSLContext
) -> None:
    async with port(Acting(), tls=serving) as listener:
        async with opened(listener.address, trusting(authority, "strange/1")) as peer:
            await peer.send(b"LINE a\n")
            assert await peer.exactly(2) == b"a\n"


@pytest.mark.asyncio
async def test_client_that_begins_no_handshake_is_hung_up_on(serving: ssl.SSLContext) -> None:
    async with port(Acting(), tls=serving, head_timeout=0.3) as listener:
        async with opened(listener.address) as silent:
            began = time.monotonic()
            assert await is_closed(silent)
            assert 0.2 <= time.monotonic() - began < 0.3 + SLACK


@pytest.mark.asyncio
async def test_native_client_with_tls_checks_who_it_calls(
    authority: Authority, serving: ssl.SSLContext, tmp_path: Path
) -> None:
    stranger = Authority.create(tmp_path / "stranger")
    asked = Call(service="suite", endpoint="Echo.Call", content_type="a/b")
    async with port(Acting(), tls=serving) as listener:
        client = TCPTransport(URL.parse("tcp"))
        await client.connect(Plugins().connections())
        try:
            context = trusting(authority)
            channel = await client.dial(listener.address, Limits(), tls=context, timeout=5)
            assert (await channel.call(asked, bytes(200_000))).body == bytes(200_000)
            await channel.aclose()
            for wrong in (trusting(stranger), None):
                channel = await client.dial(listener.address, Limits(), tls=wrong, timeout=2)
                with pytest.raises(Unavailable) as caught:
                    await channel.call(asked, b"")
                assert caught.value.sent is False
                await channel.aclose()
        finally:
            await client.aclose()


@pytest.mark.asyncio
async def test_native_client_speaks_tls_on_a_path(
    authority: Authority, serving: ssl.SSLContext, tmp_path: Path
) -> None:
    asked = Call(service="suite", endpoint="Echo.Call", content_type="a/b")
    async with port(Acting(), f"unix:{tmp_path / 's'}", tls=serving) as listener:
        client = TCPTransport(URL.parse("tcp"))
        await client.connect(Plugins().connections())
        try:
            context = trusting(authority)
            channel = await client.dial(listener.address, Limits(), tls=context, timeout=5)
            assert (await channel.call(asked, b"a")).body == b"a"
            await channel.aclose()
        finally:
            await client.aclose()
