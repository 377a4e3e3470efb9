"""``ready_check``: who is not ready gets no calls, and is told apart from who is dead."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import micro
from micro import readiness
from micro.backend import Connections
from micro.readiness import ReadyCheck
from micro.registry import Node, Registry, RegistryFeatures
from micro.settings import Settings
from micro.testing import eventually
from micro.testing.lifecycle import SLACK

from .test_follow import ScriptedRegistry


class Echo:
    """What the tests serve."""

    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def say(self, text: str) -> str:
        return text

    async def wait(self) -> str:
        await self.release.wait()
        return "released"


class Book(ScriptedRegistry):
    """A registry that tells what stands in it, and fails when the test says so."""

    def __init__(self, *, converge: float = 0.0) -> None:
        super().__init__()
        self.features = RegistryFeatures(min_ttl=0.01, converge=converge)
        self.failing = False
        #: Registering is done, and what says so is lost.
        self.silent = False
        self.there: dict[str, Node] = {}
        self.told: list[str] = []

    async def connect(self, connections: Connections) -> None:
        pass

    async def register(self, node: Node, *, ttl: float) -> None:
        if self.failing:
            raise micro.Unavailable("secret-canary of the registry")
        if node.id not in self.there:
            self.told.append("register")
        self.there[node.id] = node
        if self.silent:
            raise micro.Unavailable("no answer")

    async def deregister(self, node: Node) -> None:
        self.told.append("deregister")
        self.there.pop(node.id, None)


class Answer:
    """A check that says what the test sets, and counts."""

    def __init__(self, answer: Any = False) -> None:
        self.answer = answer
        self.asked = 0

    async def __call__(self) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "EVERY", 0.02)
    monkeypatch.setattr(readiness, "WITHIN", 0.2)


def opened(check: ReadyCheck | None, registry: Registry | str = "memory", **options: Any) -> Any:
    service = micro.Service(
        "echo", registry=registry, transport="http", ready_check=check, **options
    )
    service.handle(Echo())
    return service.opened(Settings(environment={}))


def address_of(service: micro.Service, caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [text for text in caplog.messages if "serving at" in text]
    return line.split("serving at ")[1].split(",")[0]


async def get(address: str, path: str) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of a plain request."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "micro")


# -- at the start ------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [None, True])
async def test_ready_service_is_registered_when_it_has_started(answer: bool | None) -> None:
    book = Book()
    async with opened(Answer(answer), book):
        assert len(book.there) == 1


@pytest.mark.asyncio
async def test_service_that_is_not_ready_starts_and_is_not_registered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = Book()
    async with opened(check := Answer(False), book) as service:
        await eventually(lambda: check.asked > 3)
        assert book.told == []
        address = address_of(service, caplog)
        assert (await get(address, "/livez"))[0] == 200
        status, told = await get(address, "/readyz")
        assert (status, told["detail"]) == (503, "echo is not ready: ready_check says no")
    assert "echo: registers when it is ready; now ready_check says no" in caplog.text
    assert "not yet registered" in caplog.text
    assert book.told == []


@pytest.mark.asyncio
async def test_it_is_registered_and_found_as_soon_as_it_is_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with opened(check := Answer(False)) as service:
        with pytest.raises(micro.ServiceNotFound):
            await service.call("echo", "Echo.Say", {"text": "x"})
        check.answer = True
        address = address_of(service, caplog)

        async def ready() -> bool:
            return (await get(address, "/readyz"))[0] == 200

        await eventually(ready)
        assert await service.call("echo", "Echo.Say", {"text": "x"}) == "x"


@pytest.mark.asyncio
async def test_registry_that_cannot_be_told_fails_the_start_of_what_is_ready() -> None:
    book = Book()
    book.failing = True
    check = Answer(True)
    with pytest.raises(micro.Unavailable):
        async with opened(check, book):
            raise AssertionError("it must not start")
    asked = check.asked
    await asyncio.sleep(0.1)
    assert check.asked == asked


@pytest.mark.asyncio
async def test_registry_that_fails_later_is_tried_again_and_it_is_not_ready_meanwhile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = Book()
    async with opened(check := Answer(False), book) as service:
        book.failing = True
        check.answer = True
        asked = check.asked
        await eventually(lambda: check.asked > asked + 5)
        status, told = await get(address_of(service, caplog), "/readyz")
        assert status == 503
        assert "cannot be registered: Unavailable" in told["detail"]
        assert "canary" not in str(told)
        book.failing = False
        await eventually(lambda: book.told == ["register"])
    assert sum("not registered, trying on" in text for text in caplog.messages) == 1


@pytest.mark.asyncio
async def test_start_that_is_cancelled_leaves_no_check_behind() -> None:
    running = 0

    async def check() -> None:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(3600)
        finally:
            running -= 1

    async def start() -> None:
        async with opened(check):
            raise AssertionError("it must not start")

    starting = asyncio.create_task(start())
    await eventually(lambda: running)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert running == 0


@pytest.mark.asyncio
async def test_node_that_may_have_been_registered_is_taken_out_when_it_is_not_ready() -> None:
    book = Book()
    async with opened(check := Answer(False), book):
        book.silent = True
        check.answer = True
        await eventually(lambda: book.there)
        check.answer = False
        await eventually(lambda: not book.there)


# -- while it runs -----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_node_that_is_not_ready_any_more_is_taken_out_and_put_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = Book()
    async with opened(check := Answer(True), book) as service:
        address = address_of(service, caplog)
        for _ in range(2):
            check.answer = False
            await eventually(lambda: not book.there)
            assert (await get(address, "/readyz"))[0] == 503
            assert (await get(address, "/livez"))[0] == 200
            check.answer = None
            await eventually(lambda: book.there)
            await eventually(partial(is_ready, address))
        assert book.told == ["register", "deregister"] * 2 + ["register"]
    assert "not ready, taken out of the registry: ready_check says no" in caplog.text
    assert "ready, and registered" in caplog.text


async def is_ready(address: str) -> bool:
    return (await get(address, "/readyz"))[0] == 200


@pytest.mark.asyncio
async def test_calls_that_come_to_a_node_that_is_not_ready_are_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A caller that has not heard of it yet loses no call."""
    book = Book()
    async with opened(check := Answer(True), book) as service:
        address = address_of(service, caplog)
        check.answer = False
        await eventually(lambda: not book.there)
        said = {"text": "x"}
        assert await service.call("echo", "Echo.Say", said, address=address) == "x"


@pytest.mark.asyncio
async def test_heartbeat_does_not_put_back_what_is_not_ready() -> None:
    book = Book()
    options = {"register_ttl": 0.2, "register_interval": 0.02}
    async with opened(check := Answer(True), book, **options):
        check.answer = False
        await eventually(lambda: not book.there)
        asked = check.asked
        await eventually(lambda: check.asked > asked + 10)
        assert book.told == ["register", "deregister"]


@pytest.mark.asyncio
async def test_exception_says_no_and_only_the_log_has_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = Book()
    async with opened(check := Answer(True), book) as service:
        check.answer = ValueError("password=secret-canary\nforged line")
        await eventually(lambda: not book.there)
        status, told = await get(address_of(service, caplog), "/readyz")
        assert (status, told["detail"]) == (503, "echo is not ready: ready_check raised ValueError")
        asked = check.asked
        await eventually(lambda: check.asked > asked + 5)
    assert sum("secret-canary" in text for text in caplog.messages) == 1, "each time, or never"


@pytest.mark.asyncio
@pytest.mark.parametrize("answer", [0, 1, "", "yes", b"", []])
async def test_what_is_neither_yes_nor_no_is_no_and_told(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(Answer(answer)) as service:
        _, told = await get(address_of(service, caplog), "/readyz")
        kind = type(answer).__name__
        assert f"ready_check returned a {kind}, not True, False or None" in told["detail"]


# -- checks that take long ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_check_that_never_ends_says_no_in_time_and_is_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = most = asked = 0
    hanging = True

    async def check() -> None:
        nonlocal running, most, asked
        running += 1
        asked += 1
        most = max(most, running)
        try:
            await asyncio.sleep(3600 if hanging else 0)
        finally:
            running -= 1

    began = time.monotonic()
    async with opened(check) as service:
        assert time.monotonic() - began < readiness.WITHIN + SLACK
        _, told = await get(address_of(service, caplog), "/readyz")
        assert "ready_check did not answer in 0.2 s" in told["detail"]
        await eventually(lambda: asked >= 2)
        hanging = False
        await eventually(partial(is_ready, address_of(service, caplog)))
    assert (most, running) == (1, 0)


@pytest.mark.asyncio
async def test_check_that_ignores_its_cancellation_is_not_asked_twice_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = 0
    release = asyncio.Event()

    async def check() -> None:
        nonlocal asked
        asked += 1
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()

    try:
        async with opened(check) as service:
            await asyncio.sleep(3 * readiness.WITHIN)
            assert asked == 1
            assert not await is_ready(address_of(service, caplog))
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 1 + SLACK
    finally:
        release.set()


@pytest.mark.asyncio
async def test_plain_function_that_waits_does_not_hold_the_loop() -> None:
    threads: list[threading.Thread] = []

    def check() -> bool:
        threads.append(threading.current_thread())
        time.sleep(0.1)
        return True

    book = Book()
    began = time.monotonic()
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with opened(check, book):
        assert time.monotonic() - began >= 0.1
        assert ticks >= 3
        assert book.there
    ticking.cancel()
    assert threads[0] is not threading.main_thread()


@pytest.mark.asyncio
async def test_plain_function_that_never_ends_takes_one_thread_and_holds_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    release = threading.Event()
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        release.wait(30)

    try:
        async with opened(check) as service:
            await asyncio.sleep(3 * readiness.WITHIN)
            assert asked == 1
            assert not await is_ready(address_of(service, caplog))
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 1 + SLACK
    finally:
        release.set()


@pytest.mark.asyncio
async def test_plain_function_may_raise_or_give_a_coroutine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def asynchronous(answer: bool) -> bool:
        return answer

    async with opened(lambda: asynchronous(True)) as service:
        assert await is_ready(address_of(service, caplog))
    caplog.clear()

    def fail() -> None:
        raise OSError(5, "of the disk")

    async with opened(fail) as service:
        _, told = await get(address_of(service, caplog), "/readyz")
        assert "ready_check raised OSError" in told["detail"]


# -- the stop ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_stop_of_what_is_not_ready_waits_for_nobody_to_hear_of_it() -> None:
    book = Book(converge=2.0)
    async with opened(Answer(False), book):
        leaving = time.monotonic()
    assert time.monotonic() - leaving < SLACK
    assert book.told == []


@pytest.mark.asyncio
async def test_stop_of_what_is_ready_tells_the_registry_once_and_asks_no_more() -> None:
    book = Book()
    async with opened(check := Answer(True), book):
        await eventually(lambda: check.asked > 3)
    asked = check.asked
    await asyncio.sleep(0.1)
    assert check.asked == asked
    assert book.told == ["register", "deregister"]


@pytest.mark.asyncio
async def test_call_that_runs_while_it_is_not_ready_ends_before_the_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = Echo()
    service = micro.Service("echo", registry="memory", transport="http", ready_check=Answer(False))
    service.handle(handler)
    caller = micro.Service("caller", registry="memory", transport="http")
    async with caller.opened(Settings(environment={})):
        async with service.opened(Settings(environment={})):
            address = address_of(service, caplog)
            calling = asyncio.create_task(caller.call("echo", "Echo.Wait", address=address))
            await eventually(lambda: service._server.stats()["Echo.Wait"].running)
            asyncio.get_running_loop().call_later(0.2, handler.release.set)
        assert await calling == "released"


@pytest.mark.asyncio
async def test_service_without_a_check_is_ready_while_it_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = Book(converge=0.3)
    during: list[int] = []
    async with opened(None, book) as service:
        address = address_of(service, caplog)
        assert await is_ready(address)

        async def look() -> None:
            await eventually(lambda: not book.there)
            during.append((await get(address, "/readyz"))[0])
            during.append((await get(address, "/livez"))[0])

        looking = asyncio.create_task(look())
    await looking
    assert during == [503, 200], "the order: not ready, deregistered, and then still serving"
