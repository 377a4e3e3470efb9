"""Which backends there are, and making one from its URL."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from importlib import import_module
from typing import Any, TypeVar

from micro.backend import Backend, Connections
from micro.errors import ConfigError
from micro.registry import Registry
from micro.transport import Transport
from micro.url import URL, suggestion

B = TypeVar("B", bound=Backend[Any])

#: The embedded defaults: (kind, scheme) -> where the class is.
_BUILT_IN: dict[tuple[type[Backend[Any]], str], str] = {
    (Registry, "memory"): "micro.backends.memory:MemoryRegistry",
    (Registry, "mdns"): "micro.backends.mdns:MDNSRegistry",
    (Transport, "memory"): "micro.backends.memory:MemoryTransport",
    (Transport, "http"): "micro.backends.http:HTTPTransport",
}


class Plugins:
    """The backends that a service can choose from: the embedded ones, and those of ``plugins``.

    A plugin is anything with the hooks of ``micro.hookspecs``: a module, or an object in a test.
    Services that share one ``Plugins`` share what lives at ``memory://name``.

    Raises:
        ConfigError: a plugin is not one, or two backends of one kind claim one scheme.
    """

    def __init__(self, *plugins: object) -> None:
        self._added: dict[tuple[type[Backend[Any]], str], type[Backend[Any]]] = {}
        self._pool: dict[Hashable, Any] = {}
        if plugins:
            self._add(plugins)

    def connections(self) -> Connections:
        """A new set of shared clients, for one service."""
        return Connections(shared=Connections(self._pool))

    def create(self, kind: type[B], url: URL) -> B:
        """The backend of ``kind`` that ``url`` selects, made and not yet connected.

        Raises:
            ConfigError: no backend has that scheme; names those that do, and ``url.source``.
        """
        word = kind.__name__.lower()
        for key, added in self._added.items():
            if key == (kind, url.scheme) and issubclass(added, kind):
                return added(url)
        where = _BUILT_IN.get((kind, url.scheme))
        if where is None:
            hint = suggestion(url.scheme, self.schemes(kind))
            raise ConfigError(f"{url.source}: no {word} has the scheme {url.scheme!r}{hint}")
        module, _, name = where.partition(":")
        made = getattr(import_module(module), name)(url)
        assert isinstance(made, kind)
        return made

    def schemes(self, kind: type[Backend[Any]]) -> tuple[str, ...]:
        """The schemes that select a backend of ``kind``, sorted."""
        keys = [*_BUILT_IN, *self._added]
        return tuple(sorted(scheme for base, scheme in keys if base is kind))

    def _add(self, plugins: tuple[object, ...]) -> None:
        import pluggy

        from micro import hookspecs

        manager = pluggy.PluginManager("micro")
        manager.add_hookspecs(hookspecs)
        for plugin in plugins:
            try:
                manager.register(plugin)
                manager.check_pending()
            except (pluggy.PluginValidationError, ValueError, TypeError) as exc:
                raise ConfigError(f"plugin {plugin!r}: {exc}") from exc
            if not manager.get_hookcallers(plugin):
                raise ConfigError(
                    f"plugin {plugin!r} has no hook; mark one with micro.hookspecs.hookimpl"
                )
        given = manager.hook.micro_backends()
        if len(given) < len(manager.hook.micro_backends.get_hookimpls()):
            raise ConfigError("plugin: micro_backends gave None, not a list of classes")
        for backends in given:
            if not isinstance(backends, Iterable):
                raise ConfigError(
                    f"plugin: micro_backends gave {backends!r}, not a list of classes"
                )
            for backend in backends:
                self._claim(backend)

    def _claim(self, backend: Any) -> None:
        is_class = isinstance(backend, type)
        kinds = [kind for kind in (Registry, Transport) if is_class and issubclass(backend, kind)]
        if not kinds:
            raise ConfigError(f"plugin: {backend!r} is neither a Registry nor a Transport")
        if not getattr(backend, "schemes", ()):
            raise ConfigError(f"plugin: {backend!r} names no schemes")
        for scheme in backend.schemes:
            key = (kinds[0], scheme)
            other = self._added.get(key) or _BUILT_IN.get(key)
            if other is not None:
                raise ConfigError(f"scheme {scheme!r} is claimed by both {backend!r} and {other!r}")
            self._added[key] = backend
