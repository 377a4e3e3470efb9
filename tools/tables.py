"""Tables of the documentation that the code knows best: ``python tools/tables.py [--check]``.

A page says where one stands, ``<!-- table: interfaces -->`` to ``<!-- end -->``; what is between is
written here. The distributions have to be installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from micro.backend import Backend
from micro.plugins import KINDS, Kind, Plugins
from micro.registry import Registry
from micro.url import URL

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
]
_BLOCK = re.compile(r"(<!-- table: ([a-z]+)(?: ([a-z-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_DEFAULTS = {"registry": "mdns", "transport": "http"}


class Row(NamedTuple):
    """A scheme, where it comes from, and the backends behind it by the names of their kinds."""

    scheme: str
    distribution: str
    backends: dict[str, Kind]


def rows() -> list[Row]:
    """Every scheme that this repository has, by name."""
    plugins = Plugins()
    found: dict[str, Row] = {}
    for kind in KINDS:
        for scheme in plugins.schemes(kind):
            row = found.setdefault(scheme, Row(scheme, "micro-core", {}))
            row.backends[_word(kind)] = type(_made(plugins, kind, scheme))
    ours = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}
    for entry in plugins.installed.entries:
        if entry.what == "scheme" and entry.distribution.removeprefix("micro-plugin-") in ours:
            kinds = {_word(kind): cls for kind, cls in plugins.backends(entry).items()}
            found[entry.name] = Row(entry.name, entry.distribution, kinds)
    return sorted(found.values())


def interfaces(page: Path, _scheme: str) -> Iterator[list[str]]:
    """Which scheme has a backend for which interface."""
    words = [_word(kind) for kind in KINDS]
    yield ["scheme", *words, "from", ""]
    for row in rows():
        marks = [_mark(row, word) for word in words]
        yield [f"`{row.scheme}`", *marks, row.distribution, _more(page, row)]


def registries(_page: Path, scheme: str) -> Iterator[list[str]]:
    """What each registry declares; the suite checks it. With ``scheme``, that one alone."""
    yield ["registry", "least ttl", "others see a change within", "after a break", "names"]
    for row in rows():
        backend = row.backends.get("registry")
        if backend is None or scheme not in ("", row.scheme):
            continue
        assert issubclass(backend, Registry)
        can = backend.features
        yield [
            f"`{row.scheme}`",
            f"{can.min_ttl:g} s",
            f"{can.converge:g} s",
            "every change, in order, once" if can.history else "a new snapshot",
            "without case" if can.ignores_case else "with case",
        ]


_TABLES = {"interfaces": interfaces, "registries": registries}


def current(page: Path) -> str:
    """The text of a page with its tables as they should be."""

    def written(match: re.Match[str]) -> str:
        head, *body = _TABLES[match[2]](page, match[3] or "")
        lines = [head, ["--"] * len(head), *body]
        table = "".join(f"| {' | '.join(cells)} |\n".replace("|  |", "| |") for cells in lines)
        return f"{match[1]}{table}{match[4]}"

    return _BLOCK.sub(written, page.read_text())


def main() -> None:
    """Write what has changed; with --check, say so and fail."""
    stale = [page for page in PAGES if current(page) != page.read_text()]
    for page in stale:
        print(page.relative_to(ROOT))
        if "--check" not in sys.argv:
            page.write_text(current(page))
    if stale and "--check" in sys.argv:
        sys.exit("their tables are not current; run: python3 dev.py docs")


def _made(plugins: Plugins, kind: Kind, scheme: str) -> Backend[object]:
    made: Backend[object] = plugins.create(kind, URL.parse(scheme))
    return made


def _word(kind: Kind) -> str:
    return kind.__name__.lower()


def _mark(row: Row, word: str) -> str:
    if word not in row.backends:
        return ""
    return "yes (default)" if _DEFAULTS.get(word) == row.scheme else "yes"


def _more(page: Path, row: Row) -> str:
    """A link to the page of a scheme, if it has one."""
    for path in (ROOT / f"docs/{row.scheme}.md", ROOT / f"plugins/{row.scheme}/README.md"):
        if path.exists() and path != page:
            up = "../" * (len(page.relative_to(ROOT).parts) - 1)
            return f"[how it works]({up}{path.relative_to(ROOT)})"
    return ""


if __name__ == "__main__":
    main()
