"""The other end of ``micro.cli._suite``: a plugin of pytest, in a process of its own.

A socket says what to do, in one line, and ends when the run has to: who started it has gone, or was
interrupted. It gets what comes of it, a line of JSON an event.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any, cast
from urllib.parse import quote

import msgspec
import pytest

from micro.cli._suite import Event, Task
from micro.errors import ServiceNotFound
from micro.plugins import Plugins
from micro.registry import Node, Registry
from micro.url import URL

#: Seconds that may go into taking away what one test has left.
_SWEEP = 15.0
#: Seconds after which a test that does not end when it is interrupted is interrupted again.
_AGAIN = 3.0

_PARENT = os.getppid()
_task: list[Task] = []
_line: list[socket.socket] = []
_left: dict[str, str] = {}
#: What tests have registered, and when its time to live ends, by namespace, service and id.
_ends: dict[str, dict[tuple[str, str], tuple[Node, float]]] = {}
_reports: list[pytest.TestReport] = []


def task() -> Task:
    """What was asked for."""
    return _task[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--line", type=int)


def pytest_configure(config: pytest.Config) -> None:
    """Read what to do, and prepare the suite."""
    _line.append(socket.socket(fileno=config.option.line))
    with _line[0].makefile("rb") as lines:
        _task.append(msgspec.json.decode(lines.readline(), type=Task))
    threading.Thread(target=_heed_the_end, name="micro verify", daemon=True).start()
    from micro.testing._verify_cases import TestRegistry

    backend = type(_created(Plugins(), task().url))
    TestRegistry.backend = _noting(backend)  # type: ignore[misc]  # it is no one object's
    TestRegistry.seed = task().seed
    TestRegistry.model_examples = task().examples
    TestRegistry.model_steps = task().steps


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell how many tests there will be."""
    _tell(Event(event="counted", count=len(session.items)))


def pytest_runtest_logstart(nodeid: str) -> None:
    """Tell which test begins."""
    _reports.clear()
    _tell(Event(event="begun", promise=_promise(nodeid)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Take away what a test has left, once its fixtures have ended."""
    yield
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # not as the current loop
        runner.run(sweep())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what came of set-up, test and the rest."""
    _reports.append(report)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Tell what came of a test."""
    failed = next((report for report in _reports if report.failed), None)
    skipped = next((report for report in _reports if report.skipped), None)
    decisive = failed or skipped
    told = dict(pair for report in _reports for pair in report.user_properties)
    _tell(
        Event(
            event="ended",
            promise=_promise(nodeid),
            outcome=decisive.outcome if decisive else "passed",
            why=_why(decisive) if decisive else "",
            text=failed.longreprtext if failed else "",
            seconds=sum(report.duration for report in _reports),
            features=str(told.get("micro.features", "")),
        )
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish() -> Generator[None, object, object]:
    """Take away what is left, and tell what could not be: after all fixtures have ended."""
    result = yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # this is what an interrupt has to wait for
    if _task:
        asyncio.run(sweep())
        _tell(Event(event="swept", left=tuple(_left.values())))
    return result


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder of this run when nobody is left who would."""
    if os.getppid() != _PARENT:
        shutil.rmtree(config.rootpath, ignore_errors=True)


async def sweep() -> None:
    """Deregister what there is in our namespaces, and note what cannot be."""
    for url in (task().url, task().inner_url):
        _left.pop(url, None)
        try:
            async with asyncio.timeout(_SWEEP):
                await _empty(url)
        except Exception as exc:  # whatever it is, it is told, and the other one is swept too
            _left[url] = f"{_url(url)}: {type(exc).__name__}: {exc}"


async def _empty(url: str) -> None:
    plugins = Plugins()
    registry = _created(plugins, url)
    connections = plugins.connections()
    try:
        await registry.connect(connections)
        for node in [*await _nodes(registry), *_over(registry.url.path)]:
            await registry.deregister(node)
        _ends.pop(registry.url.path, None)
    finally:
        await registry.aclose()
        await connections.aclose()


async def _nodes(registry: Registry) -> list[Node]:
    """All that there is: nobody else has anything in a namespace of ours."""
    found: list[Node] = []
    for name in await registry.services():
        with suppress(ServiceNotFound):  # it went meanwhile
            found += await registry.get(name)
    return found


def _over(path: str) -> list[Node]:
    """Nodes that no registry lists any more; a server may keep them for some time."""
    now = time.monotonic()
    return [node for node, end in _ends.get(path, {}).values() if end < now]


def _noting(backend: type[Registry]) -> type[Registry]:
    """As ``backend``, and it notes what it has registered."""

    async def register(self: Registry, node: Node, *, ttl: float) -> None:
        await backend.register(self, node, ttl=ttl)
        nodes = _ends.setdefault(self.url.path, {})
        nodes[node.service, node.id] = (node, time.monotonic() + ttl)

    async def deregister(self: Registry, node: Node) -> None:
        await backend.deregister(self, node)
        _ends.get(self.url.path, {}).pop((node.service, node.id), None)

    methods: dict[str, Any] = {"register": register, "deregister": deregister}
    return cast("type[Registry]", type(backend.__name__, (backend,), methods))


def _heed_the_end() -> None:
    """Interrupt the tests once nobody is at the other end of our line."""
    _line[0].recv(1)
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(_AGAIN)


def _created(plugins: Plugins, url: str) -> Registry:
    kind: type[Registry] = Registry  # type: ignore[type-abstract]
    return plugins.create(kind, _url(url))


def _url(text: str) -> URL:
    return URL.parse(text, source="verify")


def _promise(nodeid: str) -> str:
    return nodeid.rpartition("::")[2].removeprefix("test_")


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr))


def _tell(event: Event) -> None:
    told = msgspec.structs.replace(event, why=_hidden(event.why), text=_hidden(event.text))
    _line[0].sendall(msgspec.json.encode(told) + b"\n")


def _hidden(text: str) -> str:
    """``text`` without the password of the URL, however that is written."""
    secret = _url(task().url).password
    for form in {secret, quote(secret, safe=""), quote(secret)} if secret else ():
        text = text.replace(form, "***")
    return text
