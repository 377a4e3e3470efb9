"""``micro doctor``: what a service would use is tried end to end, and what is wrong is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import click

from micro._running import Running
from micro.cli import _arguments, _checks, _output
from micro.cli._check_registry import RegistryChecks
from micro.cli._check_transport import TransportChecks
from micro.cli._checks import Checks, Finding, Flaw, Part
from micro.logs import configure
from micro.plugins import Plugins
from micro.service import Service
from micro.settings import Settings
from micro.url import seconds

F = TypeVar("F", bound=Callable[..., Any])

_CLOCK = "1m"
#: What of a service concerns no other command.
_MORE = (
    "register_ttl",
    "register_interval",
    "server_address",
    "server_advertise",
    "server_name",
)
_EPILOG = """\b
Examples:
  micro doctor
  micro doctor --registry etcd://127.0.0.1:2379 --server_address 0.0.0.0:8080

Exit status: 0 when no check failed, 1 when one did, 130 when it was interrupted; otherwise as with
the other commands."""
_ALONE = (
    "bring up the interface that others are on, if there are others; a container may need "
    "the network of its host"
)
_FIREWALL = (
    "let UDP to 224.0.0.251, port 5353, pass in and out, as with: ufw allow 5353/udp; or use a "
    "registry with a server"
)


def _seconds(_: click.Context, __: click.Parameter, value: str) -> float:
    return seconds(value, "--clock")


def _options(function: F) -> F:
    return _arguments.setting_options(function, (*_arguments._OPTIONS, *_MORE))


@click.command("doctor", epilog=_EPILOG)
@click.option(
    "--clock",
    metavar="TIME",
    default=_CLOCK,
    callback=_seconds,
    help=f"how long the check of the server's clock may take; 0 skips it; default {_CLOCK}",
)
@click.option(
    "--server_insecure",
    is_flag=True,
    flag_value="true",
    default=None,
    expose_value=False,
    callback=_arguments._keep,
    help="listen beyond this machine without TLS",
)
@_options
@click.pass_context
def doctor_command(ctx: click.Context, clock: float) -> int:
    """Try the registry and the transport that a service would use, end to end.

    With the flags and variables of that service. What is wrong is told, and how to mend it. It
    registers probes of its own, under a name that nobody has, and takes them away again.
    """
    settings = Settings(_arguments.given(ctx))
    level = settings.text("log_level", None, _arguments.LOG_LEVEL)
    configure(level.text, source=level.source, colour=settings.colour)
    as_json = _arguments.wants_json(ctx)
    parts = asyncio.run(_Doctor(settings, clock=clock, shows=not as_json).run())
    if as_json:
        _output.show_json(_checks.as_json(parts))
    else:
        _checks.show_end(parts)
    return _output.Exit.OK if _checks.is_healthy(parts) else _output.Exit.ERROR


class _Doctor:
    """Makes the checks of all parts; with ``shows`` it prints each when it is over."""

    def __init__(self, settings: Settings, *, clock: float, shows: bool) -> None:
        self._settings = settings
        self._clock = clock
        self._shows = shows
        self._plugins = Plugins()
        self._parts: list[Part] = []

    async def run(self) -> list[Part]:
        async with AsyncExitStack() as stack:
            runs: list[Running] = []

            async def resolve() -> str:
                service = _arguments.Caller("micro", plugins=self._plugins)
                service._configure(self._settings)
                for _ in range(2):  # two clients, as of two services
                    runs.append(service._check(self._settings))
                    stack.push_async_callback(runs[-1].aclose)
                return "in order"

            await self._part("settings", "", "", lambda checks: checks.run("settings", resolve))
            if runs:
                await self._registry(*runs)
                await self._transport(runs[0])
        return self._parts

    async def _registry(self, one: Running, two: Running) -> None:
        url = one._registry.url

        async def examine(checks: Checks) -> None:
            asking = RegistryChecks(checks, one, two, clock=self._clock, plugins=self._plugins)
            try:
                await asking.run(_multicast if url.scheme == "mdns" else None)
            finally:
                await asking.aclose()

        address = self._settings.text("registry_address", None)
        replaced = address.text and address.rank >= self._settings.text("registry", None).rank
        source = f"{url.source} and {address.source}" if replaced else url.source
        await self._part("registry", str(url), source, examine)

    async def _transport(self, running: Running) -> None:
        urls = [transport.url for transport in running._transports]

        async def examine(checks: Checks) -> None:
            await TransportChecks(checks, running, Service("micro")).run()

        await self._part("transport", ",".join(map(str, urls)), urls[0].source, examine)

    async def _part(
        self, kind: str, url: str, source: str, examine: Callable[[Checks], Awaitable[object]]
    ) -> None:
        where = f"--{kind} (MICRO_{kind.upper()})" if source in ("default", "") else source
        if self._shows and url:
            _checks.show_part(kind, url, source)
        checks = Checks(where, self._show)
        await examine(checks)
        self._parts.append(Part(kind=kind, url=url, source=source, checks=checks.found))

    def _show(self, finding: Finding) -> None:
        if self._shows and (self._parts or finding.state == "failed"):  # settings in order: no news
            _checks.show_finding(finding)


async def _multicast() -> str:
    """Whether what this host says by multicast comes back to it, by each interface."""
    from micro.backends._mdns_reach import heard

    found = await heard()
    back = [name for name, came in found.items() if came]
    lost = [name for name, came in found.items() if not came]
    seen = f"heard itself on {', '.join(back) or 'no interface'}"
    if lost:
        state: _checks.State = "warning" if back else "failed"
        raise Flaw(f"{seen}; nothing came back on {', '.join(lost)}", _FIREWALL, state=state)
    if all(name.startswith("lo") for name in back):
        raise Flaw(f"{seen}: nodes of this host alone are seen", _ALONE, state="warning")
    return seen
