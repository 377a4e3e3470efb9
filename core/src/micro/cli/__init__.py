"""The ``micro`` command: call services, see which there are, how they are and what they bear.

What it knows of backends and time-outs it gets as a service does: from flags and variables of the
same names. Its own service has no handlers, so it neither listens nor registers.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Unpack

import click
import msgspec

from micro.cli import (
    _arguments,
    _bench,
    _certificates,
    _deregister,
    _doctor,
    _health,
    _messages,
    _output,
    _plugins,
    _register,
    _report,
    _services,
    _verify,
)
from micro.cli._opened import run
from micro.cli._services import describe, services
from micro.errors import MicroError
from micro.program import loop_factory
from micro.registry import Node
from micro.retries import Retries
from micro.service import Service

__all__ = ["command", "describe", "health", "main", "services"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments`` (``sys.argv`` by default); the status to exit with."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in words
    try:
        status = command.main(words, prog_name="micro", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        return _output.Exit.INTERRUPTED
    except click.ClickException as exc:
        return _output.show_usage_error(exc, as_json=as_json)
    except MicroError as exc:
        return _output.show_error(exc, as_json=as_json)
    return status if isinstance(status, int) else _output.Exit.OK


@click.group(
    cls=_plugins.Commands,
    invoke_without_command=True,
    epilog=_output.EPILOG,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda word: word.replace("-", "_"),
    },
)
@_arguments.service_options
@_arguments.no_color_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """Call services, and see which there are.

    Options stand before or after the command. Those that services have are also variables:
    MICRO_REGISTRY and so on.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(_output.Exit.USAGE)


@command.command(
    "call", epilog="""\b\nExample:\n  micro call helloworld Helloworld.Call '{"name": "Alice"}'"""
)
@click.argument("service", shell_complete=_arguments.complete_service)
@click.argument("endpoint", shell_complete=_arguments.complete_endpoint)
@click.argument("request", metavar="[JSON]", default="{}")
@_messages.call_options
@_arguments.service_options
@click.pass_context
def call_command(
    ctx: click.Context, service: str, endpoint: str, request: str, **way: Unpack[_messages.Way]
) -> None:
    """Call an endpoint and print its reply.

    JSON is the request: the text itself, @FILE for what a file holds, - for standard input.
    Left out, it is {}.
    """
    message = _messages.read_message(request, way["content_type"])
    reply = run(
        ctx,
        lambda opened, _: opened.client.call(service, endpoint, message, **way),
        timeout=way["timeout"],
    )
    _output.show_reply(reply, as_json=_arguments.wants_json(ctx))


@command.command(
    "stream",
    epilog="""\b\nExamples:
  micro stream prices Prices.Watch '{"symbol": "XYZ"}'
  tail -f said.jsonl | micro stream chat Chat.Talk""",
)
@click.argument("service", shell_complete=_arguments.complete_service)
@click.argument("endpoint", shell_complete=_arguments.complete_endpoint)
@click.argument("request", metavar="[JSON]", required=False)
@_messages.call_options
@_arguments.service_options
@click.pass_context
def stream_command(
    ctx: click.Context,
    service: str,
    endpoint: str,
    request: str | None,
    **way: Unpack[_messages.Way],
) -> None:
    """Call an endpoint that streams; print a line for each reply, as it comes.

    JSON is the one request: the text itself, or @FILE for what a file holds. With -, or when it is
    left out and standard input is no terminal, each line of standard input is a request, as soon as
    it comes; their end is told to the service, which may go on. Without --timeout it may go on for
    ever; an interrupt ends it.
    """
    messages = _messages.read_request(request, way["content_type"])
    as_json = _arguments.wants_json(ctx)

    async def show_all(opened: Service, timer: asyncio.Timeout) -> None:
        async with opened.client.stream(service, endpoint, messages, **way) as replies:
            timer.reschedule(None)
            async for reply in replies:
                _output.show_line(reply, as_json=as_json)

    run(ctx, show_all)


@command.command("bench", epilog=_bench.EPILOG)
@click.argument("service", shell_complete=_arguments.complete_service)
@click.argument("endpoint", shell_complete=_arguments.complete_endpoint)
@click.argument("request", metavar="[JSON]", default="{}")
@_messages.call_options
@_bench.options
@_arguments.service_options
@click.pass_context
def bench_command(
    ctx: click.Context,
    service: str,
    endpoint: str,
    request: str,
    callers: int,
    duration: float,
    rate: float | None,
    **way: Unpack[_messages.Way],
) -> int:
    """Put a load on an endpoint, and tell how many calls it bore and how long they took.

    Each caller makes one call after another, as micro call makes one, or with --rate as many as are
    due. JSON is the request of each: the text itself, @FILE, or - for standard input. One process
    of Python makes the load: it may be the limit, and says so. --json tells counts, and seconds.
    """
    plan = _bench.Plan(callers=callers, seconds=duration, rate=rate)
    message = _messages.read_message(request, way["content_type"])
    as_json = _arguments.wants_json(ctx)

    async def drive(opened: Service, timer: asyncio.Timeout) -> _report.Report:
        call = partial(opened.client.call, service, endpoint, message, **way)
        shows = sys.stdout.isatty() and not as_json
        load = await _bench.drive(plan, call, timer, shows_progress=shows)
        return _report.report(load, service, endpoint, opened.client.counts)

    told = run(ctx, drive, timeout=way["timeout"], loop_factory=loop_factory())
    if as_json:
        _output.show_json(msgspec.to_builtins(told))
    else:
        _report.show(told)
    return told.status


@command.command("health", epilog=_health.EPILOG)
@click.argument("service", shell_complete=_arguments.complete_service)
@_messages.ask_options
@_arguments.service_options
@click.pass_context
def health_command(
    ctx: click.Context, service: str, timeout: float | None, metadata: dict[str, str]
) -> int:
    """Ask each node of a service how it is, and show which cannot be reached, and why.

    Every registered node is asked at its own address, all at once, each for as long as a call may
    take.
    """
    once = Retries(attempts=1)
    answers = run(
        ctx, partial(health, name=service, timeout=timeout, metadata=metadata), retries=once
    )
    if _arguments.wants_json(ctx):
        _output.show_json(_health.as_json(service, answers))
    else:
        _health.show(answers)
    healthy = all(answer.healthy for answer in answers)
    return _output.Exit.OK if healthy else _output.Exit.ERROR


@command.command("describe")
@click.argument("service", shell_complete=_arguments.complete_service)
@_arguments.service_options
@click.pass_context
def describe_command(ctx: click.Context, service: str) -> None:
    """Show a service's endpoints, their messages, and its nodes."""
    nodes = run(ctx, lambda opened, _: describe(opened, service))
    if _arguments.wants_json(ctx):
        _output.show_json(_output.service_json(nodes))
    else:
        _output.show_service(nodes)


command.add_command(_certificates.cert_command)
command.add_command(_doctor.doctor_command)
command.add_command(_deregister.deregister_command)
command.add_command(_register.register_command)
command.add_command(_services.services_command)
command.add_command(_verify.verify_command)


@command.command("plugins")
@_arguments.json_option
@click.pass_context
def plugins_command(ctx: click.Context) -> None:
    """List the installed plugins, and what of them is broken."""
    rows = _plugins.listing(_plugins.plugins_of(ctx), command.commands)
    if _arguments.wants_json(ctx):
        _output.show_json(msgspec.to_builtins(rows))
    else:
        _plugins.show(rows)


@command.command("version")
@_arguments.json_option
@click.pass_context
def version_command(ctx: click.Context) -> None:
    """Show the versions of micro-core and of Python."""
    from importlib.metadata import version

    python = ".".join(map(str, sys.version_info[:3]))
    versions = {"micro-core": version("micro-core"), "Python": python}
    if _arguments.wants_json(ctx):
        _output.show_json(versions)
    else:
        _output.show_table([list(pair) for pair in versions.items()])


@command.command("completion", epilog=_arguments.COMPLETION_EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a script that makes the shell complete this command."""
    click.echo(_arguments.completion_script(command, shell))


# -- what the commands do, given an open service --------------------------------------------------


async def health(
    service: Service,
    timer: asyncio.Timeout,
    *,
    name: str,
    timeout: float | None,
    metadata: Mapping[str, str],
) -> list[_health.Answer]:
    """What each node of a service says; ``timer`` watches until they are known.

    Raises:
        ServiceNotFound: as ``describe``.
    """
    async with service.client.watch(name) as watch:  # which fills while the registry is asked
        nodes = await describe(service, name)
        timer.reschedule(None)
        known = {node.id for node in watch.nodes}

        def has_left(node: Node) -> bool:
            return node.id in known.difference(one.id for one in watch.nodes)

        ask_all = partial(_health.ask_all, service.client, nodes, has_left)
        return await ask_all(timeout=timeout, metadata=metadata)
