"""``micro services``: what is registered, and with ``--watch`` each change of it."""

from __future__ import annotations

import asyncio
import errno
import sys
from functools import partial

import click

from micro.cli import _arguments, _events, _output
from micro.cli._opened import run
from micro.errors import ServiceNotFound
from micro.follow import Watch
from micro.logs import printable
from micro.registry import Node, Registry
from micro.service import Service
from micro.url import suggestion

#: Seconds between two looks whether the view is stale, and whether somebody reads.
_LOOK = 0.25
#: What is told, and its colour.
EVENTS = {
    "there": None,
    "create": "green",
    "update": "yellow",
    "delete": "red",
    "live": None,
    "stale": "red",
}


@click.command(
    "services",
    epilog="""\b\nExamples:
  micro services
  micro services helloworld --watch
  micro services --watch --json | jq -c 'select(.event == "delete") | [.service, .id]'""",
)
@click.argument("service", required=False, shell_complete=_arguments.complete_service)
@click.option(
    "--watch",
    "-w",
    is_flag=True,
    help="each node, then a line for each change as it happens, until interrupted",
)
@_arguments.service_options
@click.pass_context
def services_command(ctx: click.Context, service: str | None, *, watch: bool) -> None:
    """List the services that are registered, and their nodes.

    With SERVICE, that one alone. --watch tells the nodes that there are, and then who comes,
    changes and goes. While the registry cannot be reached the nodes are "stale": nothing is known
    of them, and nothing told, until it is "live" again. A service that is watched may come later.
    """
    if watch:
        run(ctx, partial(show_changes, name=service, as_json=_arguments.wants_json(ctx)))
        return
    url, nodes = run(ctx, lambda opened, _: services(opened, service))
    if _arguments.wants_json(ctx):
        _output.show_json(_output.services_json(nodes))
    elif nodes:
        _output.show_services(nodes)
    else:
        where = printable(url)
        hint = "start a service, or choose another registry: --registry"
        click.echo(f"nothing is registered with {where}; {hint}")


# -- what it does, given an open service ----------------------------------------------------------


async def services(
    service: Service, name: str | None = None
) -> tuple[str, dict[str, tuple[Node, ...]]]:
    """The registry's URL, and the nodes of each service that is registered, or of that name.

    Raises:
        ServiceNotFound: as ``describe``, of a name.
    """
    registry = await service.client.registered()
    if name is not None:
        return str(registry.url), {name: await describe(service, name)}
    names = await registry.services()
    found = await asyncio.gather(*(nodes_of(registry, name) for name in names))
    nodes = {name: nodes for name, nodes in zip(names, found, strict=True) if nodes}
    return str(registry.url), nodes


async def describe(service: Service, name: str) -> tuple[Node, ...]:
    """The nodes of a service.

    Raises:
        ServiceNotFound: there are none; the text names what is registered.
    """
    registry = await service.client.registered()
    nodes = await nodes_of(registry, name)
    if not nodes:
        names = await registry.services()
        hint = suggestion(name, names) if names else "; nothing is registered, is it running?"
        raise ServiceNotFound(f"service {name!r} is not registered{hint}")
    return nodes


async def nodes_of(registry: Registry, name: str) -> tuple[Node, ...]:
    """The nodes of a service, none if it is not registered."""
    try:
        return await registry.get(name)
    except ServiceNotFound:
        return ()


async def show_changes(
    service: Service, timer: asyncio.Timeout, *, name: str | None, as_json: bool
) -> None:
    """Print the nodes that there are, then each change; ``timer`` watches until they are known.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    registry = await service.client.registered()
    async with service.client.watch(name) as watch:
        timer.reschedule(None)
        lines = _events.Lines(EVENTS, as_json=as_json)
        if not as_json:
            lines.fit(watch.nodes)
            click.echo(click.style(lines.title, dim=True))
        for node in watch.nodes:
            _show(lines.line("there", node), "there", as_json=as_json)
        await _show_each(watch, lines, str(registry.url))


async def _show_each(watch: Watch, lines: _events.Lines, registry: str) -> None:
    state = ""
    while True:
        if watch.state != state:
            state = watch.state
            why = str(watch.error or "") if state == "stale" else ""
            line = lines.line(state, registry=registry, detail=why)
            _show(line, state, as_json=lines.as_json)
        if _events.reader_has_left(sys.stdout):
            raise BrokenPipeError(errno.EPIPE, "nobody reads what is told")
        try:
            async with asyncio.timeout(_LOOK):
                change = await anext(watch)
        except TimeoutError:
            continue
        _show(lines.line(change.kind, change.node), change.kind, as_json=lines.as_json)


def _show(line: str, event: str, *, as_json: bool) -> None:
    """Print a line; a terminal shows the word for what has happened coloured."""
    if as_json:
        click.echo(line.encode())
        return
    before, word, after = line.partition(event)
    click.echo(before + click.style(word, fg=EVENTS[event]) + after)
