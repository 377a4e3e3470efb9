"""Plugins: which backends there are, and which of them a URL selects."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable
from typing import Any, ClassVar

import msgspec
import pytest

import micro
from micro.backend import Backend, Connections
from micro.hookspecs import hookimpl
from micro.plugins import Plugins
from micro.registry import Change, Node, Registry, RegistryFeatures, Snapshot
from micro.settings import Settings
from micro.transport import Transport
from micro.url import URL

# mypy wants a concrete class where a type[...] is asked for.
REGISTRY: Any = Registry
TRANSPORT: Any = Transport


class FakeRegistry(Registry):
    """A registry of one process, as somebody else would write it."""

    schemes: ClassVar[tuple[str, ...]] = ("fake", "fake+tls")
    features = RegistryFeatures(min_ttl=0.1, converge=0.0)

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.nodes: dict[tuple[str, str], Node] = {}

    async def connect(self, connections: Connections) -> None:
        pass

    async def aclose(self) -> None:
        pass

    async def register(self, node: Node, *, ttl: float) -> None:
        self.nodes[node.service, node.id] = node

    async def deregister(self, node: Node) -> None:
        self.nodes.pop((node.service, node.id), None)

    async def get(self, service: str) -> tuple[Node, ...]:
        found = tuple(node for node in self.nodes.values() if node.service == service)
        if not found:
            raise micro.ServiceNotFound(service)
        return found

    async def services(self) -> tuple[str, ...]:
        return tuple(sorted({service for service, _ in self.nodes}))

    async def follow(
        self, service: str | None, mark: object
    ) -> AsyncGenerator[tuple[object, Snapshot | Change], None]:
        yield 0, Snapshot(nodes=tuple(self.nodes.values()))
        await asyncio.Event().wait()


class OtherRegistry(FakeRegistry):
    schemes = ("other", "fake")


class MemoryAgain(FakeRegistry):
    schemes = ("memory",)


class Neither(Backend[None]):
    schemes = ("neither",)

    async def connect(self, connections: Connections) -> None:
        pass

    async def aclose(self) -> None:
        pass


class Adds:
    """A plugin in code."""

    def __init__(self, *backends: Any) -> None:
        self.backends = backends

    @hookimpl
    def micro_backends(self) -> Iterable[type[Backend[Any]]]:
        return self.backends


class Helloworld:
    async def call(self, name: str) -> str:
        return f"Hello {name}"


# -- what a plugin adds ------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_service_runs_on_a_scheme_that_a_plugin_adds() -> None:
    service = micro.Service(
        "helloworld", registry="fake://", transport="memory", plugins=Plugins(Adds(FakeRegistry))
    )
    service.handle(Helloworld())
    async with service.opened(Settings(environment={})):
        assert isinstance(await service.client.registered(), FakeRegistry)
        assert await service.call("helloworld", "Helloworld.Call", {"name": "Bob"}) == "Hello Bob"


@pytest.mark.parametrize("scheme", FakeRegistry.schemes)
def test_every_scheme_of_a_backend_selects_it(scheme: str) -> None:
    url = URL.parse(f"{scheme}://host")
    made = Plugins(Adds(FakeRegistry)).create(REGISTRY, url)
    assert type(made) is FakeRegistry
    assert made.url is url


def test_plugin_may_be_a_module() -> None:
    module: Any = type(sys)("micro_plugin_fake")
    module.micro_backends = hookimpl(lambda: [FakeRegistry])
    assert Plugins(module).schemes(REGISTRY) == ("fake", "fake+tls", "mdns", "memory")


def test_several_plugins_add_theirs() -> None:
    class Another(FakeRegistry):
        schemes = ("another",)

    plugins = Plugins(Adds(FakeRegistry), Adds(Another))
    assert {"fake", "another"} < set(plugins.schemes(REGISTRY))


def test_schemes_are_those_of_the_kind_sorted() -> None:
    plugins = Plugins(Adds(FakeRegistry))
    assert plugins.schemes(REGISTRY) == ("fake", "fake+tls", "mdns", "memory")
    assert plugins.schemes(TRANSPORT) == ("http", "memory")


def test_plugin_of_one_plugins_is_not_seen_by_another() -> None:
    Plugins(Adds(FakeRegistry))
    assert "fake" not in Plugins().schemes(REGISTRY)


@pytest.mark.asyncio
async def test_memory_with_a_name_is_shared_within_one_plugins() -> None:
    plugins = Plugins()
    seen: list[int] = []
    for connections in (plugins.connections(), plugins.connections(), Plugins().connections()):
        registry = plugins.create(REGISTRY, URL.parse("memory://name"))
        await registry.connect(connections)
        await registry.register(Node(service="x", id=f"n{len(seen)}", address="h:1"), ttl=60)
        seen.append(len(await registry.get("x")))
    assert seen == [1, 2, 1]


# -- what is refused ---------------------------------------------------------------------------


def test_two_plugins_for_one_scheme_are_refused_with_both_named() -> None:
    with pytest.raises(micro.ConfigError, match="'fake' is claimed by both") as caught:
        Plugins(Adds(FakeRegistry), Adds(OtherRegistry))
    assert "FakeRegistry" in str(caught.value)
    assert "OtherRegistry" in str(caught.value)


def test_plugin_for_a_scheme_of_an_embedded_backend_is_refused_with_both_named() -> None:
    with pytest.raises(micro.ConfigError, match="'memory' is claimed by both") as caught:
        Plugins(Adds(MemoryAgain))
    assert "MemoryAgain" in str(caught.value)
    assert "micro.backends.memory:MemoryRegistry" in str(caught.value)


def test_plugin_that_is_given_twice_is_refused() -> None:
    plugin = Adds(FakeRegistry)
    with pytest.raises(micro.ConfigError):
        Plugins(plugin, plugin)


class Misspelt:
    @hookimpl
    def micro_backend(self) -> list[type[Backend[Any]]]:
        return [FakeRegistry]


class WrongParameters:
    @hookimpl
    def micro_backends(self, service: object) -> list[type[Backend[Any]]]:
        return [FakeRegistry]


def test_plugin_with_a_misspelt_hook_is_refused_with_its_name() -> None:
    with pytest.raises(micro.ConfigError, match="'micro_backend'"):
        Plugins(Misspelt())


def test_plugin_whose_hook_takes_other_parameters_is_refused() -> None:
    with pytest.raises(micro.ConfigError, match="service"):
        Plugins(WrongParameters())


class Unmarked:
    def micro_backends(self) -> list[type[Backend[Any]]]:
        return [FakeRegistry]


@pytest.mark.parametrize(
    "plugin", [object(), Unmarked(), FakeRegistry, asyncio, "fake"], ids=lambda p: str(p)[:16]
)
def test_plugin_without_a_hook_is_refused(plugin: object) -> None:
    with pytest.raises(micro.ConfigError, match="plugin"):
        Plugins(plugin)


@pytest.mark.parametrize(
    "backend",
    [Neither, int, 5, "FakeRegistry", FakeRegistry(URL.parse("fake"))],
    ids=["backend", "class", "number", "text", "instance"],
)
def test_backend_that_is_no_class_of_a_kind_is_refused(backend: object) -> None:
    with pytest.raises(micro.ConfigError, match="is neither a Registry nor a Transport"):
        Plugins(Adds(backend))


def test_backend_without_schemes_is_refused() -> None:
    class Nameless(FakeRegistry):
        schemes: ClassVar[tuple[str, ...]] = ()

    with pytest.raises(micro.ConfigError, match="Nameless"):
        Plugins(Adds(Nameless))


@pytest.mark.parametrize("answer", [None, 5, FakeRegistry], ids=["None", "number", "class"])
def test_hook_that_gives_no_list_is_refused(answer: object) -> None:
    class Plugin:
        @hookimpl
        def micro_backends(self) -> object:
            return answer

    with pytest.raises(micro.ConfigError, match="micro_backends"):
        Plugins(Plugin())


# -- choosing ----------------------------------------------------------------------------------


def test_unknown_scheme_names_its_source_and_the_nearest() -> None:
    text = r"^--registry: no registry has the scheme 'memroy'; did you mean 'memory'\?$"
    with pytest.raises(micro.ConfigError, match=text):
        Plugins().create(REGISTRY, URL.parse("memroy", source="--registry"))


def test_unknown_scheme_like_no_other_names_all_that_are_known() -> None:
    text = r"^MICRO_REGISTRY: .*'zzz'; known are fake, fake\+tls, mdns, memory$"
    url = URL.parse("zzz://host", source="MICRO_REGISTRY")
    with pytest.raises(micro.ConfigError, match=text):
        Plugins(Adds(FakeRegistry)).create(REGISTRY, url)


def test_scheme_of_another_kind_is_unknown() -> None:
    with pytest.raises(micro.ConfigError, match="no transport has the scheme 'mdns'"):
        Plugins().create(TRANSPORT, URL.parse("mdns"))


@pytest.mark.asyncio
async def test_unknown_scheme_in_the_environment_stops_a_service_with_its_source() -> None:
    service = micro.Service("x", registry="memory", transport="memory")
    service.handle(Helloworld())
    with pytest.raises(micro.ConfigError, match=r"^MICRO_REGISTRY: .*'memory'"):
        async with service.opened(Settings(environment={"MICRO_REGISTRY": "memori"})):
            pass


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(kind, scheme) for kind in (REGISTRY, TRANSPORT) for scheme in Plugins().schemes(kind)],
)
def test_embedded_backend_is_made_by_its_scheme(kind: type[Backend[Any]], scheme: str) -> None:
    made = Plugins().create(kind, URL.parse(scheme))
    assert isinstance(made, kind)
    assert scheme in made.schemes
    assert issubclass(made.Options, msgspec.Struct)


def test_embedded_scheme_needs_no_search_for_installed_plugins() -> None:
    program = """\
import sys, micro
micro.Plugins().create(micro.Registry, micro.URL.parse("memory"))
micro.Plugins().create(micro.Transport, micro.URL.parse("memory"))
print(*sys.modules)"""
    shown = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=True
    )
    loaded = shown.stdout.split()
    assert "micro.backends.memory" in loaded
    assert not {"importlib.metadata", "pluggy", "micro.backends.mdns"} & set(loaded)
