"""What a call sends: its options, and its messages from arguments, files and standard input."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, TextIO, TypedDict, TypeVar

import click
import msgspec

from micro.codec import codec_for
from micro.errors import ConfigError, DecodeError, UnsupportedContentType
from micro.url import seconds

F = TypeVar("F", bound=Callable[..., Any])

_JSON = "application/json"
_RAW = "application/octet-stream"
_PROTOBUF = "application/protobuf"
_CHUNK = 64 * 1024
#: Most bytes of a line; more than any service takes.
_LINE = 64 * 1024 * 1024


class Way(TypedDict):
    """How a call is made: what the options of ``call_options`` say, as the client takes it."""

    metadata: dict[str, str]
    timeout: float | None
    address: str
    content_type: str


# -- options --------------------------------------------------------------------------------------


def _pairs(_: click.Context, __: click.Parameter, value: Iterable[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in value:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--metadata: {pair!r} is not key=value")
        pairs[name.lower()] = text  # as they travel, so that the last of two counts
    return pairs


def _seconds(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    found = seconds(value, "--timeout")
    if not 0 < found < float("inf"):
        raise ConfigError(f"--timeout: {value!r} is not more than 0")
    return found


def _content_type(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        found = codec_for(value if "/" in value else f"application/{value}").content_type
    except UnsupportedContentType:
        text = f"--content_type: {value!r} is not json, msgpack or octet-stream"
        raise click.UsageError(text) from None
    if found == _PROTOBUF:
        raise click.UsageError(
            "--content_type: no protobuf is made of JSON, as its classes are not here; send json, "
            "which services take for it too, or bytes as they are with octet-stream"
        )
    return found


_TIMEOUT = click.option(
    "--timeout",
    metavar="TIME",
    callback=_seconds,
    help="how long it may take, as 500ms, 5s or 1m",
)
_METADATA = click.option(
    "--metadata",
    "-m",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_pairs,
    help="goes with the call; may be repeated",
)
_OPTIONS = (
    click.option(
        "--content_type",
        metavar="TYPE",
        default="json",
        callback=_content_type,
        help="json, msgpack, or octet-stream for bytes as they are; default json",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT",
        default="",
        help="call the node there, without asking the registry",
    ),
    _TIMEOUT,
    _METADATA,
)


def call_options(function: F) -> F:
    """The options that make a Way."""
    for option in _OPTIONS:
        function = option(function)
    return function


def ask_options(function: F) -> F:
    """Those of the options that concern no message."""
    return _METADATA(_TIMEOUT(function))


# -- one message ----------------------------------------------------------------------------------


def read_message(text: str, content_type: str) -> object:
    """The message that ``text`` is, or that it names: ``-`` for standard input, ``@FILE``.

    Raises:
        click.UsageError: there is no such file, or it is not JSON; says where.
    """
    if text == "-":
        return _message(_stdin().buffer.read(), content_type, "standard input")
    if not text.startswith("@"):
        body = text.encode(errors="surrogateescape")
        return _message(body, content_type, "the JSON argument")
    try:
        return _message(Path(text[1:]).read_bytes(), content_type, text[1:])
    except OSError as exc:
        raise click.UsageError(f"cannot read {text[1:]!r}: {exc.strerror}") from exc


def _stdin() -> TextIO:
    if sys.stdin is None:
        raise click.UsageError("there is no standard input to read")
    return sys.stdin


def _message(body: bytes, content_type: str, where: str) -> object:
    """What the client is given to send ``body``: JSON goes as it stands."""
    if content_type == _RAW:
        return body
    try:
        json.loads(body)
        message = codec_for(_JSON).decoder(Any)(body)
    except json.JSONDecodeError as exc:
        place = f"line {exc.lineno}, column {exc.colno}"
        raise click.UsageError(f"{where} is not JSON: {exc.msg} at {place}") from exc
    except (DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise click.UsageError(f"{where} cannot be sent: {exc}") from exc
    return msgspec.Raw(body) if content_type == _JSON else message


# -- a stream of messages -------------------------------------------------------------------------


def read_request(text: str | None, content_type: str) -> object:
    """The request of a stream: the lines of standard input, or one message.

    Lines are read when ``text`` is ``-``, or None and standard input is no terminal.

    Raises:
        click.UsageError: as ``read_message``.
    """
    has_lines = sys.stdin is not None and not sys.stdin.isatty()
    if text == "-" or (text is None and has_lines):
        return _read_lines(_stdin(), content_type)
    return read_message(text or "{}", content_type)


async def _read_lines(file: TextIO, content_type: str) -> AsyncIterator[object]:
    """A message for each line, as they come; blank lines of JSON are none."""
    number = 0
    async for line in _lines(file.fileno()):
        number += 1
        if content_type == _RAW or line.strip():
            yield _message(line, content_type, f"line {number} of standard input")


async def _lines(file: int) -> AsyncIterator[bytes]:
    held = bytearray()
    while chunk := await _chunk(file):
        held += chunk
        if b"\n" in chunk:
            *whole, held = held.split(b"\n")
            for line in whole:
                yield bytes(line)
        if len(held) > _LINE:
            raise click.UsageError(f"standard input has a line of more than {_LINE} bytes")
    if held:
        yield bytes(held)


async def _chunk(file: int) -> bytes:
    """What there is to read; empty at the end. A terminal or a pipe is waited for."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(file, ready.set)
    except (PermissionError, NotImplementedError):  # a file on disk is always ready; Windows' loop
        return os.read(file, _CHUNK)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(file)
    return os.read(file, _CHUNK)
