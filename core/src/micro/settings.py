"""Settings: the only reader of the environment and of the command line.

A value in code is weakest, then the environment (``MICRO_REGISTRY``), then a flag (``--registry``).
The names are Go Micro's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from micro.errors import ConfigError
from micro.url import URL, seconds, size, suggestion

#: Tells a worker its place; not a setting.
_PLACE = "MICRO_WORKER"
_FALSE = ("0", "false", "no", "off", "")
_TRUE = ("1", "true", "yes", "on")


class Setting(msgspec.Struct, frozen=True):
    """One setting: ``name`` is the flag's and, after ``MICRO_``, the variable's."""

    name: str
    help: str
    is_switch: bool = False
    is_repeated: bool = False


#: Every setting that a service has, as ``--help`` shows them.
SETTINGS = (
    Setting(
        "registry", "where services are found: mdns, memory, or scheme://host:port?option=value"
    ),
    Setting("registry_address", "hosts that stand for those of --registry, comma separated"),
    Setting("transport", "how calls travel: tcp, http (default both, on one port) or memory"),
    Setting("server_name", "the service's name"),
    Setting("server_version", "the service's version; default latest"),
    Setting("server_id", "this node's id; default a new uuid"),
    Setting("server_address", "where to listen, host:port; default 127.0.0.1:0, a free port"),
    Setting("server_advertise", "the host:port that others reach it at; default where it listens"),
    Setting("server_metadata", "key=value for the registry; may be repeated", is_repeated=True),
    Setting("server_insecure", "listen beyond this machine without TLS", is_switch=True),
    Setting("tls_cert_file", "the service's certificate, PEM; `micro cert` makes one"),
    Setting("tls_key_file", "the key of that certificate, PEM"),
    Setting("tls_ca_file", "whose certificates others need, PEM; default those of the system"),
    Setting("tls_anonymous", "also take callers without a certificate", is_switch=True),
    Setting("register_ttl", "how long the registry keeps a silent node; default 30s"),
    Setting("register_interval", "how often to register again; default a third of the ttl"),
    Setting("client_request_timeout", "how long a call may take; default 5s"),
    Setting("client_retries", "how often a call may be repeated; default 2"),
    Setting("max_message_size", "the most that a message may have, as 16MiB; default 4MiB"),
    Setting("workers", "how many processes, each a node with a port of its own; default 1"),
    Setting("tune_gc", "set the garbage collector for serving: true (default) or false"),
    Setting("extensions", "extensions to load, comma separated; may be repeated", is_repeated=True),
    Setting("log_level", "debug, info, warning or error; default info"),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


class Given(msgspec.Struct, frozen=True):
    """A value and its source: ``--registry``, ``MICRO_REGISTRY``, ``code`` or ``default``."""

    text: str
    source: str
    rank: int


class Settings:
    """What the environment and the command line say.

    ``arguments`` are flags; None means those of this process. ``environment`` None means the
    process's own.

    ``colour`` is False when NO_COLOR is set (https://no-color.org). ``authorities`` is the file of
    authorities to trust that SSL_CERT_FILE names for OpenSSL; empty where it names none.

    Raises:
        ConfigError: a flag is unknown or has no value; the text names the nearest one.
    """

    def __init__(
        self, arguments: Sequence[str] | None = (), environment: Mapping[str, str] | None = None
    ) -> None:
        arguments = sys.argv[1:] if arguments is None else arguments
        environment = os.environ if environment is None else environment
        self.wants_help: bool = False
        self.colour: bool = not environment.get("NO_COLOR")
        self.authorities: str = environment.get("SSL_CERT_FILE", "")
        self._given: dict[str, list[Given]] = {}
        for setting in SETTINGS:
            variable = f"MICRO_{setting.name.upper()}"
            if environment.get(variable):
                self._add(setting.name, Given(environment[variable], variable, 1))
        self._read_arguments(list(arguments))

    def text(self, name: str, code: str | None, default: str = "") -> Given:
        """The strongest value of a setting; ``code`` is what the program says."""
        weakest = Given(default, "default", -1) if code is None else Given(code, "code", 0)
        last_first = [*reversed(self._given.get(name, ())), weakest]
        return max(last_first, key=lambda given: given.rank)

    def url(self, name: str, code: str | None, default: str) -> URL:
        """The URL of a kind of backend; ``<name>_address`` replaces its hosts.

        The address counts only when it comes from the same or a stronger place than the URL: a
        variable never bends a flag.

        Raises:
            ConfigError: not a URL.
        """
        given = self.text(name, code, default)
        url = URL.parse(given.text, source=given.source)
        address = self.text(f"{name}_address", None)
        if address.text and address.rank >= given.rank:
            hosts = tuple(host.strip() for host in address.text.split(",") if host.strip())
            return msgspec.structs.replace(url, hosts=hosts)
        return url

    def urls(self, name: str, code: str | None, default: str) -> list[URL]:
        """The URLs of backends of a kind that is used together; bare schemes, comma separated.

        Raises:
            ConfigError: one of them is not a URL.
        """
        given = self.text(name, code, default)
        texts = [given.text] if "://" in given.text else given.text.split(",")
        return [URL.parse(text.strip(), source=given.source) for text in texts]

    def size(self, name: str, code: int) -> int:
        """Bytes, more than 0; a text may have a unit, as ``16MiB``.

        Raises:
            ConfigError: not a size, or 0.
        """
        given = self.text(name, None)
        value = size(given.text, f"{given.source}: {name}") if given.rank > 0 else code
        if value <= 0:
            raise ConfigError(f"{given.source}: {name}: {value} is not more than 0")
        return value

    def number(self, name: str, code: int) -> int:
        """A whole number, 0 or more.

        Raises:
            ConfigError: not a number, or less than 0.
        """
        given = self.text(name, None)
        if given.rank <= 0:
            return code
        if not given.text.isascii() or not given.text.isdigit():
            raise ConfigError(f"{given.source}: {name}: {given.text!r} is no whole number >= 0")
        return int(given.text[:9])

    def duration(self, name: str, code: float | None, default: float) -> float:
        """Seconds, more than 0.

        Raises:
            ConfigError: not a duration, or 0.
        """
        given = self.text(name, None)
        if given.rank > 0:
            value = seconds(given.text, f"{given.source}: {name}")
        else:
            value = default if code is None else code
        if not 0 < value < float("inf"):
            source = given.source if given.rank > 0 else "code"
            raise ConfigError(f"{source}: {name}: {value:g} is not more than 0")
        return value

    def switch(self, name: str, *, default: bool = False) -> bool:
        """Whether it is turned on.

        Raises:
            ConfigError: neither yes nor no.
        """
        given = self.text(name, None)
        if given.text.lower() not in _TRUE + _FALSE:
            raise ConfigError(f"{given.source}: {name}: write true or false, not {given.text!r}")
        return given.text.lower() in _TRUE if given.text else default

    def pairs(self, name: str, code: Mapping[str, str]) -> dict[str, str]:
        """``key=value`` pairs, the stronger place last, so that it wins key by key.

        Raises:
            ConfigError: not key=value.
        """
        merged = dict(code)
        for given in sorted(self._given.get(name, ()), key=lambda given: given.rank):
            for pair in given.text.split(","):
                key, equals, value = pair.partition("=")
                if not equals or not key.strip():
                    raise ConfigError(f"{given.source}: {name}: {pair!r} is not key=value")
                merged[key.strip()] = value.strip()
        return merged

    def names(self, name: str, code: Iterable[str]) -> dict[str, str]:
        """Names from all places, each once, with the weakest source that has it.

        The program's own are first, then those of the environment, then those of flags.
        """
        merged = dict.fromkeys(code, "code")
        for given in sorted(self._given.get(name, ()), key=lambda given: given.rank):
            for word in given.text.split(","):
                if word.strip():
                    merged.setdefault(word.strip(), given.source)
        return merged

    def _add(self, name: str, given: Given) -> None:
        self._given.setdefault(name, []).append(given)

    def _read_arguments(self, arguments: list[str]) -> None:
        while arguments:
            word = arguments.pop(0)
            if word in ("-h", "--help"):
                self.wants_help = True
                continue
            flag, equals, value = word.partition("=")
            setting = _BY_NAME.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None
            if setting is None:
                flags = tuple(f"--{setting.name}" for setting in SETTINGS)
                hint = suggestion(flag.replace("-", "_").replace("__", "--", 1), flags)
                raise ConfigError(f"unknown argument {flag!r}{hint}")
            if not equals:
                value = self._value(setting, flag, arguments)
            self._add(setting.name, Given(value, f"--{setting.name}", 2))

    def _value(self, setting: Setting, flag: str, arguments: list[str]) -> str:
        if setting.is_switch:
            return "true"
        if not arguments or arguments[0].startswith("--"):
            raise ConfigError(f"{flag} needs a value: {setting.help}")
        return arguments.pop(0)


class Place(msgspec.Struct, frozen=True):
    """Which worker a process is, the first is 1; ``line`` is a socket to its supervisor."""

    number: int
    line: int


def taken_place() -> Place | None:
    """Which worker this process is; None if it is none.

    Told once, so that no process that this one starts takes the place for its own.

    Raises:
        ConfigError: the variable was set by hand.
    """
    text = os.environ.pop(_PLACE, "")
    if not text:
        return None
    number, _, line = text.partition("/")
    if not (number.isdecimal() and line.isdecimal()):
        raise ConfigError(f"{_PLACE}: {text!r} is not for people to set; use MICRO_WORKERS=N")
    return Place(int(number), int(line))


def with_place(place: Place) -> dict[str, str]:
    """The environment of a process that has this place."""
    return {**os.environ, _PLACE: f"{place.number}/{place.line}"}


def environment_of_tests(**variables: str) -> dict[str, str]:
    """The environment of a run of tests that follows no settings of other tests."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**ours, **variables}


def usage() -> str:
    """What ``--help`` prints."""
    lines = [
        f"usage: {sys.argv[0]} [--FLAG VALUE ...]",
        "",
        "Each flag is also a variable: MICRO_<FLAG>.",
        "",
    ]
    width = max(len(setting.name) for setting in SETTINGS) + 4
    lines += [f"  {'--' + setting.name:<{width}}{setting.help}" for setting in SETTINGS]
    return "\n".join(lines)
