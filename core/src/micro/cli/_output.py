"""What the command prints: tables and JSON on stdout, one line an error on stderr.

Names and texts come from other machines, so nothing of them reaches a terminal unescaped.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import click
import msgspec

from micro.errors import (
    ConfigError,
    DeadlineExceeded,
    DecodeError,
    InvalidArgument,
    MicroError,
    NotFound,
    Unavailable,
)
from micro.logs import printable
from micro.registry import Endpoint, Node, Value

_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(:?)|[-\w.+]+')
_UNSAFE = re.compile(r"[^\n\x20-\x7e]")


class Exit(IntEnum):
    """The status that the command ends with."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FOUND = 3
    UNAVAILABLE = 4
    DEADLINE_EXCEEDED = 5
    INTERRUPTED = 130


_MEANINGS = {
    Exit.OK: "done",
    Exit.ERROR: "the service answered with an error",
    Exit.USAGE: "an argument or a setting is wrong",
    Exit.NOT_FOUND: "no such service, or endpoint, or what the service was asked for",
    Exit.UNAVAILABLE: "the service, or the registry, cannot be reached",
    Exit.DEADLINE_EXCEEDED: "no answer in time",
    Exit.INTERRUPTED: "interrupted",
}
#: The end of ``micro --help``.
EPILOG = "\b\nExit status:\n" + "\n".join(f"  {code:<4}{text}" for code, text in _MEANINGS.items())


# -- errors ---------------------------------------------------------------------------------------


def exit_of(error: MicroError) -> Exit:
    """The exit status of an error."""
    match error:
        case ConfigError():
            return Exit.USAGE
        case InvalidArgument(remote=False) if not isinstance(error, DecodeError):
            return Exit.USAGE
        case NotFound():
            return Exit.NOT_FOUND
        case Unavailable():
            return Exit.UNAVAILABLE
        case DeadlineExceeded():
            return Exit.DEADLINE_EXCEEDED
        case _:
            return Exit.ERROR


def show_error(error: MicroError, *, as_json: bool) -> Exit:
    """Print one line, ``error: <kind>: <text>``; the status to exit with."""
    kind = type(error).__name__
    if as_json:
        more = {"retry_after": error.retry_after, "details": error.details}
        told = {name: value for name, value in more.items() if value}
        _error_json(kind, error.status, error.detail, error.id, **told)
    else:
        click.echo(f"error: {kind}: {printable(str(error))}", err=True)
    return exit_of(error)


def show_usage_error(error: click.ClickException, *, as_json: bool) -> Exit:
    """As ``show_error``, for arguments that are wrong."""
    text = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text = f"{text}; see {error.ctx.command_path} --help"
    if as_json:
        _error_json("UsageError", InvalidArgument.status, text, "")
    else:
        click.echo(f"error: UsageError: {printable(text)}", err=True)
    return Exit.USAGE


def _error_json(kind: str, code: int, detail: str, id: str, **more: Any) -> None:
    fields = {"kind": kind, "code": code, "detail": detail, "id": id, **more}
    click.echo(_json(fields).encode(), err=True)


# -- text that cannot harm ------------------------------------------------------------------------


def _json(value: Any, *, indent: int | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]


# -- JSON -----------------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """One line of JSON."""
    return _json(value)


def show_json(value: Any) -> None:
    """Print one line of JSON, always in UTF-8."""
    click.echo(_json(value).encode())


def show_reply(value: Any, *, as_json: bool) -> None:
    """As ``show_line``; on a terminal indented when it is long, and no line is added to bytes."""
    if isinstance(value, bytes) and not as_json:
        _show_bytes(value, end=False)
    elif as_json or not sys.stdout.isatty():
        show_json(_plain(value))
    else:
        text = _json(_plain(value))
        if len(text) > shutil.get_terminal_size().columns:
            text = _json(_plain(value), indent=2)
        click.echo(_JSON_TOKEN.sub(_coloured, text))


def show_line(value: Any, *, as_json: bool) -> None:
    """Print a message on one line: JSON, which a terminal shows coloured, or bytes as they are.

    With ``as_json``, bytes are their base64.
    """
    if isinstance(value, bytes) and not as_json:
        _show_bytes(value, end=True)
    elif as_json or not sys.stdout.isatty():
        show_json(_plain(value))
    else:
        click.echo(_JSON_TOKEN.sub(_coloured, _json(_plain(value))))


def _show_bytes(value: bytes, *, end: bool) -> None:
    if sys.stdout.isatty():
        click.echo(printable(value.decode(errors="backslashreplace")))
    else:
        click.echo(value, nl=end)


def _plain(value: Any) -> Any:
    """What JSON has for values that only MessagePack holds, as moments and bytes.

    Raises:
        DecodeError: it has nothing for them.
    """
    try:
        return msgspec.json.decode(msgspec.json.encode(value))
    except (TypeError, ValueError) as exc:
        raise DecodeError(f"the reply cannot be shown as JSON: {exc}") from exc


def _coloured(match: re.Match[str]) -> str:
    string, colon = match[1], match[2]
    if colon:
        return click.style(string, fg="blue") + colon
    return click.style(match[0], fg="green" if string else "yellow")


def services_json(found: Mapping[str, Sequence[Node]]) -> list[dict[str, Any]]:
    """What ``micro services --json`` prints."""
    return [
        {"name": name, "nodes": len(nodes), "versions": _versions(nodes)}
        for name, nodes in found.items()
    ]


def service_json(nodes: Sequence[Node]) -> dict[str, Any]:
    """What ``micro describe --json`` prints; an endpoint says which versions have it."""
    return {
        "name": nodes[0].service,
        "versions": _versions(nodes),
        "endpoints": [
            {**msgspec.to_builtins(endpoint), "versions": versions}
            for endpoint, versions in _endpoints(nodes)
        ],
        "nodes": [
            {
                "id": node.id,
                "address": node.address,
                "version": node.version,
                "metadata": dict(node.metadata),
                "service_metadata": dict(node.service_metadata),
            }
            for node in nodes
        ],
    }


def _versions(nodes: Iterable[Node]) -> list[str]:
    return sorted({node.version for node in nodes})


def _endpoints(nodes: Sequence[Node]) -> list[tuple[Endpoint, list[str]]]:
    """The different endpoints of all nodes, each with the versions that have it."""
    found: list[tuple[Endpoint, list[str]]] = []
    told = [(node.version, endpoint) for node in nodes for endpoint in node.endpoints]
    for version, endpoint in sorted(told, key=lambda pair: pair[0]):
        versions = next((versions for known, versions in found if known == endpoint), None)
        if versions is None:
            found.append((endpoint, [version]))
        elif version not in versions:
            versions.append(version)
    return sorted(found, key=lambda pair: pair[0].name)


# -- tables ---------------------------------------------------------------------------------------


def show_table(
    rows: Sequence[Sequence[str]], *, title: Sequence[str] = (), indent: str = ""
) -> None:
    """Print rows in columns; ``title`` stands above them."""
    table = [[printable(cell) for cell in row] for row in ([title, *rows] if title else rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for number, row in enumerate(table):
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        line = indent + cells.rstrip()
        click.echo(click.style(line, dim=True) if title and not number else line)


def show_services(found: Mapping[str, Sequence[Node]]) -> None:
    """Print a line a service."""
    rows = [[name, str(len(nodes)), ", ".join(_versions(nodes))] for name, nodes in found.items()]
    show_table(rows, title=("SERVICE", "NODES", "VERSIONS"))


def show_service(nodes: Sequence[Node]) -> None:
    """Print a service: its endpoints with their messages, then its nodes."""
    click.echo(click.style(printable(nodes[0].service), bold=True))
    click.echo()
    all_versions = _versions(nodes)
    for endpoint, versions in _endpoints(nodes):
        _show_endpoint(endpoint, () if versions == all_versions else versions)
    rows = [[node.id, node.address, node.version, _pairs(node)] for node in nodes]
    show_table(rows, title=("NODE", "ADDRESS", "VERSION", "METADATA"))


def _show_endpoint(endpoint: Endpoint, versions: Sequence[str]) -> None:
    notes = ["stream"] if endpoint.metadata.get("stream") == "true" else []
    notes += [f"version {', '.join(versions)}"] if versions else []
    title = f"{endpoint.name} ({'; '.join(notes)})" if notes else endpoint.name
    click.echo(click.style(printable(title), bold=True))
    description = endpoint.metadata.get("description")
    if description:
        click.echo(f"  {printable(description)}")
    rows = [*_rows("request", endpoint.request), *_rows("response", endpoint.response)]
    if rows:
        show_table(rows, indent="  ")
    click.echo()


def _rows(word: str, message: Value | None) -> list[list[str]]:
    if message is None:
        return []
    return [[word, message.type], *_fields(message.values, "  ")]


def _fields(values: Iterable[Value], indent: str) -> list[list[str]]:
    rows: list[list[str]] = []
    for value in values:
        rows += [[indent + value.name, value.type], *_fields(value.values, indent + "  ")]
    return rows


def _pairs(node: Node) -> str:
    metadata = {**node.service_metadata, **node.metadata}
    return " ".join(f"{name}={value}" for name, value in sorted(metadata.items()))
