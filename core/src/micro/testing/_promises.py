"""Tables of promises: which backend keeps which, as its conformance suite has found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = re.compile(r"(<!-- conformance: ([a-z]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Outcome(NamedTuple):
    """What came of one test: ``backend`` is scheme and kind, ``why`` the reason of a skip."""

    backend: str
    promise: str
    result: str
    why: str = ""


def promises(suite: type[Any]) -> list[str]:
    """The names of what a suite checks, without ``test_``: what every backend promises first."""
    names: dict[str, None] = {}
    for base in reversed(suite.__mro__):
        names |= dict.fromkeys(name for name in vars(base) if name.startswith("test_"))
    return [name.removeprefix("test_") for name in names]


def write(page: Path, outcomes: Iterable[Outcome], suites: Mapping[str, type[Any]]) -> None:
    """Write a table between ``<!-- conformance: registry -->`` and ``<!-- end -->``, of each kind.

    A kind of which nothing was tested keeps the table that it has.
    """
    known = list(outcomes)

    def written(match: re.Match[str]) -> str:
        of_kind = [one for one in known if one.backend.endswith(f" {match[2]}")]
        if not of_kind:
            return match[0]
        return f"{match[1]}{table(promises(suites[match[2]]), of_kind)}{match[3]}"

    page.write_text(_BLOCK.sub(written, page.read_text()))


def table(rows: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """A row for each promise, a column for each backend; below, why it could not be tried."""
    backends = sorted({one.backend for one in outcomes})
    reasons: dict[str, int] = {}
    lines = [["promise", *(f"`{backend.split()[0]}`" for backend in backends)]]
    lines.append(["--"] * len(lines[0]))
    for row in rows:
        of_row = [one for one in outcomes if one.promise == row]
        cells = [_cell([one for one in of_row if one.backend == b], reasons) for b in backends]
        lines.append([row.replace("_", " "), *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "".join(_notes(reasons))


def _cell(outcomes: Sequence[Outcome], reasons: dict[str, int]) -> str:
    results = {one.result for one in outcomes}
    if "failed" in results:
        return "**no**"
    if "passed" in results:
        return "yes"
    whys = dict.fromkeys(one.why for one in outcomes)
    return " ".join(f"{reasons.setdefault(why, len(reasons) + 1)})" for why in whys) or "not run"


def _notes(reasons: Mapping[str, int]) -> Iterator[str]:
    for why, number in reasons.items():
        yield f"\n{number}) {why}\n"
