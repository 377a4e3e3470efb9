"""``micro register``, ``micro deregister`` and ``micro services --watch``."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import micro
from micro.backends.memory import MemoryRegistry
from micro.cli import main
from micro.cli._child import Signals, running
from micro.cli._deregister import deregister
from micro.cli._events import Lines, Printer
from micro.cli._output import Exit
from micro.cli._probe import Ill, Probe, probe_of
from micro.cli._register import _pass_on
from micro.cli._services import EVENTS, services
from micro.cli._upkeep import EVENTS as EVENTS_OF_A_NODE
from micro.cli._upkeep import Health, Pace, Upkeep
from micro.registry import Node, Registry
from micro.testing import eventually
from micro.testing.certificates import Authority, Identity
from micro.testing.ports import unused_ports

MICRO = str(Path(sys.executable).with_name("micro"))
#: Seconds that any one step may take.
PATIENCE = 30
#: A program that knows nothing of us: it answers a page, and a call.
PROGRAM = """
import signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200 if self.path == "/well" else 503, b"")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b'{"price": 42}')

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

def end(number, frame):
    print("the program got", number, flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> str:
    """A namespace of this test's own, which the environment names."""
    url = f"mdns:///register-{uuid.uuid4().hex[:12]}?timeout=1s"
    monkeypatch.setenv("MICRO_REGISTRY", url)
    return url


class Told:
    """A command in a process of its own, and the lines that it tells; JSON ones as they are."""

    def __init__(self, *words: str, under: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*under, MICRO, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []

    def next(self) -> str:
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline().rstrip("\n")
        watchdog.cancel()
        self.lines.append(line)
        assert line, self.lines
        return line

    def until(self, text: str) -> str:
        while text not in (line := self.next()):
            pass
        return line

    def event(self, name: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.until(f'"event": "{name}"'))
        return told

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """The status that it ends with after a signal, and what it tells before."""
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@contextmanager
def told(*words: str, under: Sequence[str] = ()) -> Iterator[Told]:
    command = Told(*words, under=under)
    try:
        yield command
    finally:
        command.process.kill()
        command.process.communicate()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MICRO, *words], text=True, capture_output=True, timeout=PATIENCE, check=False
    )


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


# -- the checks --------------------------------------------------------------------------------


@asynccontextmanager
async def answering(
    *parts: bytes, hangs: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """The address of a server that says this, and the first lines of what it was asked."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            asked.append(await reader.readline())
            for part in parts:
                writer.write(part)
                await writer.drain()
            if hangs:
                await reader.read()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


def probe(text: str, address: str) -> Probe:
    made = probe_of(text, address)
    assert made is not None
    return made


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "parts",
    [
        [b"HTTP/1.1 200 OK\r\n\r\n"],
        [b"HTTP/1.0 204\r\nA: b\r\n\r\n"],
        [b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 299 Yes\r\n\r\nbody"],
    ],
)
async def test_a_page_whose_status_is_2xx_is_well(parts: list[bytes]) -> None:
    async with answering(*parts) as (address, asked):
        await probe("/a/b?c=d", address)()
        await probe(f"http://{address}", "127.0.0.1:1")()
    assert asked == [b"GET /a/b?c=d HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 503 Away\r\n\r\n", "status 503"),
        (b"HTTP/1.1 301 Gone\r\nLocation: /x\r\n\r\n", "status 301; write where that leads to"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n", "no HTTP"),
        (b"SSH-2.0-x\r\n\r\n", "no HTTP"),
        (b"", "it hung up before it answered"),
        (b"x" * 100_000, "no HTTP, or a head of more than 65536 bytes"),
    ],
)
async def test_a_page_that_answers_otherwise_is_ill_and_says_how(answer: bytes, why: str) -> None:
    async with answering(answer) as (address, _):
        with pytest.raises(Ill) as caught:
            await probe("/", address)()
    assert str(caught.value) == why


@pytest.mark.asyncio
async def test_a_page_is_asked_over_a_unix_socket_too(tmp_path: Path) -> None:
    asked = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            asked.set_result(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async with await asyncio.start_unix_server(answer, tmp_path / "socket"):
        await probe("/well", f"unix:{tmp_path}/socket")()
    assert (await asked).startswith(b"GET /well HTTP/1.1\r\nHost: localhost\r\n")


WELL = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that no check trusts."""
    return Authority.create(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The authority that is named for checks."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    return authority


def shows(identity: Identity, wants: Path | None = None) -> ssl.SSLContext:
    """What a server speaks TLS with; ``wants`` is an authority whose certificate it asks for."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=wants)
    context.load_cert_chain(identity.certificate, identity.key)
    if wants:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.asyncio
async def test_a_page_over_https_is_well_if_its_authority_is_named(trusted: Authority) -> None:
    async with answering(WELL, tls=shows(trusted.server())) as (address, asked):
        await probe(f"https://{address}/well", "127.0.0.1:1")()
        await probe(f"https://localhost:{address.partition(':')[2]}", "127.0.0.1:1")()
    assert asked == [b"GET /well HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n"]


@pytest.mark.asyncio
async def test_a_page_over_https_is_well_though_its_server_never_hangs_up(
    trusted: Authority,
) -> None:
    identity, left = trusted.server(), threading.Event()

    def serve(listener: socket.socket) -> bytes:
        """It answers, and looks at nothing more until the check is over."""
        with listener.accept()[0] as accepted:
            accepted.settimeout(PATIENCE)
            with shows(identity).wrap_socket(accepted, server_side=True) as client:
                client.recv(1000)
                client.sendall(WELL)
                assert left.wait(PATIENCE)
                return client.recv(1000)

    with listening(0) as listener:
        served = asyncio.create_task(asyncio.to_thread(serve, listener))
        async with asyncio.timeout(PATIENCE / 2):  # asyncio waits 30 s for the goodbye of TLS
            await probe(f"https://127.0.0.1:{listener.getsockname()[1]}/", "127.0.0.1:1")()
        left.set()
        assert await served == b""  # it is told that we go


@pytest.mark.asyncio
async def test_a_page_over_https_whose_certificate_is_wrong_is_ill_and_says_what_helps(
    trusted: Authority, stranger: Authority
) -> None:
    day = timedelta(days=1)
    wrong = {
        "name its authority with SSL_CERT_FILE=FILE": stranger.server(),
        "renew it": trusted.service("old", lives=-day),
        "use a host that it names": trusted.service("other", hosts=["other.test"]),
    }
    for helps, identity in wrong.items():
        async with answering(WELL, tls=shows(identity)) as (address, asked):
            with pytest.raises(Ill) as caught:
                await probe(f"https://{address}/", "127.0.0.1:1")()
        assert str(caught.value).startswith("its certificate is not trusted: ")
        assert str(caught.value).endswith(f"; {helps}")
        assert not asked


@pytest.mark.asyncio
async def test_a_page_over_https_that_asks_for_our_certificate_is_ill_and_says_what_helps(
    trusted: Authority,
) -> None:
    tls = shows(trusted.server(), wants=trusted.ca)

    def serve(listener: socket.socket) -> None:
        """It refuses, and reads on: else a reset might come before what it says."""
        client = tls.wrap_socket(listener.accept()[0], True, do_handshake_on_connect=False)
        with client, pytest.raises(ssl.SSLError):
            client.settimeout(PATIENCE)
            try:
                client.do_handshake()
            finally:
                while socket.socket.recv(client, 1000):
                    pass

    with listening(0) as listener:
        served = asyncio.create_task(asyncio.to_thread(serve, listener))
        with pytest.raises(Ill) as caught:
            await probe(f"https://127.0.0.1:{listener.getsockname()[1]}/", "127.0.0.1:1")()
        await served
    assert str(caught.value).startswith("it refuses our TLS: ")
    assert str(caught.value).endswith("; a check shows no certificate: write tcp")


@pytest.mark.asyncio
async def test_a_page_over_https_of_a_server_without_tls_is_ill_and_says_what_helps() -> None:
    async with answering(WELL) as (address, _):
        with pytest.raises(Ill) as caught:
            await probe(f"https://{address}/", "127.0.0.1:1")()
    assert str(caught.value) == "it does not speak TLS; write http://"


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file or directory"), ("no PEM", "no certificates in PEM: ")],
)
def test_authorities_that_cannot_be_read_are_a_usage_error(
    content: str | None,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    words = ("--address", "127.0.0.1:1", "--check", "https://127.0.0.1:1/")
    assert main(["register", "web", *words]) == Exit.USAGE
    assert capsys.readouterr().err.startswith(f"error: ConfigError: SSL_CERT_FILE={path}: {why}")


@pytest.mark.parametrize(
    "text",
    [
        *("", "udp", "well", "ftp://a/", "http://", "http://a b/", "http://user:pw@a/"),
        *("http://a:b/", "http://a:99999/", "/a\r\nX: y", "/ł", "http://ł/"),
    ],
)
def test_what_is_no_check_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["register", "web", "--address", "127.0.0.1:1", "--check", text]) == Exit.USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: ConfigError: --check: ")
    assert "write tcp, none, /path, or http://host:port/path" in error


# -- what the answers come to ------------------------------------------------------------------

PACE = Pace(interval=0.02, timeout=0.2, rise=2, fall=3)


async def never() -> None:
    raise AssertionError


def test_a_program_is_ill_after_so_many_answers_in_a_row_and_well_again_likewise() -> None:
    health = Health(never, PACE)
    seen = []
    for why in ("", "a", "b", "", "c", "d", "e", "", "f", "", ""):
        health.count(why)
        seen.append(health.why)
    assert seen == ["", "", "", "", "", "", "e", "e", "e", "e", ""]


def test_a_program_that_starts_is_well_with_its_first_good_answer() -> None:
    health = Health(never, PACE)
    seen = [health.why]
    for why in ("a", "b", ""):
        health.count(why)
        seen.append(health.why)
    assert seen == [None, "a", "a", ""]


@pytest.mark.asyncio
@pytest.mark.parametrize("check", ["tcp", "/"])
async def test_who_does_not_listen_is_ill(check: str) -> None:
    health = Health(probe(check, f"127.0.0.1:{unused_ports(1)[0]}"), PACE)
    asking = asyncio.create_task(health.run())
    await eventually(lambda: health.why)
    asking.cancel()
    assert health.why == "connection refused: nobody listens there"


@pytest.mark.asyncio
async def test_who_does_not_answer_in_time_is_ill() -> None:
    async with answering(hangs=True) as (address, _):
        health = Health(probe("/", address), PACE)
        asking = asyncio.create_task(health.run())
        await eventually(lambda: health.why)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert health.why == "no answer in 0.2 s"


class Kept:
    """A node in a registry of this process, for as long as ``ill`` is empty."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.ill = ""
        self.told: list[tuple[str, str]] = []
        self.node = Node(service="web", id="n1", address="127.0.0.1:1")
        self.connects: Callable[[], None] = lambda: None
        self.health = Health(self._ask, Pace(interval=0.02, timeout=1, rise=1, fall=1))
        self.upkeep = Upkeep(self._connect, self.node, self.health, self._tell, ttl=30, interval=10)

    async def _ask(self) -> None:
        if self.ill:
            raise Ill(self.ill)

    async def _connect(self) -> Registry:
        self.connects()
        return self.registry

    def _tell(self, event: str, why: str) -> None:
        self.told.append((event, why))

    async def nodes(self) -> tuple[Node, ...]:
        try:
            return await self.registry.get("web")
        except micro.ServiceNotFound:
            return ()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[Any]]:
        tasks = [asyncio.create_task(one.run()) for one in (self.health, self.upkeep)]
        yield tasks[1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.upkeep.leave("the end")


@pytest_asyncio.fixture
async def kept() -> AsyncIterator[Kept]:
    memory = MemoryRegistry(micro.URL(scheme="memory"))
    await memory.connect(micro.Plugins().connections())
    yield Kept(memory)
    await memory.aclose()


@pytest.mark.asyncio
async def test_a_node_is_registered_while_its_program_is_well(kept: Kept) -> None:
    kept.ill = "503"
    async with kept.running():
        await eventually(lambda: kept.told)
        assert await kept.nodes() == ()
        kept.ill = ""
        assert await eventually(kept.nodes) == (kept.node,)
        await eventually(lambda: kept.upkeep.is_in)
        kept.ill = "504"
        await eventually(lambda: not kept.upkeep.is_in)
        assert await kept.nodes() == ()
        kept.ill = ""
        assert await eventually(kept.nodes) == (kept.node,)
        await eventually(lambda: kept.upkeep.is_in)
    assert await kept.nodes() == ()
    assert kept.told == [
        ("waiting", "503"),
        ("registered", ""),
        ("deregistered", "unhealthy: 504"),
        ("registered", "healthy again"),
        ("deregistered", "the end"),
    ]


@pytest.mark.asyncio
async def test_a_registry_that_is_not_there_yet_is_waited_for(kept: Kept) -> None:
    tries = 0

    def refuse_once() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise micro.Unavailable("nobody there")

    kept.connects = refuse_once
    async with kept.running():
        assert await eventually(kept.nodes) == (kept.node,)
        await eventually(lambda: kept.upkeep.is_in)
    assert kept.told[:2] == [("outage", "nobody there"), ("registered", "")]


@pytest.mark.asyncio
async def test_what_no_waiting_mends_is_raised(kept: Kept) -> None:
    def refuse() -> None:
        raise micro.PermissionDenied("not for you")

    kept.connects = refuse
    async with kept.running() as working:
        with pytest.raises(micro.PermissionDenied):
            await asyncio.wait_for(working, PATIENCE)


# -- micro register ----------------------------------------------------------------------------


def listening(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_register_tells_what_it_does_and_leaves_when_it_is_asked_to() -> None:
    with listening(0) as program:
        address = f"127.0.0.1:{program.getsockname()[1]}"
        words = ("--id", "n1", "--version", "1.5", "-m", "zone=a", "-m", "Team=b,c=d")
        with told("register", "web", "--address", address, *words, "--json") as command:
            said = command.event("registered")
            node = json.loads(run("describe", "web", "--json").stdout)["nodes"][0]
            status, rest = command.end()
    spoken = {"transport": "http", "protocol": "mucp", "server": "mucp", "registry": "mdns"}
    metadata = {"zone": "a", "Team": "b,c=d", **spoken}
    assert node == {
        "id": "n1",
        "address": address,
        "version": "1.5",
        "metadata": metadata,
        "service_metadata": {},
    }
    assert said.pop("time").endswith("Z")
    assert said == {"event": "registered", "service": "web"} | node
    last = json.loads(rest)
    assert (status, last["event"], last["detail"]) == (Exit.OK, "deregistered", "SIGTERM")
    assert json.loads(run("services", "--json").stdout) == []


def test_an_interrupt_deregisters_and_ends_with_130() -> None:
    with told("register", "web", "--address", "127.0.0.1:9", "--check", "none") as command:
        line = command.until("registered").split()
        status, rest = command.end(signal.SIGINT)
    assert (line[1:3], line[4:]) == (["registered", "web"], ["127.0.0.1:9", "latest"])
    assert status == Exit.INTERRUPTED
    assert rest.split()[1] == "deregistered"
    assert rest.split()[-1] == "SIGINT"


#: It takes a terminal for its own, and becomes the command that follows.
ON_TERMINAL = """
import os, sys
os.close(os.open(sys.argv[1], os.O_RDWR))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_terminal_that_goes_away_deregisters_and_ends_with_0() -> None:
    """The kernel sends a SIGHUP then, and nothing can be told any more."""
    words = (MICRO, "register", "web", "--address", "127.0.0.1:9", "--check", "none")
    with told("services", "web", "--watch", "--json") as watching:
        watching.event("live")
        ours, its = os.openpty()
        with closing(os.fdopen(ours, "rb", buffering=0)):
            command = subprocess.Popen(
                [sys.executable, "-c", ON_TERMINAL, os.ttyname(its), *words],
                stdin=its,
                stdout=its,
                stderr=its,
                start_new_session=True,
            )
            os.close(its)
            watching.event("create")
        try:
            watching.event("delete")
            assert command.wait(PATIENCE) == Exit.OK
        finally:
            command.kill()
            command.wait()


def test_a_hangup_is_nothing_under_nohup() -> None:
    words = ("register", "web", "--address", "127.0.0.1:9", "--check", "none", "--json")
    with told(*words, under=("nohup",)) as command:
        command.event("registered")
        command.process.send_signal(signal.SIGHUP)
        assert run("describe", "web").returncode == Exit.OK
        status, rest = command.end()
    assert (status, json.loads(rest)["detail"]) == (Exit.OK, "SIGTERM")


def test_register_follows_the_program_that_comes_and_goes() -> None:
    port = unused_ports(1)[0]
    words = ("--address", f"127.0.0.1:{port}", "--interval", "100ms", "--json")
    with told("register", "web", *words) as command:
        assert command.event("waiting")["detail"] == "connection refused: nobody listens there"
        for detail in (None, "healthy again"):
            with listening(port):
                assert command.event("registered").get("detail") == detail
            assert command.event("deregistered")["detail"].startswith("unhealthy: connection ref")
        assert command.end() == (Exit.OK, "")


@pytest.mark.asyncio
async def test_a_program_is_registered_once_its_certificate_is_trusted(
    trusted: Authority, stranger: Authority
) -> None:
    tls = shows(stranger.server())
    async with answering(WELL, tls=tls) as (address, _):
        words = ("--address", address, "--check", f"https://{address}/", "--json")
        with told("register", "web", *words) as command:
            waiting = await asyncio.to_thread(command.event, "waiting")
            assert waiting["detail"].endswith("; name its authority with SSL_CERT_FILE=FILE")
            mended = trusted.server()
            tls.load_cert_chain(mended.certificate, mended.key)
            await asyncio.to_thread(command.event, "registered")
            assert (await asyncio.to_thread(command.end))[0] == Exit.OK


def test_a_call_reaches_a_program_that_was_registered(program: Path) -> None:
    port = unused_ports(1)[0]
    address, words = f"127.0.0.1:{port}", (sys.executable, str(program), str(port))
    with told("register", "prices", "--address", address, "--check", "/well", "--", *words) as one:
        one.until("registered")
        done = run("call", "prices", "Prices.Get", '{"symbol": "XYZ"}')
        assert (done.returncode, done.stdout) == (Exit.OK, '{"price": 42}\n'), done.stderr
        assert one.end()[0] == 7


def test_a_signal_goes_on_to_the_program_once_its_callers_know(program: Path) -> None:
    port = unused_ports(1)[0]
    words = (sys.executable, str(program), str(port))
    with told("register", "web", "--address", f"127.0.0.1:{port}", "--", *words) as command:
        command.until("registered")
        began = time.monotonic()
        status, rest = command.end(signal.SIGINT)
        took = time.monotonic() - began
    left, got = rest.splitlines()
    assert left.endswith("SIGINT")
    assert (status, got) == (7, "the program got 2")
    assert took >= 2.0  # so long does mdns take to tell all


def test_a_second_signal_goes_on_at_once(program: Path) -> None:
    port = unused_ports(1)[0]
    words = (sys.executable, str(program), str(port))
    with told("register", "web", "--address", f"127.0.0.1:{port}", "--", *words) as command:
        command.until("registered")
        command.process.send_signal(signal.SIGINT)
        command.until("deregistered")
        began = time.monotonic()
        status, rest = command.end()
        assert time.monotonic() - began < 2.0
    assert (status, rest) == (7, "the program got 15\n")


#: It counts the signals that come, ends half a second after the first, and tells how many.
SLOW = """
import pathlib, signal, sys, time
came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
pathlib.Path(sys.argv[1]).touch()
while not came:
    time.sleep(0.01)
end = time.monotonic() + 0.5
while (left := end - time.monotonic()) > 0:
    time.sleep(left)
sys.exit(len(came))
"""


@pytest.mark.asyncio
async def test_a_program_that_takes_its_time_to_end_gets_a_signal_once(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with closing(Signals()) as signals:
        async with running((sys.executable, "-c", SLOW, str(ready))) as child:
            await eventually(ready.exists, within=PATIENCE)
            await asyncio.wait_for(_pass_on(signal.SIGTERM, signals, child, 0.05), PATIENCE)
            assert await child.ended == 1


@pytest.mark.parametrize(("script", "status"), [("exit 5", 5), ("kill -9 $$", 128 + 9)])
def test_the_end_of_the_program_is_the_end_of_its_registration(script: str, status: int) -> None:
    with told("services", "--watch", "--json") as watching:
        watching.event("live")
        words = ("--address", "127.0.0.1:9", "--check", "none", "--", "sh", "-c")
        done = run("register", "web", *words, f"echo it runs; sleep 1; {script}")
        assert [watching.event(name)["service"] for name in ("create", "delete")] == ["web"] * 2
    assert (done.returncode, done.stdout) == (status, "it runs\n")
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["registered", "deregistered"]
    assert done.stderr.rstrip().endswith(f"the program has ended with status {status}")


def test_a_program_that_cannot_be_run_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["register", "web", "--address", "127.0.0.1:9", "--", "/no/such/program"]
    assert main(words) == Exit.USAGE
    text = "error: ConfigError: cannot run '/no/such/program': No such file or directory\n"
    assert capfd.readouterr().err == text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--address", "nowhere"], "InvalidArgument: node address 'nowhere': write host:port"),
        (["--address", "0.0.0.0:80"], "ConfigError: --address: 0.0.0.0:80 is where a program"),
        (["--address", "a:1", "--id", "a b"], "InvalidArgument: node id 'a b': write 1 to 46"),
        (["--address", "a:1", "-m", "x"], "UsageError: --metadata: 'x' is not key=value; see"),
        (["--address", "a:1", "--interval", "0s"], "ConfigError: --interval: '0s' is not more"),
        (
            ["--address", "127.0.0.1:1", "--check", "none", "--register-ttl", "1s"],
            "ConfigError: register_ttl 1 s is below the least that mdns keeps, 2 s",
        ),
        (
            ["--address", "a:1", "--register-ttl", "9s", "--register_interval", "5s"],
            "ConfigError: register_interval 5 s is more than half of register_ttl 9 s; ",
        ),
        ([], "UsageError: Missing option '--address'; see micro register --help"),
    ],
)
def test_register_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], words: Sequence[str], text: str
) -> None:
    assert main(["register", "web", *words]) == Exit.USAGE
    assert capsys.readouterr().err.startswith(f"error: {text}")


def test_several_transports_are_told_as_our_services_tell_them() -> None:
    words = ("--check", "none", "--transport", "tcp,http", "--json")
    with told("register", "web", "--address", "127.0.0.1:9", *words) as command:
        metadata = command.event("registered")["metadata"]
    assert (metadata["transport"], metadata["transports"]) == ("http", "tcp,http")


def test_a_program_of_grpc_is_told_as_go_micro_tells_it() -> None:
    words = ("--check", "none", "--transport", "grpc", "--json")
    with told("register", "web", "--address", "127.0.0.1:9", *words) as command:
        metadata = command.event("registered")["metadata"]
    assert [metadata[name] for name in ("transport", "protocol", "server")] == ["grpc"] * 3


def test_who_does_not_read_the_lines_holds_up_nothing() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as full:
        printer = Printer(full)
        began = time.monotonic()
        for number in range(5000):
            printer.print(f"{number:0100}")
        printer.close()
        assert time.monotonic() - began < 1.0 + 2.0
        assert printer._lines.qsize() <= 1000
        os.close(read)
        printer.close()  # the thread, which has waited for a reader, has ended
        assert not printer._thread.is_alive()


def test_the_last_lines_are_read() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as file:
        printer = Printer(file)
        printer.print("one")
        printer.print("two")
        printer.close()
    assert os.read(read, 100) == b"one\ntwo\n"
    os.close(read)


# -- micro deregister --------------------------------------------------------------------------


@asynccontextmanager
async def fleet(*nodes: Node) -> AsyncIterator[micro.Service]:
    async with micro.Service("micro", registry="memory://fleet") as service:
        registry = await service.client.registered()
        for node in nodes:
            await registry.register(node, ttl=30)
        yield service


NODES = [
    Node(service="web", id=name, address=f"127.0.0.1:{port}")
    for name, port in (("n1", 1), ("n2", 2), ("n3", 2))
]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("id", "address", "left"),
    [
        ("n2", None, ["n1", "n3"]),
        (None, "127.0.0.1:2", ["n1"]),
        (None, "127.0.0.1:1", ["n2", "n3"]),
    ],
)
async def test_deregister_takes_out_the_nodes_that_are_named_and_no_other(
    monkeypatch: pytest.MonkeyPatch, id: str | None, address: str | None, left: list[str]
) -> None:
    monkeypatch.delenv("MICRO_REGISTRY")
    async with fleet(*NODES) as service:
        gone = await deregister(service, "web", id, address)
        _, found = await services(service, "web")
    assert [node.id for node in found["web"]] == left
    assert sorted([*left, *(node.id for node in gone)]) == ["n1", "n2", "n3"]


@pytest.mark.asyncio
async def test_deregister_of_an_unknown_node_names_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MICRO_REGISTRY")
    text = "it has n1 at 127.0.0.1:1, n2 at 127.0.0.1:2, n3 at 127.0.0.1:2"
    async with fleet(*NODES) as service:
        for name, address, named in (
            ("n9", None, "node 'n9'"),
            (None, "127.0.0.1:9", "node at 127.0.0.1:9"),
        ):
            with pytest.raises(micro.NotFound) as caught:
                await deregister(service, "web", name, address)
            assert str(caught.value) == f"service 'web' has no {named}; {text}"


def test_deregister_of_an_unknown_service_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deregister", "web", "n1"]) == Exit.NOT_FOUND
    assert "service 'web' is not registered" in capsys.readouterr().err


def test_deregister_says_so_where_a_node_answers_for_itself() -> None:
    words = ("--address", "127.0.0.1:9", "--id", "n1", "--check", "none")
    with told("register", "web", *words) as command:
        command.until("registered")
        done = run("deregister", "web", "n1")
    assert (done.returncode, done.stdout) == (Exit.ERROR, "")
    assert done.stderr.startswith("error: FailedPrecondition: node n1 of 'web' is still registered")
    assert done.stderr.endswith("answers for itself there, as with mdns; end that program\n")


@pytest.mark.parametrize("words", [[], ["n1", "--address", "127.0.0.1:1"]])
def test_deregister_takes_an_id_or_an_address(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["deregister", "web", *words]) == Exit.USAGE
    text = "error: UsageError: give the node's ID, or its --address; see micro deregister --help\n"
    assert capsys.readouterr().err == text


# -- micro services --watch --------------------------------------------------------------------


def test_watch_tells_who_is_there_and_then_who_comes_changes_and_goes(registry: str) -> None:
    words = ("--address", "127.0.0.1:9", "--check", "none", "--id")
    with told("register", "web", *words, "n1", "--version", "1") as one:
        one.until("registered")
        with told("services", "--watch") as watching, told("services", "-w", "--json") as machine:
            assert watching.next().split() == [
                "TIME",
                "EVENT",
                *("SERVICE", "NODE", "ADDRESS", "VERSION"),
            ]
            there, live = watching.next().split(), watching.next().split()
            assert there[1:] == ["there", "web", "n1", "127.0.0.1:9", "1"]
            assert live[1:] == ["live", registry]
            assert [machine.event("there")["id"], machine.event("live")["registry"]] == [
                "n1",
                registry,
            ]
            with told("register", "other", *words, "n2") as two:
                two.until("registered")
                assert watching.next().split()[1:4] == ["create", "other", "n2"]
                two.end()
            assert watching.next().split()[1:4] == ["delete", "other", "n2"]
            assert [machine.event(kind)["id"] for kind in ("create", "delete")] == ["n2", "n2"]
            status, said = watching.end(signal.SIGINT)
            assert (status, said.strip()) == (Exit.INTERRUPTED, "")


def test_watch_of_a_name_tells_of_that_service_alone_which_may_come_later() -> None:
    words = ("--address", "127.0.0.1:9", "--check", "none")
    with told("services", "web", "--watch", "--json") as watching:
        watching.event("live")
        for name in ("other", "web"):
            with told("register", name, *words) as command:
                command.until("registered")
                if name == "web":
                    assert json.loads(watching.next())["service"] == "web"


def test_watch_ends_quietly_when_its_reader_leaves() -> None:
    script = f"{MICRO} services --watch | head -n 2"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.stdout.count("\n"), done.stderr) == (2, "")


def test_services_of_a_name_is_that_one_alone() -> None:
    words = ("--address", "127.0.0.1:9", "--check", "none")
    with told("register", "web", *words) as one, told("register", "other", *words) as two:
        one.until("registered")
        two.until("registered")
        done = run("services", "web", "--json")
    assert json.loads(done.stdout) == [{"name": "web", "nodes": 1, "versions": ["latest"]}]
    assert run("services", "web").returncode == Exit.NOT_FOUND


def test_nothing_of_a_node_moves_a_cursor() -> None:
    node = Node(service="web", id="a\x1b[2J", address="b\r", version="c\n")
    line = Lines(EVENTS, as_json=False).line("create", node, detail="d\x9b")
    for text in (r"a\x1b[2J", r"b\r", r"c\n", r"d\x9b"):
        assert text in line
    told = json.loads(Lines(EVENTS_OF_A_NODE, as_json=True).line("registered", node))
    assert told["id"] == node.id
