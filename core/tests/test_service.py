"""A service from start to stop, inside this process."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import micro
from micro.backend import Connections
from micro.registry import Node
from micro.settings import Settings
from micro.testing import eventually, serving

from .test_follow import ScriptedRegistry
from .test_installed import Site


class Echo:
    """What the tests serve."""

    async def say(self, text: str) -> str:
        return text

    def thread(self) -> str:
        micro.context().reply_metadata["ran-in"] = "thread"
        return threading.current_thread().name

    async def who(self) -> dict[str, str]:
        context = micro.context()
        return {"endpoint": context.endpoint, "service": context.service, "peer": context.peer}

    async def fail(self) -> None:
        raise RuntimeError("secret-canary in /etc/secret")

    async def configured(self) -> None:
        raise micro.ConfigError("secret-canary")

    async def unsendable(self) -> dict[str, int]:
        return {"n": object()}  # type: ignore[dict-item]

    async def hang(self) -> None:
        await asyncio.Event().wait()


def opened(service: micro.Service, **variables: str) -> Any:
    return service.opened(
        Settings(environment={f"MICRO_{k.upper()}": v for k, v in variables.items()})
    )


def echo(**options: Any) -> micro.Service:
    service = micro.Service("echo", **options)
    service.handle(Echo())
    return service


class RecordingRegistry(ScriptedRegistry):
    """Keeps what it is told, and fails when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.failing = False
        self.nodes: list[Node] = []

    async def connect(self, connections: Connections) -> None:
        self.told.append("connect")

    async def aclose(self) -> None:
        self.told.append("close")

    async def register(self, node: Node, *, ttl: float) -> None:
        self.told.append("register")
        if self.failing:
            raise micro.Unavailable("no registry")
        self.nodes.append(node)

    async def deregister(self, node: Node) -> None:
        self.told.append("deregister")
        if self.failing:
            raise micro.Unavailable("no registry")


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", ["memory", "http"])
async def test_service_calls_itself_by_name(transport: str) -> None:
    async with serving(
        echo(), {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": transport}
    ) as client:
        assert await client.call("echo", "Echo.Say", {"text": "hi"}) == "hi"


@pytest.mark.asyncio
async def test_order_of_a_life() -> None:
    registry = RecordingRegistry()

    @asynccontextmanager
    async def lifespan(service: micro.Service) -> AsyncIterator[None]:
        registry.told.append("lifespan enter")
        yield
        registry.told.append("lifespan leave")

    async with opened(echo(registry=registry, transport="memory", lifespan=lifespan)):
        registry.told.append("running")
    assert registry.told == [
        "connect",
        "lifespan enter",
        "register",
        "running",
        "deregister",
        "lifespan leave",
        "close",
    ]


@pytest.mark.asyncio
async def test_service_without_handlers_neither_listens_nor_registers() -> None:
    registry = RecordingRegistry()
    async with opened(micro.Service("web", registry=registry, transport="memory")):
        pass
    assert registry.told == ["connect", "close"]


@pytest.mark.asyncio
async def test_backend_that_nothing_names_opens_at_first_use() -> None:
    """An environment without multicast does not stop a service that calls nobody."""
    async with opened(micro.Service("web"), registry="memory") as service:
        assert not service._running._open
        with pytest.raises(micro.ServiceNotFound):
            await service.call("nobody", "X.Y")
        assert service._running._open


@pytest.mark.asyncio
async def test_node_tells_what_go_clients_need() -> None:
    registry = RecordingRegistry()
    service = echo(registry=registry, transport="http", version="1.2", metadata={"zone": "eu"})
    async with opened(service, server_id="node-1"):
        (node,) = registry.nodes
    assert (node.service, node.id, node.version) == ("echo", "node-1", "1.2")
    assert node.metadata["transport"] == "http"
    assert node.metadata["protocol"] == "mucp"
    assert node.metadata["zone"] == "eu"
    assert node.address.startswith("127.0.0.1:")
    assert "Echo.Say" in [endpoint.name for endpoint in node.endpoints]


@pytest.mark.asyncio
async def test_node_is_registered_again_at_each_interval() -> None:
    registry = RecordingRegistry()
    async with opened(
        echo(registry=registry, transport="memory", register_ttl=0.3, register_interval=0.05)
    ):
        await eventually(lambda: registry.told.count("register") >= 5)


@pytest.mark.asyncio
async def test_failed_heartbeat_is_tried_again_sooner_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = RecordingRegistry()
    with caplog.at_level(logging.INFO, "micro"):
        async with opened(echo(registry=registry, transport="memory", register_ttl=1)):
            registry.failing = True
            await eventually(lambda: registry.told.count("register") >= 4)
            registry.failing = False
            await eventually(lambda: len(registry.nodes) >= 2)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("heartbeat failed" in text for text in texts) == 1
    assert sum("registered again" in text for text in texts) == 1


@pytest.mark.asyncio
async def test_registry_that_fails_at_start_fails_the_start_and_closes_all() -> None:
    registry = RecordingRegistry()
    registry.failing = True
    service = echo(registry=registry, transport="http")
    with pytest.raises(micro.Unavailable, match="no registry"):
        async with opened(service):
            raise AssertionError("it must not start")
    assert registry.told == ["connect", "register", "close"]
    registry.failing = False
    async with opened(service):
        assert registry.nodes


@pytest.mark.asyncio
async def test_registry_that_fails_at_stop_does_not_fail_the_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = RecordingRegistry()
    async with opened(echo(registry=registry, transport="memory")):
        registry.failing = True
    assert registry.told[-2:] == ["deregister", "close"]
    assert "not deregistered" in caplog.text


@pytest.mark.asyncio
async def test_two_services_in_one_process_have_nothing_in_common() -> None:
    async with opened(echo(registry="memory", transport="memory")):
        async with opened(echo(registry="memory", transport="memory")) as second:
            async with second.client.watch("echo") as watch:
                assert len(watch.nodes) == 1


@pytest.mark.asyncio
async def test_service_can_be_opened_again_but_not_twice_at_once() -> None:
    service = echo(registry="memory", transport="memory")
    for _ in range(2):
        async with opened(service):
            assert await service.call("echo", "Echo.Say", {"text": "x"}) == "x"
            with pytest.raises(micro.ConfigError, match="running already"):
                async with opened(service):
                    raise AssertionError("it must not start twice")


@pytest.mark.asyncio
async def test_async_with_reads_the_environment_and_installs_no_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import signal

    monkeypatch.setenv("MICRO_REGISTRY", "memory")
    monkeypatch.setenv("MICRO_SERVER_NAME", "renamed")
    before = signal.getsignal(signal.SIGTERM)
    async with echo(transport="memory") as service:
        assert await service.call("renamed", "Echo.Say", {"text": "x"}) == "x"
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.asyncio
async def test_object_in_code_is_never_overridden() -> None:
    registry = RecordingRegistry()
    async with opened(echo(registry=registry, transport="memory"), registry="nonsense"):
        assert registry.nodes


@pytest.mark.asyncio
async def test_plain_function_runs_in_a_thread_with_its_context() -> None:
    async with serving(echo()) as client:
        assert (await client.call("echo", "Echo.Thread")).startswith("micro-echo")


@pytest.mark.asyncio
async def test_context_tells_of_the_call() -> None:
    async with serving(echo()) as client:
        told = await client.call("echo", "Echo.Who")
    assert told == {"endpoint": "Echo.Who", "service": "echo", "peer": "memory"}


@pytest.mark.asyncio
@pytest.mark.parametrize("endpoint", ["Echo.Fail", "Echo.Configured", "Echo.Unsendable"])
async def test_handler_that_raises_leaks_nothing_but_an_incident_that_the_log_has(
    endpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(echo()) as client:
        with pytest.raises(micro.Internal) as caught:
            await client.call("echo", endpoint)
    assert "canary" not in str(caught.value)
    incident = str(caught.value).rpartition(" ")[2]
    assert len(incident) == 8
    (record,) = [one for one in caplog.records if incident in one.getMessage()]
    assert record.exc_info


@pytest.mark.asyncio
async def test_caller_that_goes_cancels_its_handler() -> None:
    cancelled = asyncio.Event()

    class Waiter:
        async def wait(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

    service = micro.Service("waiter")
    service.handle(Waiter())
    async with serving(service) as client:
        with pytest.raises(micro.DeadlineExceeded):
            await client.call("waiter", "Waiter.Wait", timeout=0.05)
        await asyncio.wait_for(cancelled.wait(), 0.1 + 2.0)


@pytest.mark.asyncio
async def test_first_server_middleware_is_outermost_and_can_refuse() -> None:
    order: list[str] = []

    def note(name: str) -> micro.Middleware:
        def wrap(handler: micro.Handler) -> micro.Handler:
            async def run(call: micro.Call, body: micro.Body) -> micro.Reply:
                order.append(name)
                if call.metadata.get("key") != "open":
                    raise micro.Unauthenticated("no key")
                return await handler(call, body)

            return run

        return wrap

    service = micro.Service("echo", middleware=[note("outer"), note("inner")])
    service.handle(Echo())
    async with serving(service) as client:
        with pytest.raises(micro.Unauthenticated, match="no key"):
            await client.call("echo", "Echo.Say", {"text": 5})
        assert order == ["outer"]
        assert await client.call("echo", "Echo.Say", {"text": "x"}, metadata={"key": "open"}) == "x"
        assert order == ["outer", "outer", "inner"]


# -- what a wrong setting is told --------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"registry": "ectd://h:1"},
            r"MICRO_REGISTRY: no registry has the scheme 'ectd'; did you mean 'etcd'\?",
        ),
        ({"registry": "memori"}, r"MICRO_REGISTRY: .* did you mean 'memory'\?"),
        ({"registry": "memory?tmeout=1"}, r"MICRO_REGISTRY: memory: unknown option 'tmeout'"),
        ({"registry": "memory://x?timeout=1"}, r"MICRO_REGISTRY: memory: unknown option 'timeout'"),
        (
            {"transport": "http://?pool_sise=1"},
            r"MICRO_TRANSPORT: http: .* did you mean 'pool_size'",
        ),
        ({"transport": "http://?pool_size=x"}, r"MICRO_TRANSPORT: http: Expected `int`"),
        ({"server_address": "0.0.0.0:0"}, r"MICRO_SERVER_ADDRESS: .* --server_insecure"),
        (
            {"server_address": "nonsense"},
            r"MICRO_SERVER_ADDRESS: .*(write host:port|--server_insecure)",
        ),
        ({"server_id": "a.b"}, r"MICRO_SERVER_ID.*46"),
        ({"server_name": "a b"}, r"MICRO_SERVER_NAME.*labels"),
        ({"server_advertise": "x"}, r"MICRO_SERVER_ADVERTISE.*host:port"),
        ({"server_metadata": "novalue"}, r"MICRO_SERVER_METADATA: .*key=value"),
        ({"server_insecure": "perhaps"}, r"MICRO_SERVER_INSECURE: .*true or false"),
        ({"register_ttl": "soon"}, r"MICRO_REGISTER_TTL: .*5s"),
        ({"register_ttl": "1ms"}, r"register_ttl 0.001 s is below"),
        ({"register_interval": "20s"}, r"register_interval 20 s is more than half"),
        ({"client_request_timeout": "0"}, r"MICRO_CLIENT_REQUEST_TIMEOUT: .*more than 0"),
    ],
)
async def test_wrong_setting_says_where_it_came_from_and_what_to_write(
    variables: Mapping[str, str], text: str
) -> None:
    given = {"registry": "memory", **variables}
    with pytest.raises(micro.ConfigError, match=text):
        async with opened(echo(), **given):
            raise AssertionError("it must not start")


@pytest.mark.asyncio
async def test_port_taken_says_which_setting_and_what_to_do() -> None:
    async with opened(echo(registry="memory")) as first:
        async with first.client.watch("echo") as watch:
            address = watch.nodes[0].address
        with pytest.raises(micro.ConfigError, match=r"MICRO_SERVER_ADDRESS.*in use.*port 0"):
            async with opened(echo(registry="memory"), server_address=address):
                raise AssertionError("it must not start")


@pytest.mark.asyncio
async def test_listening_beyond_this_machine_warns_at_each_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = RecordingRegistry()
    async with opened(
        echo(registry=registry), server_address="0.0.0.0:0", server_insecure="true",
        server_advertise="127.0.0.1:9",
    ):  # fmt: skip
        assert registry.nodes[0].address == "127.0.0.1:9"
    assert "without TLS" in caplog.text


@pytest.mark.asyncio
async def test_address_that_means_all_is_advertised_as_one_that_others_reach() -> None:
    registry = RecordingRegistry()
    everywhere = {"server_address": "0.0.0.0:0", "server_insecure": "true"}
    try:
        async with opened(echo(registry=registry), **everywhere):
            told = registry.nodes[0].address.rpartition(":")[0]
    except micro.ConfigError as exc:  # a machine without a route has no such address
        told = str(exc)
    said_what_to_do = "--server_advertise host:port" in told
    assert said_what_to_do or not ipaddress.ip_address(told).is_unspecified


@pytest.mark.asyncio
async def test_handler_after_the_start_is_refused() -> None:
    service = echo(registry="memory", transport="memory")
    async with opened(service):
        with pytest.raises(micro.ConfigError, match="before the service starts"):
            service.handle(object())


def test_duplicate_endpoint_names_who_has_it() -> None:
    service = echo()
    with pytest.raises(micro.ConfigError, match=r"Echo\.Say is already served by Echo\.say.*name="):
        service.handle(Echo())
    service.handle(Echo(), name="Other")


def test_making_a_service_does_nothing() -> None:
    threads = threading.active_count()
    echo(registry="mdns", transport="http")
    assert threading.active_count() == threads


# -- middleware that is added, and extensions --------------------------------------------------


def noting(name: str, order: list[str]) -> micro.Middleware:
    def wrap(handler: micro.Handler) -> micro.Handler:
        async def run(call: micro.Call, body: micro.Body) -> micro.Reply:
            order.append(name)
            return await handler(call, body)

        return run

    return wrap


@pytest.mark.asyncio
async def test_last_wrapped_is_outermost_on_both_sides() -> None:
    order: list[str] = []
    service = echo(
        middleware=[noting("in 1", order), noting("in 2", order)],
        client_middleware=[noting("out 1", order), noting("out 2", order)],
    )
    for number in (3, 4):
        service.wrap_handler(noting(f"in {number}", order))
        service.wrap_client(noting(f"out {number}", order))
    async with serving(service) as client:
        await client.call("echo", "Echo.Say", {"text": "x"})
    outgoing, incoming = order[:4], order[4:]
    assert outgoing == ["out 4", "out 3", "out 1", "out 2"]
    assert incoming == ["in 4", "in 3", "in 1", "in 2"]


@pytest.mark.asyncio
async def test_middleware_after_the_start_is_refused() -> None:
    service = echo()
    async with serving(service):
        with pytest.raises(micro.ConfigError, match="middleware before the service starts"):
            service.wrap_handler(noting("late", []))
        with pytest.raises(micro.ConfigError, match="middleware before the service starts"):
            service.wrap_client(noting("late", []))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, monkeypatch)
    yield site
    site.forget()


EXTENSION = """
from micro.hookspecs import hookimpl

def note(name):
    def wrap(handler):
        async def run(call, body):
            call.metadata["path"] = call.metadata.get("path", "") + name
            return await handler(call, body)
        return run
    return wrap

@hookimpl
def micro_configure(service):
    service.told.append("NAME")
    service.wrap_client(note("NAME,"))
"""


class Told(micro.Service):
    """Extensions add their names to ``told``."""

    def __init__(self, *extensions: str, **options: Any) -> None:
        super().__init__("echo", extensions=extensions, **options)
        self.told: list[str] = []


def install_extension(site: Site, name: str, text: str = EXTENSION) -> None:
    site.install(
        f"micro-plugin-{name}",
        extensions={name: f"micro_plugin_{name}"},
        modules={f"micro_plugin_{name}": text.replace("NAME", name)},
    )


IN_MEMORY = {"MICRO_REGISTRY": "memory", "MICRO_TRANSPORT": "memory"}


async def refusal(service: micro.Service, *flags: str, **variables: str) -> str:
    """What a start that fails says."""
    settings = Settings(flags, {**IN_MEMORY, **variables})
    with pytest.raises(micro.ConfigError) as caught:
        async with service.opened(settings):
            raise AssertionError("it must not start")
    return str(caught.value)


@pytest.mark.asyncio
async def test_extensions_of_code_environment_and_flags_add_up_each_once(site: Site) -> None:
    for name in "abcd":
        install_extension(site, name)
    service = Told("c", "a")
    settings = Settings(["--extensions=d,a"], {**IN_MEMORY, "MICRO_EXTENSIONS": "b,c"})
    async with service.opened(settings):
        assert service.told == ["c", "a", "b", "d"]


@pytest.mark.asyncio
async def test_extension_adds_to_a_service_once_however_often_it_is_opened(site: Site) -> None:
    install_extension(site, "a")
    service = Told("a")
    for _ in range(2):
        async with serving(service):
            assert service.told == ["a"]


@pytest.mark.asyncio
async def test_extension_that_is_not_named_is_not_loaded(site: Site) -> None:
    install_extension(site, "a", "raise RuntimeError('loaded')")
    install_extension(site, "b")
    service = Told("b")
    async with serving(service):
        assert service.told == ["b"]


@pytest.mark.asyncio
async def test_extension_comes_before_the_lifespan_and_the_backends(site: Site) -> None:
    install_extension(site, "a")
    registry = RecordingRegistry()

    @asynccontextmanager
    async def lifespan(service: micro.Service) -> AsyncIterator[None]:
        registry.told.append("lifespan")
        yield

    service = Told("a", registry=registry, transport="memory", lifespan=lifespan)
    service.told = registry.told
    async with opened(service):
        assert registry.told == ["a", "connect", "lifespan"]


@pytest.mark.asyncio
async def test_extension_may_add_handlers(site: Site) -> None:
    text = """
from micro.hookspecs import hookimpl

class Debug:
    async def stats(self) -> str:
        return "fine"

@hookimpl
def micro_configure(service):
    service.handle(Debug())
"""
    install_extension(site, "debug", text)
    async with serving(Told("debug")) as client:
        assert await client.call("echo", "Debug.Stats") == "fine"


@pytest.mark.asyncio
async def test_middleware_of_the_last_extension_is_outermost(site: Site) -> None:
    class Road:
        async def walked(self) -> str:
            return micro.context().metadata["path"]

    for name in "ab":
        install_extension(site, name)
    service = Told("a", "b")
    service.handle(Road())
    async with serving(service) as client:
        assert await client.call("echo", "Road.Walked") == "b,a,"


@pytest.mark.asyncio
async def test_unknown_extension_is_refused_with_its_source_the_nearest_and_all(
    site: Site,
) -> None:
    install_extension(site, "audit")
    install_extension(site, "trace")
    told = await refusal(Told(), MICRO_EXTENSIONS="audti")
    assert told == (
        "MICRO_EXTENSIONS: no extension has the name 'audti' (installed: audit, trace); "
        "did you mean 'audit'?"
    )
    told = await refusal(Told(), "--extensions=xyz")
    assert told == "--extensions: no extension has the name 'xyz' (installed: audit, trace)"


@pytest.mark.asyncio
async def test_unknown_extension_where_none_is_installed_says_so(site: Site) -> None:
    told = await refusal(Told("audit"))
    assert told == "code: no extension has the name 'audit' (installed: none)"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ('service.told.append("NAME")', "1/0", "micro_configure raised ZeroDivisionError: "),
        ('service.told.append("NAME")', "service.handle(5)", "micro_configure raised ConfigError"),
        ('service.told.append("NAME")', "raise SystemExit(3)", "micro_configure raised SystemEx"),
        ('service.told.append("NAME")', "yield", "micro_configure gave <generator"),
        ("def micro", "async def micro", "micro_configure is async def; hooks are plain functions"),
        ("(service):", "(service, more):", "more"),
        ("from micro", "import no_such_library; from micro", "No module named 'no_such_library'"),
        ("@hookimpl", "", "it has no hook micro_configure"),
    ],
)
async def test_extension_that_fails_ends_the_start_with_its_name_and_cause(
    site: Site, old: str, new: str, cause: str
) -> None:
    install_extension(site, "audit", EXTENSION.replace(old, new))
    told = await refusal(Told(), MICRO_EXTENSIONS="audit")
    assert told.startswith("MICRO_EXTENSIONS: extension 'audit' of micro-plugin-audit 1.0 (module ")
    assert cause in told
    assert told.endswith("; mend it, or remove it: pip uninstall micro-plugin-audit")


@pytest.mark.asyncio
async def test_two_distributions_for_one_extension_are_refused_with_both_named(site: Site) -> None:
    install_extension(site, "audit", "raise RuntimeError('loaded')")
    site.install("audit-2", extensions={"audit": "audit2"}, modules={"audit2": "1/0"})
    told = await refusal(Told("audit"))
    assert told.startswith("code: extension 'audit' of ")
    assert "micro-plugin-audit 1.0" in told
    assert "audit-2 1.0" in told
    assert told.endswith("; uninstall one of them")


@pytest.mark.asyncio
async def test_service_starts_after_its_extension_was_mended(site: Site) -> None:
    install_extension(site, "a", "raise RuntimeError('not yet')")
    service = Told("a")
    assert "not yet" in await refusal(service)
    (site.folder / "micro_plugin_a.py").write_text("# mended\n" + EXTENSION.replace("NAME", "a"))
    async with serving(service):
        assert service.told == ["a"]
