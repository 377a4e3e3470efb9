"""How a backend is named and set: ``scheme://user:secret@a:1,b:2/namespace?option=value``."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from micro.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_SHOWABLE = re.compile(r"[\w+.-]{0,40}")  # no secret: that stands behind a colon
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h)?")

_SIZE = re.compile(r"([0-9]{1,12})\s*(B|kB|KiB|MB|MiB|GB|GiB)?")
_SIZES = {"B": 1, "kB": 10**3, "KiB": 2**10, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}


def seconds(text: str, what: str) -> float:
    """The seconds that ``text`` means: ``5s``, ``1m``, ``250ms``, ``1h``, or a plain number.

    ``what`` names the setting in the ConfigError that anything else gets.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what}: {text!r} is not a duration; write 5s, 1m, 250ms or seconds")
    return float(match[1]) * _UNITS[match[2] or "s"]


def size(text: str, what: str) -> int:
    """The bytes that ``text`` means: ``16MiB``, ``64KiB``, ``1GiB``, ``500kB``, or a plain number.

    ``what`` names the setting in the ConfigError that anything else gets.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what}: {text!r} is not a size; write 16MiB, 64KiB or bytes")
    return int(match[1]) * _SIZES[match[2] or "B"]


def suggestion(word: str, known: tuple[str, ...]) -> str:
    """The end of an error text: the nearest known word, or all of them."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(sorted(known))}" if known else "; it takes none"


def read_secret(path: str, source: str) -> str:
    """What the file of an option like ``password_file`` holds, without the end of its last line.

    Raises:
        ConfigError: it cannot be read; the text names ``source`` and nothing of what it holds.
    """
    from pathlib import Path

    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{source}: cannot read the secret in {path}: {why}") from None


class URL(msgspec.Struct, frozen=True, kw_only=True):
    """The address and the options of a backend.

    ``hosts`` are kept in order, ``path`` is the namespace without its slashes, ``source`` says
    where the setting came from (``--registry``, ``MICRO_REGISTRY``, ``code``), for errors. The
    password is in no text of it.

    >>> URL.parse("etcd://user:secret@a:2379,b:2379/prod?timeout=2")
    etcd://user:***@a:2379,b:2379/prod?timeout=2
    """

    scheme: str
    hosts: tuple[str, ...] = ()
    path: str = ""
    query: tuple[tuple[str, str], ...] = ()
    username: str = ""
    password: str = ""
    source: str = "code"

    @classmethod
    def parse(cls, text: str, *, source: str = "code") -> URL:
        """Read a URL; a bare word is that scheme with its defaults.

        Raises:
            ConfigError: it is not a URL; the text of the error names ``source`` and no secret.
        """
        from urllib.parse import parse_qsl, unquote

        scheme, separator, rest = text.strip().partition("://")
        if not separator:
            scheme, _, query = scheme.partition("?")
            rest = f"?{query}"
        if not _SCHEME.fullmatch(scheme):
            shown = repr(scheme) if _SHOWABLE.fullmatch(scheme) else "the text"
            raise ConfigError(
                f"{source}: {shown} is not the scheme of a backend; "
                "write it as memory, mdns or scheme://host:port"
            )
        rest, _, query = rest.partition("?")
        authority, _, path = rest.partition("/")
        if "@" in path + query:
            raise ConfigError(
                f"{source}: {scheme}: a / or ? stands before the @ of the login; "
                "write it as %2F or %3F in a name or password, and an @ elsewhere as %40"
            )
        login, _, hosts = authority.rpartition("@")
        username, _, password = login.partition(":")
        return cls(
            scheme=scheme,
            hosts=tuple(host for host in hosts.split(",") if host),
            path=unquote(path).strip("/"),
            query=tuple(parse_qsl(query, keep_blank_values=True)),
            username=unquote(username),
            password=unquote(password),
            source=source,
        )

    def options(self, shape: type[S]) -> S:
        """The query as ``shape``: numbers, booleans and durations (a float field) are converted.

        Raises:
            ConfigError: an option is unknown or its value does not fit; names ``source``.
        """
        fields = {field.name: field for field in msgspec.structs.fields(shape)}
        values: dict[str, Any] = {}
        for name, text in self.query:
            known = fields.get(name)
            where = f"{self.source}: {self.scheme}: option {name!r}"
            if known is None:
                hint = suggestion(name, tuple(fields))
                raise ConfigError(f"{self.source}: {self.scheme}: unknown option {name!r}{hint}")
            values[name] = seconds(text, where) if known.type is float else text
        try:
            return msgspec.convert(values, shape, strict=False)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"{self.source}: {self.scheme}: {exc}") from None

    def __str__(self) -> str:
        if not (self.hosts or self.path or self.query or self.username or self.password):
            return self.scheme
        from urllib.parse import quote, urlencode

        login = quote(self.username, safe="") + (":***" if self.password else "")
        authority = (f"{login}@" if login else "") + ",".join(self.hosts)
        path = f"/{quote(self.path)}" if self.path else ""
        query = f"?{urlencode(self.query, quote_via=quote)}" if self.query else ""
        return f"{self.scheme}://{authority}{path}{query}"

    __repr__ = __str__
