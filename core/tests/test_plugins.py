"""Plugins: which backends there are, and which of them a URL selects."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
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

from .test_installed import Site

# mypy wants a concrete class where a type[...] is asked for.
REGISTRY: Any = Registry
TRANSPORT: Any = Transport


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path, monkeypatch)
    yield site
    site.forget()


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
    ) -> AsyncGenerator[tuple[object, Snapshot | Change | None], None]:
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
    assert plugins.schemes(TRANSPORT) == ("http", "memory", "tcp")


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


def test_backend_whose_schemes_are_a_text_is_refused() -> None:
    class Text(FakeRegistry):
        schemes: ClassVar[Any] = "text"

    with pytest.raises(micro.ConfigError, match=r"Text.* names no schemes in a tuple"):
        Plugins(Adds(Text))


def test_backend_that_lacks_a_method_is_refused_with_its_name() -> None:
    class Unfinished(Registry):
        schemes = ("unfinished",)

    with pytest.raises(micro.ConfigError, match=r"Unfinished.* lacks aclose, .*, services"):
        Plugins(Adds(Unfinished))


@pytest.mark.parametrize("answer", [None, 5, FakeRegistry], ids=["None", "number", "class"])
def test_hook_that_gives_no_list_is_refused(answer: object) -> None:
    class Plugin:
        @hookimpl
        def micro_backends(self) -> object:
            return answer

    with pytest.raises(micro.ConfigError, match="micro_backends"):
        Plugins(Plugin())


def test_hook_that_raises_is_refused_with_its_error() -> None:
    class Plugin:
        @hookimpl
        def micro_backends(self) -> Iterable[type[Backend[Any]]]:
            yield FakeRegistry
            raise LookupError("no backend today")

    with pytest.raises(micro.ConfigError, match=r"micro_backends.*LookupError: no backend today"):
        Plugins(Plugin())


def test_hook_that_is_async_is_refused() -> None:
    class Plugin:
        @hookimpl
        async def micro_backends(self) -> list[type[Backend[Any]]]:
            return [FakeRegistry]

    with pytest.raises(micro.ConfigError, match="micro_backends is async def"):
        Plugins(Plugin())


# -- choosing ----------------------------------------------------------------------------------


def test_unknown_scheme_names_its_source_and_the_nearest() -> None:
    text = r"^--registry: no registry has the scheme 'memroy'; did you mean 'memory'\?$"
    with pytest.raises(micro.ConfigError, match=text):
        Plugins().create(REGISTRY, URL.parse("memroy", source="--registry"))


def test_unknown_scheme_like_no_other_names_all_that_are_known(site: Site) -> None:
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

async def main():
    async with micro.Service("web", registry="memory", transport="memory"):
        pass

import asyncio
asyncio.run(main())
print(*sys.modules)"""
    shown = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=True
    )
    loaded = shown.stdout.split()
    assert "micro.backends.memory" in loaded
    assert not {"importlib.metadata", "pluggy", "micro.backends.mdns"} & set(loaded)


def test_import_micro_loads_neither_the_search_for_plugins_nor_pluggy() -> None:
    program = "import sys, micro; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, check=True
    )
    assert not {"importlib.metadata", "pluggy", "micro.hookspecs"} & set(shown.stdout.split())


# -- installed distributions -------------------------------------------------------------------


def module(*classes: str, head: str = "") -> str:
    """The text of a plugin's module: a class for each ``NameKind scheme scheme``."""
    lines = [head, "from micro.backends.memory import MemoryRegistry, MemoryTransport"]
    lines += ["from micro.hookspecs import hookimpl"]
    names = []
    for text in classes:
        name, *schemes = text.split()
        base = "MemoryRegistry" if name.endswith("Registry") else "MemoryTransport"
        lines += [f"class {name}({base}):", f"    schemes = {tuple(schemes)}"]
        names.append(name)
    lines += ["@hookimpl", "def micro_backends():", f"    return [{', '.join(names)}]"]
    return "\n".join(lines)


def install_x(site: Site, text: str, *schemes: str, **options: Any) -> None:
    """Install micro-plugin-x 1.0, with ``text`` as its module, for ``schemes`` (x by default)."""
    site.install(
        "micro-plugin-x",
        backends=dict.fromkeys(schemes or ("x",), "micro_plugin_x"),
        modules={"micro_plugin_x": text},
        **options,
    )


def create(scheme: str, kind: Any = Registry, plugins: Plugins | None = None) -> Any:
    return (plugins or Plugins()).create(kind, URL.parse(scheme, source="--flag"))


def refused(scheme: str, kind: Any = Registry, plugins: Plugins | None = None) -> str:
    with pytest.raises(micro.ConfigError) as caught:
        create(scheme, kind, plugins)
    return str(caught.value)


def test_installed_plugin_is_found_by_its_scheme(site: Site) -> None:
    install_x(site, module("XRegistry x x+tls", "XTransport x"), "x", "x+tls")
    assert type(create("x")).__name__ == "XRegistry"
    assert type(create("x+tls://host:1")).__name__ == "XRegistry"
    assert type(create("x", Transport)).__name__ == "XTransport"


@pytest.mark.asyncio
async def test_service_runs_on_an_installed_plugin_that_the_environment_names(site: Site) -> None:
    install_x(site, module("XRegistry x"))
    service = micro.Service("helloworld", transport="memory")
    service.handle(Helloworld())
    async with service.opened(Settings(environment={"MICRO_REGISTRY": "x"})):
        registry = await service.client.registered()
        assert type(registry).__name__ == "XRegistry"
        assert await service.call("helloworld", "Helloworld.Call", {"name": "Bob"}) == "Hello Bob"


def test_plugin_is_loaded_by_nothing_but_its_own_scheme(site: Site) -> None:
    install_x(site, "raise RuntimeError('loaded')")
    site.install(
        "micro-plugin-y",
        backends={"y": "micro_plugin_y"},
        modules={"micro_plugin_y": module("YRegistry y")},
    )
    plugins = Plugins()
    assert type(create("memory", plugins=plugins)).__name__ == "MemoryRegistry"
    assert type(create("y", plugins=plugins)).__name__ == "YRegistry"
    assert "'zzz'; known are mdns, memory, x, y" in refused("zzz", plugins=plugins)
    assert "micro_plugin_x" not in sys.modules


def test_module_of_a_plugin_is_loaded_once(site: Site, tmp_path: Path) -> None:
    log = tmp_path / "log"
    head = f"with open({str(log)!r}, 'a') as log: log.write('loaded ')"
    install_x(site, module("XRegistry x x+tls", "XTransport x", head=head), "x", "x+tls")
    plugins = Plugins()
    for _ in range(2):
        create("x", Registry, plugins)
        create("x+tls", Registry, plugins)
        create("x", Transport, plugins)
        sys.modules.pop("micro_plugin_x", None)
    assert log.read_text() == "loaded "


def test_objects_are_asked_before_installed_plugins(site: Site) -> None:
    install_x(site, "raise RuntimeError('loaded')", "fake", "mine")
    assert type(create("fake", plugins=Plugins(Adds(FakeRegistry)))) is FakeRegistry


def test_plugins_of_objects_sees_installed_ones_too(site: Site) -> None:
    install_x(site, module("XRegistry x"))
    plugins = Plugins(Adds(FakeRegistry))
    assert type(create("x", plugins=plugins)).__name__ == "XRegistry"


def test_embedded_scheme_is_not_looked_up(site: Site) -> None:
    install_x(site, "raise RuntimeError('loaded')", "memory")
    assert type(create("memory")).__name__ == "MemoryRegistry"


def test_two_distributions_for_one_scheme_are_refused_unloaded_and_both_are_named(
    site: Site,
) -> None:
    install_x(site, "raise RuntimeError('loaded')")
    site.install(
        "another-x",
        version="2.1",
        backends={"x": "another_x"},
        modules={"another_x": "raise RuntimeError('loaded')"},
    )
    text = refused("x")
    assert text.startswith("--flag: scheme 'x' of ")
    assert "micro-plugin-x 1.0" in text
    assert "another-x 2.1" in text
    assert text.endswith("; uninstall one of them")
    assert not {"micro_plugin_x", "another_x"} & set(sys.modules)


def test_distribution_that_is_there_twice_is_no_rival_of_itself(site: Site, tmp_path: Path) -> None:
    install_x(site, module("XRegistry x"))
    second = site.also(tmp_path / "second")
    install_x(site, module("XRegistry x"), folder=second, version="0.9")
    assert type(create("x")).__name__ == "XRegistry"


NO_HOOK = "it has no hook micro_backends; mark one with micro.hookspecs.hookimpl"
MISSPELT = module("XRegistry x").replace("micro_backends", "micro_backend")
UNMARKED = module("XRegistry x").replace("@hookimpl", "")
GIVES = module("XRegistry x").replace


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("def broken(", "SyntaxError"),
        ("raise SystemExit('library is too old')", "SystemExit: library is too old"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("", NO_HOOK),
        (UNMARKED, NO_HOOK),
        (MISSPELT, "unknown hook 'micro_backend'"),
        (GIVES("backends():", "backends(service):"), "service"),
        (GIVES("return [XRegistry]", "return None"), "micro_backends gave no list: TypeError"),
        (GIVES("return [XRegistry]", "return XRegistry"), "micro_backends gave no list: TypeErr"),
        (GIVES("return [XRegistry]", "1/0"), "micro_backends gave no list: ZeroDivisionError"),
        (GIVES("[XRegistry]", "[XRegistry, 5]"), "5 is neither a Registry nor a Transport"),
        (GIVES("def micro", "async def micro"), "micro_backends is async def"),
        (module("XRegistry y"), "micro_backends gave no backend with the scheme 'x'"),
        (module("XRegistry x", "YRegistry x"), "scheme 'x' is claimed by both"),
    ],
)
def test_broken_plugin_is_named_with_its_cause_and_hurts_no_other(
    site: Site, text: str, cause: str
) -> None:
    install_x(site, text)
    site.install(
        "micro-plugin-y",
        backends={"y": "micro_plugin_y"},
        modules={"micro_plugin_y": module("YRegistry y")},
    )
    plugins = Plugins()
    told = refused("x", plugins=plugins)
    start = "--flag: scheme 'x' of micro-plugin-x 1.0 (module micro_plugin_x): "
    assert told.startswith(start)
    assert cause in told
    assert told.endswith("; mend it, or remove it: pip uninstall micro-plugin-x")
    assert "\n" not in told
    assert type(create("y", plugins=plugins)).__name__ == "YRegistry"
    assert type(create("memory", plugins=plugins)).__name__ == "MemoryRegistry"


def test_error_of_a_broken_plugin_has_its_cause(site: Site) -> None:
    install_x(site, "import no_such_library")
    with pytest.raises(micro.ConfigError) as caught:
        create("x")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_one_bad_scheme_of_a_plugin_does_not_hurt_its_others(site: Site) -> None:
    install_x(site, module("XRegistry x"), "x", "x+tls")
    assert "no backend with the scheme 'x+tls'" in refused("x+tls")
    assert type(create("x")).__name__ == "XRegistry"


def test_installed_plugin_for_an_embedded_scheme_is_refused_when_it_is_loaded(site: Site) -> None:
    install_x(site, module("XRegistry http", "XTransport http"), "http")
    told = refused("http")
    assert "'http' is claimed by both" in told
    assert "micro.backends.http:HTTPTransport" in told


def test_installed_plugin_may_add_a_kind_to_an_embedded_scheme(site: Site) -> None:
    install_x(site, module("XRegistry http"), "http")
    assert type(create("http")).__name__ == "XRegistry"
    assert type(create("http", Transport)).__name__ == "HTTPTransport"


def test_scheme_that_is_installed_for_another_kind_says_so(site: Site) -> None:
    install_x(site, module("XRegistry x"))
    assert refused("x", Transport) == (
        "--flag: no transport has the scheme 'x': micro-plugin-x 1.0 has no transport; "
        "known are http, memory, tcp"
    )


def test_unknown_scheme_names_the_nearest_installed_one(site: Site) -> None:
    install_x(site, "", "zookeeper")
    told = refused("zookeper")
    assert told == "--flag: no registry has the scheme 'zookeper'; did you mean 'zookeeper'?"


TO_GET = (
    "comes with micro-plugin-etcd, which is not installed; "
    "from a clone of micro's repository: pip install ./plugins/etcd"
)


def test_scheme_of_a_plugin_that_is_not_installed_says_how_to_get_it(site: Site) -> None:
    assert refused("etcd://h:1") == f"--flag: the scheme 'etcd' {TO_GET}"


def test_near_miss_of_a_scheme_that_is_not_installed_says_how_to_get_it(site: Site) -> None:
    assert refused("etdc://h:1") == (
        f"--flag: no registry has the scheme 'etdc'; did you mean 'etcd'? It {TO_GET}"
    )


def test_near_miss_of_a_scheme_that_is_installed_says_only_its_name(site: Site) -> None:
    install_x(site, "", "etcd")
    told = refused("etdc://h:1")
    assert told == "--flag: no registry has the scheme 'etdc'; did you mean 'etcd'?"


def test_plugin_is_not_offered_for_a_kind_that_it_does_not_have(site: Site) -> None:
    told = refused("etcd://h:1", Transport)
    assert told == "--flag: no transport has the scheme 'etcd'; known are http, memory, tcp"
