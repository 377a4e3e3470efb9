"""Which backends and extensions there are, and loading the one that is asked for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from micro.backend import Backend, Connections
from micro.errors import ConfigError
from micro.installed import Entry, Installed
from micro.registry import Registry
from micro.transport import Transport
from micro.url import URL, suggestion

if TYPE_CHECKING:
    from pluggy import HookCaller, HookRelay

    from micro.service import Service

B = TypeVar("B", bound=Backend[Any])
Kind = type[Backend[Any]]

KINDS: tuple[Kind, ...] = (Registry, Transport)

#: The embedded defaults: (kind, scheme) -> where the class is.
_BUILT_IN: dict[tuple[Kind, str], str] = {
    (Registry, "memory"): "micro.backends.memory:MemoryRegistry",
    (Registry, "mdns"): "micro.backends.mdns:MDNSRegistry",
    (Transport, "memory"): "micro.backends.memory:MemoryTransport",
    (Transport, "http"): "micro.backends.http:HTTPTransport",
    (Transport, "tcp"): "micro.backends.tcp:TCPTransport",
}
#: What plugins of this repository offer, for those who have not installed them.
_KNOWN: dict[tuple[Kind, str], str] = {
    (Registry, "consul"): "micro-plugin-consul",
    (Registry, "etcd"): "micro-plugin-etcd",
    (Registry, "nats"): "micro-plugin-nats",
    (Registry, "nats-kv"): "micro-plugin-nats",
}


class Plugins:
    """The backends and extensions that a service can choose from.

    A backend is looked for among those of ``plugins``, then the embedded ones, then those of
    installed distributions, of which only the one that is asked for is loaded, once. ``plugins``
    are modules, or objects in a test, with the hook ``micro_backends`` of ``micro.hookspecs``.
    Services that share one ``Plugins`` share what lives at ``memory://name``.

    Raises:
        ConfigError: one of ``plugins`` is none, or two backends of one kind claim one scheme.
    """

    def __init__(self, *plugins: object) -> None:
        #: What installed distributions offer; nothing of it is loaded.
        self.installed: Installed = Installed()
        self._given: dict[tuple[Kind, str], Kind] = {}
        self._loaded: dict[str, HookRelay] = {}
        self._pool: dict[Hashable, Any] = {}
        for plugin in plugins:
            try:
                self._add(plugin)
            except ConfigError as exc:
                raise ConfigError(f"plugin {plugin!r}: {exc}") from exc.__cause__

    def connections(self) -> Connections:
        """A new set of shared clients, for one service."""
        return Connections(shared=Connections(self._pool))

    def create(self, kind: type[B], url: URL) -> B:
        """The backend of ``kind`` that ``url`` selects, made and not yet connected.

        Raises:
            ConfigError: no backend has that scheme, with those that do and how to install one; or
                its plugin cannot be used, with the reason. The text begins with ``url.source``.
        """
        key = (kind, url.scheme)
        found = self._given.get(key) or _embedded(key) or self._find(kind, url)
        made = found(url)
        assert isinstance(made, kind)
        return made

    def schemes(self, kind: Kind) -> tuple[str, ...]:
        """The schemes of ``kind`` that are embedded or were given, sorted.

        Those of installed distributions are in ``installed``: only loading one tells its kind.
        """
        keys = [*_BUILT_IN, *self._given]
        return tuple(sorted(scheme for base, scheme in keys if base is kind))

    def configure(self, service: Service, extension: str, *, source: str) -> None:
        """Let an installed extension add to ``service``; ``source`` says who named it.

        Raises:
            ConfigError: there is none of that name, or it cannot be used, or it failed.
        """
        entry = self.installed.find("extension", extension)
        if entry is None:
            names = self.installed.names("extension")
            near = _nearest(extension, names)
            hint = f"; did you mean {near!r}?" if near else ""
            there = f"installed: {', '.join(names) or 'none'}"
            raise ConfigError(f"{source}: no extension has the name {extension!r} ({there}){hint}")
        with blaming(entry, source):
            _run(self.extension(entry), service)

    # What installed distributions offer, loaded. The errors tell only what is wrong: `blaming` adds
    # whose it is and who asked for it.

    def backends(self, entry: Entry) -> dict[Kind, Kind]:
        """The backends behind an installed scheme, by their kind.

        Raises:
            ConfigError: they cannot be loaded, are not what they should be, or are claimed twice.
        """
        claimed: dict[tuple[Kind, str], Kind] = {}
        for backend in _listed(self._hook(entry, "micro_backends")):
            if entry.name in _checked(backend).schemes:
                _claim(claimed, backend, entry.name)
        if not claimed:
            raise ConfigError(f"micro_backends gave no backend with the scheme {entry.name!r}")
        return {kind: backend for (kind, _), backend in claimed.items()}

    def commands(self, entry: Entry) -> list[Any]:
        """What the hook behind an installed command gives; raises as ``backends`` does."""
        return _listed(self._hook(entry, "micro_commands"))

    def extension(self, entry: Entry) -> HookCaller:
        """The hook behind an installed extension; raises as ``backends`` does."""
        return self._hook(entry, "micro_configure")

    def _hook(self, entry: Entry, name: str) -> HookCaller:
        if entry.rivals:
            raise ConfigError(f"it is claimed by {' and '.join(entry.rivals)} too")
        if entry.module not in self._loaded:
            try:
                module = entry.load()
            except (Exception, SystemExit) as exc:  # a plugin must not hurt who does not want it
                raise ConfigError(f"it cannot be imported: {_told(exc)}") from exc
            self._loaded[entry.module] = _hooks(module)
        return _implemented(self._loaded[entry.module], name)

    def _add(self, plugin: object) -> None:
        for backend in _listed(_implemented(_hooks(plugin), "micro_backends")):
            for scheme in _checked(backend).schemes:
                _claim(self._given, backend, scheme)

    def _find(self, kind: Kind, url: URL) -> Kind:
        entry = self.installed.find("scheme", url.scheme)
        if entry is None:
            raise self._unknown(kind, url)
        with blaming(entry, url.source):
            backends = self.backends(entry)
        if kind not in backends:
            word = kind.__name__.lower()
            raise ConfigError(
                f"{url.source}: no {word} has the scheme {url.scheme!r}: "
                f"{entry.owner} has no {word}; known are {', '.join(self.schemes(kind))}"
            )
        return backends[kind]

    def _unknown(self, kind: Kind, url: URL) -> ConfigError:
        known = {*self.schemes(kind), *self.installed.names("scheme")}
        elsewhere = {scheme: where for (base, scheme), where in _KNOWN.items() if base is kind}
        near = _nearest(url.scheme, known | elsewhere.keys())
        what = f"{url.source}: no {kind.__name__.lower()} has the scheme {url.scheme!r}"
        if near is None or near in known:
            return ConfigError(what + suggestion(url.scheme, tuple(known)))
        if near == url.scheme:
            return ConfigError(f"{url.source}: the scheme {near!r} {_to_get(elsewhere[near])}")
        return ConfigError(f"{what}; did you mean {near!r}? It {_to_get(elsewhere[near])}")


@contextmanager
def blaming(entry: Entry, source: str) -> Iterator[None]:
    """A ConfigError in it says also who asked for ``entry``, whose it is, and what to do."""
    try:
        yield
    except ConfigError as exc:
        remedy = f"mend it, or remove it: pip uninstall {entry.distribution}"
        raise ConfigError(
            f"{source}: {entry.what} {entry.name!r} of {entry.owner} (module {entry.module}): "
            f"{exc}; {'uninstall one of them' if entry.rivals else remedy}"
        ) from exc.__cause__


def _embedded(key: tuple[Kind, str]) -> Kind | None:
    if key not in _BUILT_IN:
        return None
    module, _, name = _BUILT_IN[key].partition(":")
    backend: Kind = getattr(import_module(module), name)
    return backend


def _hooks(plugin: object) -> HookRelay:
    """The hooks of one plugin, which are as the specification says."""
    from inspect import iscoroutinefunction

    import pluggy

    from micro import hookspecs

    manager = pluggy.PluginManager("micro")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError, TypeError) as exc:
        raise ConfigError(_told(exc)) from exc
    for hook in manager.get_hookcallers(plugin) or ():
        if any(iscoroutinefunction(one.function) for one in hook.get_hookimpls()):
            raise ConfigError(f"{hook.name} is async def; hooks are plain functions")
    return manager.hook


def _implemented(hooks: HookRelay, name: str) -> HookCaller:
    hook: HookCaller = getattr(hooks, name)
    if not hook.get_hookimpls():
        raise ConfigError(f"it has no hook {name}; mark one with micro.hookspecs.hookimpl")
    return hook


def _listed(hook: HookCaller) -> list[Any]:
    found: list[Any] = []
    try:
        answers: list[Any] = hook()
        for answer in answers or [None]:  # pluggy leaves out who answers None
            found += answer
    except (Exception, SystemExit) as exc:  # it is the code of others; the error must name them
        raise ConfigError(f"{hook.name} gave no list: {_told(exc)}") from exc
    return found


def _run(hook: HookCaller, service: Service) -> None:
    try:
        answers = hook(service=service)
    except (Exception, SystemExit) as exc:  # it is the code of others; the error must name them
        raise ConfigError(f"{hook.name} raised {_told(exc)}") from exc
    if answers:
        raise ConfigError(f"{hook.name} gave {answers[0]!r}; it has to be a plain function")


def _checked(backend: Any) -> Kind:
    if not isinstance(backend, type) or not issubclass(backend, KINDS):
        raise ConfigError(f"{backend!r} is neither a Registry nor a Transport")
    schemes = getattr(backend, "schemes", None)
    if not schemes or not isinstance(schemes, tuple):
        raise ConfigError(f"{backend!r} names no schemes in a tuple")
    lacking: frozenset[str] = backend.__abstractmethods__
    if lacking:
        raise ConfigError(f"{backend!r} lacks {', '.join(sorted(lacking))}")
    return backend


def _claim(claimed: dict[tuple[Kind, str], Kind], backend: Kind, scheme: str) -> None:
    kind = next(kind for kind in KINDS if issubclass(backend, kind))
    other = claimed.get((kind, scheme)) or _BUILT_IN.get((kind, scheme))
    if other is not None:
        raise ConfigError(f"scheme {scheme!r} is claimed by both {backend!r} and {other!r}")
    claimed[kind, scheme] = backend


def _nearest(word: str, known: Iterable[str]) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return near[0] if near else None


def _to_get(distribution: str) -> str:
    folder = distribution.removeprefix("micro-plugin-")
    return (
        f"comes with {distribution}, which is not installed; "
        f"from a clone of micro's repository: pip install ./plugins/{folder}"
    )


def _told(exc: BaseException) -> str:
    """An error of others in one line."""
    return " ".join(f"{type(exc).__name__}: {exc}".split())
