"""``micro health``: every registered node is asked, and what is wrong with it is told."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

import micro
from micro.cli import health, main
from micro.cli._health import Answer, show
from micro.cli._output import Exit

MICRO = str(Path(sys.executable).with_name("micro"))
#: Seconds that any one step may take.
PATIENCE = 30
SLACK = 2.0
SERVICE = """
import micro

class Greeter:
    async def call(self) -> str:
        return "Hello"

service = micro.Service("greeter")
service.handle(Greeter())
service.run()
"""


class Greeter:
    async def call(self) -> str:
        return "Hello"


class Ill:
    async def health(self) -> dict[str, str]:
        return {"status": "out of breath"}


class Broken:
    async def health(self) -> dict[str, str]:
        raise micro.PermissionDenied("not for you")


class Asked:
    """Middleware that counts who was asked, with which metadata."""

    def __init__(self) -> None:
        self.endpoints: list[str] = []
        self.metadata: list[dict[str, str]] = []

    def __call__(self, handler: micro.Handler) -> micro.Handler:
        async def run(call: micro.Call, body: micro.Body) -> micro.Reply:
            self.endpoints.append(call.endpoint)
            self.metadata.append(dict(call.metadata))
            return await handler(call, body)

        return run


@contextmanager
def started(tmp_path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The service ``greeter`` in a process of its own, and its address."""
    script = tmp_path / "greeter.py"
    script.write_text(SERVICE)
    with subprocess.Popen(
        [sys.executable, str(script), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        watchdog.cancel()
        try:
            yield process, line.partition("serving at ")[2].partition(",")[0]
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


class Fleet:
    """Nodes of ``greeter`` in one registry, in this process or registered by hand."""

    def __init__(self) -> None:
        self.plugins = micro.Plugins()
        self.client = self.service("micro")

    def service(self, name: str, **options: Any) -> micro.Service:
        return micro.Service(name, registry="memory://fleet", plugins=self.plugins, **options)

    @asynccontextmanager
    async def node(self, *handlers: object, **options: Any) -> AsyncIterator[None]:
        service = self.service("greeter", **options)
        for handler in handlers or (Greeter(),):
            service.handle(handler, name="Debug" if hasattr(handler, "health") else None)
        async with service:
            yield

    async def register(self, id: str, address: str, **metadata: str) -> micro.Node:
        spoken = {"transport": "http", "transports": "tcp,http", "protocol": "mucp"} | metadata
        node = micro.Node(service="greeter", id=id, address=address, metadata=spoken)
        await (await self.client.client.registered()).register(node, ttl=60)
        return node

    async def health(self, timeout: float = 5.0, **metadata: str) -> dict[str, Answer]:
        """The answers, by id."""
        async with asyncio.timeout(PATIENCE) as timer:
            answers = await health(
                self.client, timer, name="greeter", timeout=timeout, metadata=metadata
            )
        return {answer.id: answer for answer in answers}


@pytest_asyncio.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.delenv("MICRO_REGISTRY", raising=False)
    fleet = Fleet()
    async with fleet.client:
        yield fleet


@pytest.fixture
def closed() -> Iterator[str]:
    """An address where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


# -- what is asked -----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_every_node_is_asked_once_and_by_itself(fleet: Fleet) -> None:
    asked = {f"n{number}": Asked() for number in range(5)}
    async with AsyncExitStack() as nodes:
        for name, one in asked.items():
            await nodes.enter_async_context(fleet.node(id=name, middleware=[one]))
        answers = await fleet.health(tenant="a")
    assert answers.keys() == asked.keys()
    assert all(answer.healthy and answer.reachable for answer in answers.values())
    assert {(*one.endpoints,) for one in asked.values()} == {("Debug.Health",)}
    assert all(one.metadata[0]["tenant"] == "a" for one in asked.values())


@pytest.mark.asyncio
async def test_a_node_is_asked_over_the_best_transport_that_it_has(fleet: Fleet) -> None:
    async with (
        fleet.node(id="both"),
        fleet.node(id="http", transport="http"),
        fleet.node(id="tcp", transport="tcp"),
    ):
        answers = await fleet.health()
    assert answers.keys() == {"both", "http", "tcp"}
    assert all(answer.healthy for answer in answers.values())


@pytest.mark.asyncio
async def test_nodes_are_asked_at_once_each_for_as_long_as_was_said(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:  # nobody takes what waits
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for number in range(20):
            await fleet.register(f"n{number}", address)
        began = time.monotonic()
        answers = await fleet.health(0.5)
    assert time.monotonic() - began < 0.5 + SLACK
    assert {answer.problem for answer in answers.values()} == {"silent"}
    assert all(answer.seconds >= 0.5 for answer in answers.values())


@pytest.mark.asyncio
async def test_a_node_that_was_ejected_is_asked_again(fleet: Fleet, closed: str) -> None:
    async with fleet.node(id="well"):
        await fleet.register("ill", closed)
        for _ in range(3):
            answers = await fleet.health()
            assert answers["well"].healthy
            assert answers["ill"].problem == "refused"


@pytest.mark.asyncio
async def test_a_service_that_is_not_registered_is_not_found(fleet: Fleet) -> None:
    with pytest.raises(micro.ServiceNotFound, match="nothing is registered"):
        await fleet.health()


# -- what can be wrong -------------------------------------------------------------------------


async def the_answer(fleet: Fleet, timeout: float = 5.0) -> Answer:
    """That of the node ``ill``, beside one that is well."""
    async with fleet.node(id="well"):
        answers = await fleet.health(timeout)
    assert answers["well"].healthy
    assert answers.keys() == {"well", "ill"}
    return answers["ill"]


@pytest.mark.asyncio
@pytest.mark.parametrize("transports", ["tcp,http", "http"])
async def test_a_closed_port_is_refused(fleet: Fleet, closed: str, transports: str) -> None:
    await fleet.register("ill", closed, transports=transports)
    answer = await the_answer(fleet)
    assert (answer.reachable, answer.healthy, answer.problem) == (False, False, "refused")
    assert closed in answer.detail


@pytest.mark.asyncio
async def test_a_socket_in_the_file_system_that_is_gone_is_refused(fleet: Fleet) -> None:
    await fleet.register("ill", "unix:/nonexistent/socket")
    assert (await the_answer(fleet)).problem == "refused"


@pytest.mark.asyncio
@pytest.mark.parametrize("transports", ["tcp,http", "http"])
async def test_a_process_that_is_stopped_gives_no_answer(
    fleet: Fleet, tmp_path: Path, transports: str
) -> None:
    with started(tmp_path, "--registry", "memory") as (process, address):
        await fleet.register("ill", address, transports=transports)
        assert (await the_answer(fleet)).healthy
        process.send_signal(signal.SIGSTOP)
        answer = await the_answer(fleet, 0.7)
        assert (answer.reachable, answer.problem) == (False, "silent")
        assert 0.7 <= answer.seconds < 0.7 + SLACK
        process.send_signal(signal.SIGCONT)
        assert (await the_answer(fleet)).healthy
        process.kill()
        process.wait(PATIENCE)
        assert (await the_answer(fleet)).problem in ("refused", "lost")


@pytest.mark.asyncio
async def test_an_address_without_a_way_there_is_unreachable(fleet: Fleet) -> None:
    await fleet.register("ill", "255.255.255.255:9")
    assert (await the_answer(fleet)).problem == "unreachable"


@pytest.mark.asyncio
@pytest.mark.parametrize("transports", ["tcp,http", "http"])
async def test_a_port_that_speaks_something_else_has_no_handshake(
    fleet: Fleet, transports: str
) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP ready\r\n" * 2)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await fleet.register("ill", f"127.0.0.1:{port}", transports=transports)
        answer = await the_answer(fleet)
    assert (answer.reachable, answer.problem) == (False, "handshake")


@pytest.mark.asyncio
async def test_a_node_that_hangs_up_on_the_question_is_lost(fleet: Fleet) -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await fleet.register("ill", f"127.0.0.1:{port}", transports="http")
        assert (await the_answer(fleet)).problem == "lost"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("handler", "detail"), [(Ill(), "status 'out of breath'"), (Broken(), "greeter: not for you")]
)
async def test_a_node_that_answers_something_else_is_reachable_and_not_healthy(
    fleet: Fleet, handler: object, detail: str
) -> None:
    async with fleet.node(handler, id="ill"):
        answer = await the_answer(fleet)
    assert (answer.reachable, answer.healthy) == (True, False)
    assert (answer.problem, answer.detail) == ("unhealthy", detail)


@pytest.mark.asyncio
async def test_a_node_of_another_protocol_is_not_asked(fleet: Fleet, closed: str) -> None:
    await fleet.register("ill", closed, protocol="grpc", transport="grpc", transports="")
    answer = await the_answer(fleet)
    assert (answer.reachable, answer.problem, answer.detail) == (False, "foreign", "grpc")


@pytest.mark.asyncio
async def test_a_node_that_leaves_while_it_is_asked_is_gone(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = await fleet.register("ill", f"127.0.0.1:{silent.getsockname()[1]}")
        silent.setblocking(False)
        asking = asyncio.create_task(the_answer(fleet, 2.0))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            connection, _ = await loop.sock_accept(silent)
            await (await fleet.client.client.registered()).deregister(node)
            answer = await asking
        connection.close()
    assert (answer.reachable, answer.problem) == (False, "gone")


# -- the command -------------------------------------------------------------------------------


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MICRO, *words], text=True, capture_output=True, timeout=PATIENCE, check=False
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"mdns:///health-{uuid.uuid4().hex[:12]}?timeout=1s"
    monkeypatch.setenv("MICRO_REGISTRY", url)
    return url


def test_command_shows_a_row_a_node_and_ends_with_0_when_all_are_healthy(
    registry: str, tmp_path: Path
) -> None:
    with started(tmp_path, "--server_id", "n1", "--server_version", "1.5") as (_, address):
        done = run("health", "greeter")
        as_json = run("health", "greeter", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    title, row, empty, sum_up = done.stdout.splitlines()
    assert title.split() == ["NODE", "ADDRESS", "VERSION", "REACHABLE", "TIME", "WHY", "NOT"]
    assert row.split()[:4] == ["n1", address, "1.5", "yes"]
    assert row.split()[5] in ("us", "ms", "s")
    assert (empty, sum_up) == ("", "1 of 1 healthy")
    told = json.loads(as_json.stdout)
    assert as_json.returncode == 0
    assert 0 < told["nodes"][0].pop("seconds") < PATIENCE
    assert told == {
        "service": "greeter",
        "healthy": True,
        "nodes": [
            {
                "id": "n1",
                "address": address,
                "version": "1.5",
                "reachable": True,
                "healthy": True,
                "problem": None,
                "detail": "",
            }
        ],
    }


def test_command_says_what_is_wrong_and_ends_with_1(
    registry: str, tmp_path: Path, closed: str
) -> None:
    flags = ("--server_id", "n2", "--server_advertise", closed)
    with started(tmp_path, "--server_id", "n1"), started(tmp_path, *flags):
        done = run("health", "greeter")
        as_json = run("--json", "health", "greeter")
    assert (done.returncode, done.stderr) == (Exit.ERROR, "")
    _, well, ill, _, sum_up = done.stdout.splitlines()
    assert well.split()[0::3][:2] == ["n1", "yes"]
    assert ill.split()[:4] == ["n2", closed, "latest", "NO"]
    assert ill.endswith("refused: nobody listens there")
    assert sum_up == "1 of 2 healthy"
    told = json.loads(as_json.stdout)
    assert as_json.returncode == Exit.ERROR
    assert not told["healthy"]
    assert [node["problem"] for node in told["nodes"]] == [None, "refused"]


def test_command_names_how_long_it_waited_for_a_node(registry: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with started(tmp_path, "--server_advertise", address):
            done = run("health", "greeter", "--timeout", "400ms")
    assert done.returncode == Exit.ERROR
    assert "no answer in 0.4" in done.stdout


@pytest.mark.usefixtures("registry")
def test_command_for_a_service_that_is_not_there_is_not_found(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["health", "greeter"]) == Exit.NOT_FOUND
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ServiceNotFound: service 'greeter' is not registered")


def test_nothing_of_a_node_moves_a_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"id": "a\x1b[2J", "address": "b\r", "version": "c\n", "detail": "d\x9b"}
    show([Answer(**texts, reachable=False, healthy=False, seconds=1.0, problem="unhealthy")])
    shown = capsys.readouterr().out
    for text in (r"a\x1b[2J", r"b\r", r"c\n", r"d\x9b"):
        assert text in shown
