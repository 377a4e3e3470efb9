"""``micro verify``: what a server promises is tried, by the suite that every backend passes."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import click
import msgspec

from micro.cli import _arguments, _output, _suite
from micro.cli._checks import bounded
from micro.cli._report import time_text
from micro.cli._suite import Event, Task
from micro.errors import ConfigError, FailedPrecondition
from micro.logs import printable
from micro.plugins import KINDS, Plugins
from micro.registry import Node, Registry, RegistryFeatures
from micro.url import URL

#: Seconds that each step of a first look at the server may take.
_LOOK = 15.0
#: What the suites import.
_NEEDED = ("cryptography", "hypothesis", "pytest", "pytest_asyncio")
_WORDS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}
_COLOURS = {"passed": "green", "failed": "red"}
#: How many rows of operations are compared with the model, and how long: less where each waits.
_MODEL, _SLOW_MODEL = (10, 30), (3, 8)
#: Lines of an error that are shown.
_LINES = 6
_EPILOG = """\b
Examples:
  micro verify etcd://127.0.0.1:2379
  micro verify etcd://127.0.0.1:2379/staging -k "watch and not history"

Exit status: 0 when every promise was kept, 1 when one was not or something is left behind, 130
when it was interrupted; otherwise as with the other commands."""


class Results(msgspec.Struct, kw_only=True):
    """What ``micro verify --json`` prints; docs/verify.md says what each field is."""

    url: str
    namespace: str
    seed: int
    features: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    interrupted: bool = False
    left: list[str] = msgspec.field(default_factory=list)
    promises: list[dict[str, Any]] = msgspec.field(default_factory=list)

    def take(self, event: Event) -> None:
        """Add what an event tells."""
        self.features = event.features or self.features
        self.left.extend(event.left)
        if event.event == "ended":
            setattr(self, event.outcome, getattr(self, event.outcome) + 1)
            shown = ("promise", "outcome", "seconds", "why", "text")
            self.promises.append({name: getattr(event, name) for name in shown})

    @property
    def status(self) -> _output.Exit:
        """The status to exit with."""
        if self.interrupted:
            return _output.Exit.INTERRUPTED
        return _output.Exit.ERROR if self.failed or self.left else _output.Exit.OK


@click.command("verify", epilog=_EPILOG)
@click.argument("url")
@click.option(
    "-k", "only", metavar="TEXT", default="", help="only promises that match, as of pytest"
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="repeat the chance of another run")
@_arguments.json_option
@click.pass_context
def verify_command(ctx: click.Context, url: str, only: str, seed: int | None) -> int:
    """Try on the server at URL what every registry promises.

    In a namespace of its own, inside that of URL: it touches nothing else, and takes away what it
    registered. What would stop the server, or needs more than a URL, is skipped. It is a load:
    hundreds of nodes, dozens of clients, for minutes.
    """
    _check_needed()
    place = _Place(url)
    features = asyncio.run(place.look())
    examples, steps = _SLOW_MODEL if features.converge > 1 else _MODEL
    seed = random.getrandbits(32) if seed is None else seed
    results = Results(url=str(place.url), namespace=URL.parse(place.own).path, seed=seed)
    task = Task(url=place.own, inner_url=place.inner, seed=seed, examples=examples, steps=steps)
    if _arguments.wants_json(ctx):
        results.interrupted = not _suite.run(task, only, results.take)
        _output.show_json(msgspec.to_builtins(results))
        return results.status

    def hear(event: Event) -> None:
        results.take(event)
        _show(event)

    title = f"registry {results.url}, in the namespace {results.namespace}"
    click.echo(click.style(printable(title), bold=True))
    results.interrupted = not _suite.run(task, only, hear)
    _show_end(results)
    return results.status


def _check_needed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-")
        raise ConfigError(f"micro verify needs the extra 'testing', or: pip install {names}")


# -- where it works -------------------------------------------------------------------------------


class _Place:
    """The user's ``url``, and two namespaces inside of it that nobody else has.

    Raises:
        ConfigError: it is no URL, or that of another kind than a registry.
    """

    def __init__(self, text: str) -> None:
        self.url = URL.parse(text, source="URL")
        self._plugins = Plugins()
        known = [self._plugins.schemes(kind) for kind in KINDS]
        if self.url.scheme in known[1] and self.url.scheme not in known[0]:
            raise ConfigError(
                f"URL: {self.url.scheme!r} is a transport; there is a suite for registries alone"
            )
        self._registry(text)  # says what is wrong with the scheme
        token = uuid.uuid4().hex
        server, question, options = text.strip().partition("?")
        scheme, _, rest = server.partition("://")
        if scheme == "mdns":  # a domain: its name takes from what services may be called
            names = [f"mdns:///{token[:6]}", f"mdns:///{token[:6]}x"]
        else:
            if scheme == "memory" and not rest.partition("/")[0]:
                rest = "verify"  # a nameless one is private to one client
            inside = f"{scheme}://{rest.rstrip('/')}/verify-{token[:12]}"
            names = [inside, f"{inside}/other"]
        self.own, self.inner = (f"{name}{question}{options}" for name in names)
        self._text = text

    async def look(self) -> RegistryFeatures:
        """See that the server answers, and that what is in our namespace is nowhere else.

        Raises:
            MicroError: it does not answer, or refuses us.
            FailedPrecondition: it keeps no namespaces apart; nothing was left there.
        """
        node = Node(service=f"verify-{uuid.uuid4().hex[:12]}", id="probe", address="127.0.0.1:9")
        refusal = (
            f"URL: {self.url}: the registry does not keep namespaces apart, so that others would "
            "be disturbed; nothing was tried"
        )
        async with self._open(self._text) as outside, self._open(self.own) as ours:
            if await bounded(ours.services(), _LOOK):
                raise FailedPrecondition(refusal)
            try:
                await bounded(ours.register(node, ttl=max(30, ours.features.min_ttl)), _LOOK)
                if node.service in await bounded(outside.services(), _LOOK):
                    raise FailedPrecondition(refusal)
            finally:
                await bounded(ours.deregister(node), _LOOK)
            return ours.features

    def _registry(self, text: str) -> Registry:
        kind: type[Registry] = Registry  # type: ignore[type-abstract]
        return self._plugins.create(kind, URL.parse(text, source="URL"))

    @asynccontextmanager
    async def _open(self, text: str) -> AsyncIterator[Registry]:
        registry, connections = self._registry(text), self._plugins.connections()
        try:
            await bounded(registry.connect(connections), _LOOK)
            yield registry
        finally:
            await registry.aclose()
            await connections.aclose()


# -- what is printed ------------------------------------------------------------------------------


def _show(event: Event) -> None:
    if event.event != "ended":
        return
    word = f"{_WORDS[event.outcome]:<8}"
    colour = _COLOURS.get(event.outcome)
    state = click.style(word, fg=colour) if colour else word
    name, bracket, case = event.promise.partition("[")
    promise = name.replace("_", " ") + (f" [{case}" if bracket else "")
    tail = f"({event.why})" if event.outcome == "skipped" else time_text(event.seconds)
    click.echo(f"  {state} {printable(promise)}  {click.style(printable(tail), dim=True)}")
    if event.outcome == "failed":
        for line in event.why.splitlines()[:_LINES]:
            click.echo(f"           {printable(line)}")


def _show_end(results: Results) -> None:
    counts = ", ".join(
        f"{count} {_WORDS[name].lower()}"
        for name in ("passed", "failed", "skipped")
        if (count := getattr(results, name))
    )
    number = len(results.promises)
    click.echo(f"\n{number} promise{'' if number == 1 else 's'}: {counts or 'none tried'}")
    if results.features:
        click.echo(printable(f"features: {results.features}"))
    broken = [one["promise"] for one in results.promises if one["outcome"] == "failed"]
    if broken:
        names = " or ".join(dict.fromkeys(name.partition("[")[0] for name in broken))
        click.echo(f"again: --seed {results.seed} -k {names if len(broken) == 1 else repr(names)}")
    for text in results.left:
        click.echo(printable(f"LEFT BEHIND until their time to live ends: {text}"))
