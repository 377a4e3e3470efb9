"""Lines that tell what happens while it happens: columns for people, JSON for machines."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from micro.cli import _output
from micro.logs import printable
from micro.registry import Node

#: The title of the columns, and how wide each of them is at least.
_TITLE = {"TIME": 12, "EVENT": 6, "SERVICE": 7, "NODE": 36, "ADDRESS": 15, "VERSION": 7}
#: Lines that may wait for who reads them; more are dropped.
_WAITING = 1000
#: Seconds that the last lines have to be read.
_LAST_WAIT = 1.0


class Lines:
    """Makes a line of each event, of which there are ``events``.

    Columns are as wide as the widest cell so far.
    """

    def __init__(self, events: Iterable[str], *, as_json: bool) -> None:
        self.as_json: bool = as_json
        self._widths = list(_TITLE.values())
        for event in events:
            self._aligned(["", event])

    @property
    def title(self) -> str:
        """The names of the columns, which only people get."""
        return self._aligned(list(_TITLE))

    def fit(self, nodes: Iterable[Node]) -> None:
        """Make the columns wide enough for these nodes."""
        for node in nodes:
            self._aligned(["", "", *_cells(node)])

    def line(
        self,
        event: str,
        node: Node | None = None,
        *,
        detail: str = "",
        registry: str = "",
    ) -> str:
        """One event, now. What is ``""`` is left out, in JSON as well."""
        now = datetime.now(UTC)
        told = {name: text for name, text in (("registry", registry), ("detail", detail)) if text}
        if self.as_json:
            moment = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            about = {} if node is None else _as_json(node)
            return _output.json_text({"time": moment, "event": event, **about, **told})
        clock = now.astimezone().time().isoformat(timespec="milliseconds")
        cells = [] if node is None else _cells(node)
        text = ": ".join(printable(one) for one in told.values())
        return f"{self._aligned([clock, event, *cells])}  {text}".rstrip()

    def _aligned(self, cells: list[str]) -> str:
        shown = [printable(cell) for cell in cells]
        for number, cell in enumerate(shown):
            self._widths[number] = max(self._widths[number], len(cell))
        return "  ".join(f"{c:<{w}}" for c, w in zip(shown, self._widths, strict=False))


def _cells(node: Node) -> list[str]:
    return [node.service, node.id, node.address, node.version]


def _as_json(node: Node) -> dict[str, Any]:
    return {
        "service": node.service,
        "id": node.id,
        "address": node.address,
        "version": node.version,
        "metadata": dict(node.metadata),
        "service_metadata": dict(node.service_metadata),
    }


def reader_has_left(file: TextIO | None) -> bool:
    """Whether nobody can read what is written to ``file``: a pipe whose other end is closed."""
    number = _number(file)
    if number is None or not hasattr(select, "poll"):  # Windows: the next line will tell
        return False
    look = select.poll()
    look.register(number, 0)
    return bool(look.poll(0))


def _number(file: TextIO | None) -> int | None:
    """The descriptor of a file that has one."""
    with suppress(OSError, ValueError):
        return None if file is None else file.fileno()
    return None


class Printer:
    """Prints lines from a thread of its own: who does not read them holds up nothing else.

    When too many wait, new ones are dropped; when nobody can read them, all are, as when there is
    no file: a process may begin without standard output.
    """

    def __init__(self, file: TextIO | None) -> None:
        # Not by the file, whose lock would be held for as long as nobody reads.
        self._to = _number(file)
        self._encoding = "utf-8" if file is None else file.encoding
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="micro lines", daemon=True)
        self._thread.start()

    def print(self, line: str) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Wait for a moment until what was told is read."""
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(_LAST_WAIT)

    def _run(self) -> None:
        with suppress(OSError):
            while (line := self._lines.get()) is not None:
                left = f"{line}\n".encode(self._encoding, "backslashreplace")
                while left and self._to is not None:
                    left = left[os.write(self._to, left) :]
