"""What installed distributions offer, by their entry points; nothing of them is loaded for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

What = Literal["scheme", "command", "extension"]
#: The groups of entry points, and what a name in each of them is.
GROUPS: dict[str, What] = {
    "micro.backends": "scheme",
    "micro.commands": "command",
    "micro.extensions": "extension",
}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry point: ``distribution`` offers the ``what`` (a scheme, say) called ``name``.

    ``module`` is behind it; ``rivals`` are the other distributions that claim the name.
    """

    what: What
    name: str
    module: str
    distribution: str
    version: str
    rivals: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}"

    def load(self) -> Any:
        """The module, imported: whatever that raises comes through."""
        from importlib.metadata import EntryPoint

        return EntryPoint(name=self.name, value=self.module, group="").load()


class Installed:
    """The entry points in GROUPS of all installed distributions, read once, when first asked for.

    A distribution that ``sys.path`` has twice (as an editable install and as a wheel) is one, and
    its first copy counts, as it does for ``import``.
    """

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, by distribution and name; those of one name are each other's rivals."""
        owners: dict[tuple[What, str], list[str]] = {}
        found = sorted(_read(), key=lambda entry: (entry.distribution, entry.what, entry.name))
        for entry in found:
            owners.setdefault((entry.what, entry.name), []).append(entry.owner)
        return tuple(_with_rivals(entry, owners[entry.what, entry.name]) for entry in found)

    def find(self, what: What, name: str) -> Entry | None:
        """The entry of that name, the first where distributions are rivals for it."""
        named = (entry for entry in self.entries if (entry.what, entry.name) == (what, name))
        return next(named, None)

    def names(self, what: What) -> tuple[str, ...]:
        """All names of schemes, of commands or of extensions, sorted, each once."""
        return tuple(sorted({entry.name for entry in self.entries if entry.what == what}))


def _read() -> Iterator[Entry]:
    # Loading it takes longer than all of `import micro`.
    from importlib.metadata import entry_points

    points = entry_points()
    for group, what in GROUPS.items():
        for point in points.select(group=group):
            yield Entry(
                what=what,
                name=point.name,
                module=point.value,
                distribution=_metadata(point, "Name"),
                version=_metadata(point, "Version"),
            )


def _metadata(point: EntryPoint, field: str) -> str:
    # A distribution that is half uninstalled has none; it must not hide the others.
    told = point.dist.metadata.get_all(field) if point.dist else None
    return str(told[0]) if told else "unknown"


def _with_rivals(entry: Entry, owners: list[str]) -> Entry:
    rivals = tuple(owner for owner in owners if owner != entry.owner)
    return msgspec.structs.replace(entry, rivals=rivals) if rivals else entry
