"""What plugins add to the command, and what ``micro plugins`` tells of them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import click
import msgspec

from micro.cli import _output
from micro.errors import ConfigError
from micro.installed import GROUPS, Entry
from micro.plugins import KINDS, Plugins, blaming

_PLUGINS = "micro.plugins"


# -- commands of plugins --------------------------------------------------------------------------


def plugins_of(ctx: click.Context) -> Plugins:
    """The plugins of this run of the command."""
    if _PLUGINS not in ctx.meta:
        ctx.meta[_PLUGINS] = Plugins()
    plugins: Plugins = ctx.meta[_PLUGINS]
    return plugins


class Commands(click.Group):
    """Our commands, and those of plugins, each of which is loaded when it is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *plugins_of(ctx).installed.names("command")})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        # Of a plugin's command only what help shows; resolve_command loads it.
        ours = super().get_command(ctx, cmd_name)
        entry = None if ours else plugins_of(ctx).installed.find("command", cmd_name)
        if entry is None:
            return ours
        owners = " and ".join((entry.owner, *entry.rivals))
        return click.Command(cmd_name, short_help=f"from {owners}")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, found, rest = super().resolve_command(ctx, args)
        if name is None or name in self.commands:
            return name, found, rest
        try:
            return name, _loaded(plugins_of(ctx), name), rest
        except ConfigError:
            if not ctx.resilient_parsing:  # else a shell is being typed in
                raise
            return name, found, rest


def _loaded(plugins: Plugins, name: str) -> click.Command:
    entry = plugins.installed.find("command", name)
    assert entry is not None
    with blaming(entry, f"micro {name}"):
        return _command(plugins, entry)


def _command(plugins: Plugins, entry: Entry, ours: Collection[str] = ()) -> click.Command:
    if entry.name in ours:
        raise ConfigError("micro has a command of that name")
    given = plugins.commands(entry)
    commands = [one for one in given if isinstance(one, click.Command)]
    if len(commands) < len(given):
        raise ConfigError(f"micro_commands gave {given!r}; each has to be a click.Command")
    for one in commands:
        if one.name == entry.name:
            return one
    raise ConfigError(f"micro_commands gave no command {entry.name!r}")


# -- micro plugins --------------------------------------------------------------------------------


class Offer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A scheme with the kinds behind it, a command or an extension; and why it cannot be used."""

    name: str
    kinds: Sequence[str] = ()
    broken: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one distribution offers."""

    distribution: str
    version: str
    schemes: list[Offer]
    commands: list[Offer]
    extensions: list[Offer]


def listing(plugins: Plugins, ours: Collection[str]) -> list[Row]:
    """What is embedded and what is installed, all of it loaded to see whether it can be used.

    ``ours`` are the commands that no plugin may replace.
    """
    from importlib.metadata import version

    rows = {"micro-core": _row("micro-core", version("micro-core"))}
    for scheme in sorted({scheme for kind in KINDS for scheme in plugins.schemes(kind)}):
        kinds = [kind.__name__.lower() for kind in KINDS if scheme in plugins.schemes(kind)]
        rows["micro-core"].schemes.append(Offer(name=scheme, kinds=kinds))
    for entry in plugins.installed.entries:
        row = rows.setdefault(entry.distribution, _row(entry.distribution, entry.version))
        offers = {"scheme": row.schemes, "command": row.commands, "extension": row.extensions}
        offers[entry.what].append(_offer(plugins, entry, ours))
    return list(rows.values())


def _row(distribution: str, version: str) -> Row:
    return Row(distribution=distribution, version=version, schemes=[], commands=[], extensions=[])


def _offer(plugins: Plugins, entry: Entry, ours: Collection[str]) -> Offer:
    kinds: list[str] = []
    try:
        match entry.what:
            case "scheme":
                kinds = sorted(kind.__name__.lower() for kind in plugins.backends(entry))
            case "command":
                _command(plugins, entry, ours)
            case "extension":
                plugins.extension(entry)
    except ConfigError as exc:
        return Offer(name=entry.name, broken=f"{exc} (module {entry.module})")
    return Offer(name=entry.name, kinds=kinds)


def show(rows: Sequence[Row]) -> None:
    """Print a line an offer; without any plugin, how one is found."""
    table: list[list[str]] = []
    for row in rows:
        owner = [row.distribution, row.version]
        for line in _lines(row):
            table.append([*owner, line])
            owner = ["", ""]
    _output.show_table(table, title=("DISTRIBUTION", "VERSION", "OFFERS"))
    if len(rows) == 1:
        *groups, last = GROUPS
        click.echo(
            "\nNo plugin is installed. One is a distribution with entry points in the groups "
            f"{', '.join(groups)} or {last};\nit is found by itself once it is installed for "
            f"{sys.executable}"
        )


def _lines(row: Row) -> list[str]:
    words = {"scheme": row.schemes, "command": row.commands, "extension": row.extensions}
    lines: list[str] = []
    for word, offers in words.items():
        for offer in offers:
            told = f"BROKEN: {offer.broken}" if offer.broken else ", ".join(offer.kinds)
            lines.append(f"{word} {offer.name}" + (f": {told}" if told else ""))
    return lines
