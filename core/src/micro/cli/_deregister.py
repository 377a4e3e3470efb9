"""``micro deregister``: takes out of the registry what a program has left behind."""

from __future__ import annotations

import click

from micro.cli import _arguments, _events
from micro.cli._opened import run
from micro.cli._services import describe, nodes_of
from micro.errors import FailedPrecondition, NotFound
from micro.registry import Node
from micro.service import Service

#: Nodes that an error names.
_NAMED = 5


@click.command(
    "deregister",
    epilog="""\b\nExamples:
  micro deregister prices 5f3e0a52-8c1f-4a57-9d02-7d0a4f1f7c11
  micro deregister prices --address 10.0.0.5:8080""",
)
@click.argument("service", shell_complete=_arguments.complete_service)
@click.argument("id_", metavar="[ID]", required=False)
@click.option("--address", metavar="HOST:PORT", help="the nodes at this address, instead of ID")
@_arguments.service_options
@click.pass_context
def deregister_command(
    ctx: click.Context, service: str, id_: str | None, address: str | None
) -> None:
    """Take a node out of the registry, by its id or its address; micro describe shows both.

    It is for what a program has left behind. One that still runs registers again with its next
    heartbeat: end it instead. Where each program answers for itself, as with mdns, nobody else can
    take its node out, and the error says so.
    """
    if (id_ is None) == (address is None):
        raise click.UsageError("give the node's ID, or its --address", ctx=ctx)
    nodes = run(ctx, lambda opened, _: deregister(opened, service, id_, address))
    lines = _events.Lines([], as_json=_arguments.wants_json(ctx))
    for node in nodes:
        click.echo(lines.line("deregistered", node).encode())


async def deregister(
    service: Service, name: str, id_: str | None, address: str | None
) -> list[Node]:
    """Take out the nodes of that id, or at that address; which these were.

    Raises:
        ServiceNotFound: the service has no node.
        NotFound: it has no such node; the text names some that it has.
        FailedPrecondition: a node is there all the same.
    """
    found = await describe(service, name)
    nodes = [node for node in found if id_ in (None, node.id) and address in (None, node.address)]
    if not nodes:
        had = ", ".join(f"{node.id} at {node.address}" for node in found[:_NAMED])
        asked = f"node {id_!r}" if id_ else f"node at {address}"
        raise NotFound(f"service {name!r} has no {asked}; it has {had}")
    registry = await service.client.registered()
    for node in nodes:
        await registry.deregister(node)
    left = {node.id for node in await nodes_of(registry, name)}
    for node in nodes:
        if node.id in left:
            raise FailedPrecondition(
                f"node {node.id} of {name!r} is still registered with {registry.url}: the program "
                "that it stands for has registered it again, or answers for itself there, as with "
                "mdns; end that program"
            )
    return nodes
