"""How log lines look: one line an event, coloured on a terminal."""

from __future__ import annotations

import logging
from typing import TextIO

from micro.errors import ConfigError

_LEVELS = ("debug", "info", "warning", "error")
_COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "31"}


def printable(text: str) -> str:
    """``text`` on one line; escaped is what would forge a line, move a cursor or hide a letter."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LineFormatter(logging.Formatter):
    """``12:00:01.123 INFO  micro.service  text``; the lines of a traceback follow, indented.

    ``process`` tells several processes of one program apart; it stands behind the logger's name.
    """

    def __init__(self, *, colour: bool, process: str = "") -> None:
        super().__init__()
        self._colour = colour
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname:<7}"
        if self._colour:
            level = f"\x1b[{_COLOURS.get(record.levelname, '0')}m{level}\x1b[0m"
        moment = f"{self.formatTime(record, '%H:%M:%S')}.{int(record.msecs):03d}"
        name = f"{record.name}{self._process}"
        line = f"{moment} {level} {name}  {printable(record.getMessage())}"
        if record.exc_info:
            traceback = self.formatException(record.exc_info).splitlines()
            line = "\n    ".join([line, *map(printable, traceback)])
        return line


def configure(
    level: str,
    *,
    source: str,
    colour: bool = True,
    process: str = "",
    stream: TextIO | None = None,
) -> None:
    """Send the logs of this process to ``stream`` (stderr), unless the program has set up its own.

    Lines have colours when ``colour`` is true and the stream is a terminal, and tell the
    ``process`` where there are several.

    Raises:
        ConfigError: no such level; the text names ``source``.
    """
    if level.lower() not in _LEVELS:
        raise ConfigError(f"{source}: log level {level!r}: write one of {', '.join(_LEVELS)}")
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(stream)
        coloured = colour and handler.stream.isatty()
        handler.setFormatter(LineFormatter(colour=coloured, process=process))
        root.addHandler(handler)
    logging.getLogger("micro").setLevel(level.upper())
