"""``micro register``: keeps a program that is none of ours in the registry."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import uuid
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack, closing
from functools import partial
from typing import Any, TypeVar

import click
import msgspec

from micro.cli import _arguments, _events, _output
from micro.cli._child import Child, Signals, running
from micro.cli._opened import run
from micro.cli._probe import Probe, probe_of
from micro.cli._upkeep import EVENTS, Health, Pace, Upkeep
from micro.errors import ConfigError
from micro.registry import Node, check_node
from micro.routes import TRANSPORTS
from micro.service import Service
from micro.settings import Settings
from micro.url import seconds

F = TypeVar("F", bound=Callable[..., Any])

#: The settings of a service that concern one who registers another.
_SETTINGS = (
    "registry",
    "registry_address",
    "register_ttl",
    "register_interval",
    "extensions",
    "log_level",
)
#: Seconds that callers have to hear that a program goes, at most, before it is told.
_PROPAGATION = 2.0
_EVERYWHERE = ("0.0.0.0", "[::]", "*")  # noqa: S104 - it is refused


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to register, and for how long: until a signal, or until ``command`` ends."""

    node: Node
    probe: Probe | None
    pace: Pace
    ttl: float
    interval: float
    command: tuple[str, ...]


# -- what it is told ------------------------------------------------------------------------------


def _duration(_: click.Context, option: click.Parameter, value: str) -> float:
    found = seconds(value, f"--{option.name}")
    if not 0 < found < math.inf:
        raise ConfigError(f"--{option.name}: {value!r} is not more than 0")
    return found


def _pairs(_: click.Context, __: click.Parameter, value: Iterable[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for pair in value:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise click.UsageError(f"--metadata: {pair!r} is not key=value")
        pairs[name] = text
    return pairs


_OPTIONS = (
    click.option(
        "--address",
        metavar="HOST:PORT",
        required=True,
        help="where others reach the program",
    ),
    click.option("--id", "id_", metavar="TEXT", help="the node's id; default a new uuid"),
    click.option("--version", metavar="TEXT", default="latest", help="its version; default latest"),
    click.option(
        "--transport",
        metavar="NAME",
        default="http",
        help="what it speaks, as callers are told: http (default), tcp, or another's, as grpc",
    ),
    click.option(
        "--metadata",
        "-m",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_pairs,
        help="for the registry; may be repeated",
    ),
    click.option(
        "--check",
        metavar="WHAT",
        default="tcp",
        help="when it is well: tcp, it takes connections (default); an http:// or https:// URL, "
        "or a /path at its address, the status is 2xx; none, always",
    ),
    click.option(
        "--interval",
        metavar="TIME",
        default="2s",
        callback=_duration,
        help="how often to check; default 2s",
    ),
    click.option(
        "--timeout",
        metavar="TIME",
        default="2s",
        callback=_duration,
        help="how long a check may take; default 2s",
    ),
    click.option(
        "--fall",
        metavar="NUMBER",
        default=3,
        type=click.IntRange(1, 100),
        help="checks in a row that fail until it is taken out; default 3",
    ),
    click.option(
        "--rise",
        metavar="NUMBER",
        default=2,
        type=click.IntRange(1, 100),
        help="checks in a row that pass until it is back; default 2",
    ),
)


def _register_options(function: F) -> F:
    function = _arguments.setting_options(function, _SETTINGS)
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _plan(ctx: click.Context, service: str, command: tuple[str, ...], **given: Any) -> Plan:
    """What the options come to.

    Raises:
        ConfigError, InvalidArgument: one of them is wrong; the text says which.
    """
    settings = Settings(_arguments.given(ctx))
    ttl = settings.duration("register_ttl", None, 30.0)
    scheme = settings.url("registry", None, "mdns").scheme
    node = check_node(
        Node(
            service=service,
            id=given["id_"] or str(uuid.uuid4()),
            address=given["address"],
            version=given["version"],
            metadata=_spoken(given["transport"], scheme) | given["metadata"],
        )
    )
    if node.address.rpartition(":")[0] in _EVERYWHERE:
        raise ConfigError(
            f"--address: {node.address} is where a program listens, and no address to call; "
            "write the one that others reach it at"
        )
    return Plan(
        node=node,
        probe=probe_of(given["check"], node.address, settings.authorities),
        pace=Pace(**{name: given[name] for name in Pace.__struct_fields__}),
        ttl=ttl,
        interval=settings.duration("register_interval", None, ttl / 3),
        command=command,
    )


def _spoken(transport: str, scheme: str) -> dict[str, str]:
    """What tells clients, ours and Go Micro's, how to call a node: as our services write it."""
    names = [name.strip() for name in transport.split(",")]
    protocol = "grpc" if names[-1] == "grpc" else "mucp"
    spoken = {
        "transport": names[-1],
        "protocol": protocol,
        "registry": scheme,
        "server": protocol,
    }
    return spoken | ({TRANSPORTS: ",".join(names)} if len(names) > 1 else {})


# -- micro register -------------------------------------------------------------------------------


@click.command(
    "register",
    epilog="""\b\nExamples:
  micro register prices --address 10.0.0.5:8080 --check /healthz
  micro register prices --address 10.0.0.5:8080 -- ./prices --port 8080

\b\nWhat is told:
"""
    + "\n".join(f"  {event:<14}{meaning}" for event, meaning in EVENTS.items())
    + """

Exit status: that of COMMAND; without one 0 after SIGTERM, 130 after an interrupt; otherwise as
with the other commands.""",
)
@click.argument("service")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND...]")
@_register_options
@click.pass_context
def register_command(
    ctx: click.Context, /, service: str, command: tuple[str, ...], **given: Any
) -> int:
    """Keep a program of any kind registered while it is well.

    It is checked on and on: while the check fails, it is not registered. It stays registered until
    this command is told to end, by SIGTERM, SIGINT or SIGHUP, and then leaves the registry. The
    registry may come and go meanwhile.

    With COMMAND, that program is started, gets the signals once callers have heard that it goes,
    and the end of one is the end of both. What is told is then told on stderr.
    """
    plan = _plan(ctx, service, command, **given)
    lines = _events.Lines(EVENTS, as_json=_arguments.wants_json(ctx))
    with closing(_events.Printer(sys.stderr if command else sys.stdout)) as printer:

        def tell(event: str, why: str) -> None:
            printer.print(lines.line(event, plan.node, detail=why))

        return run(ctx, partial(keep, plan=plan, tell=tell))


async def keep(
    service: Service, timer: asyncio.Timeout, *, plan: Plan, tell: Callable[[str, str], None]
) -> int:
    """Do what ``plan`` says until a signal comes, or its program ends; the status to exit with.

    Raises:
        MicroError: the node cannot be registered, or the program not be started.
    """
    timer.reschedule(None)
    health = Health(plan.probe, plan.pace)
    upkeep = Upkeep(
        service.client.registered, plan.node, health, tell, ttl=plan.ttl, interval=plan.interval
    )
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(closing(Signals()))
        child = await stack.enter_async_context(running(plan.command)) if plan.command else None
        stack.push_async_callback(upkeep.leave, "the command ends")
        asked = await _until_asked(health, upkeep, signals, child)
        if child is None:
            assert asked is not None
            signals.close()  # another one ends it at once
            await upkeep.leave(asked.name)
            return _output.Exit.INTERRUPTED if asked is signal.SIGINT else _output.Exit.OK
        if asked is None:
            await upkeep.leave(f"the program has ended with status {child.ended.result()}")
        else:
            spreads = min(upkeep.converge, _PROPAGATION) if upkeep.is_in else 0.0
            await upkeep.leave(asked.name)
            await _pass_on(asked, signals, child, spreads)
        return child.ended.result()


async def _until_asked(
    health: Health, upkeep: Upkeep, signals: Signals, child: Child | None
) -> signal.Signals | None:
    """Keep the node registered until a signal comes; None when its program has ended before."""
    asked = asyncio.create_task(signals.next(), name="micro.signals")
    work = [asyncio.create_task(one.run(), name="micro.upkeep") for one in (health, upkeep)]
    ours: list[asyncio.Task[Any]] = [*work, asked]
    try:
        ends = [*ours, *([child.ended] if child else [])]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in done.intersection(work):
            task.result()  # it has failed, since they never end
    finally:
        for one in ours:
            one.cancel()
        await asyncio.gather(*ours, return_exceptions=True)
    return None if asked.cancelled() else asked.result()


async def _pass_on(
    number: signal.Signals, signals: Signals, child: Child, after: float | None
) -> None:
    """Send the program a signal in ``after`` seconds, and all that come; wait until it has ended.

    Until then callers call it that have not heard that it goes. Another signal shortens this.
    """
    while not child.ended.done():
        asked = asyncio.create_task(signals.next(), name="micro.signals")
        await asyncio.wait({child.ended, asked}, timeout=after, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            number = asked.result()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        child.send(number)
        after = None
