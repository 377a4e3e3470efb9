"""What ``micro doctor`` finds: one check after the other, each in its time, and how it is told."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import click
import msgspec

from micro.cli._report import time_text
from micro.errors import (
    ConfigError,
    DeadlineExceeded,
    MicroError,
    PermissionDenied,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from micro.logs import printable

T = TypeVar("T")
State: TypeAlias = Literal["ok", "warning", "failed", "skipped"]
#: Hears of each check when it is over.
Tell: TypeAlias = Callable[["Finding"], None]

#: What helps against an error of a backend, whichever it is; ``{where}`` is the setting.
_REMEDIES: Mapping[type[MicroError], str] = {
    ConfigError: "correct the setting, as the text says",
    Unauthenticated: (
        "give {where} a login that the server knows: scheme://name:password@host, or as the text "
        "says; a file may hold the secret"
    ),
    PermissionDenied: (
        "have the server give this user the right to read and to write there, "
        "or use another user in {where}"
    ),
    TooLarge: "have the server take larger entries, or register less metadata",
    ResourceExhausted: "give the server more room, or let fewer clients ask it less often",
    Unsupported: "set what the text names, or use another server in {where}",
    Unavailable: "start the server, or correct the address in {where}; is a firewall between?",
    DeadlineExceeded: "the server is there and does not answer: is it stopped, or overloaded?",
}
_OTHERWISE = "see the log of the server, and run this again with --log_level debug"
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one check: what was seen in how many seconds, and what to do about it."""

    check: str
    state: State
    seconds: float
    seen: str
    mend: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """The checks of one backend; ``source`` says where the choice of it came from."""

    kind: str
    url: str
    source: str
    checks: Sequence[Finding]


class Flaw(Exception):
    """What is wrong, from within a check: what was seen, and what to do about it."""

    def __init__(self, seen: str, mend: str = "", *, state: State = "failed") -> None:
        super().__init__(seen)
        self.seen = seen
        self.mend = mend
        self.state: State = state


class Checks:
    """The checks of one backend, in turn. ``where`` is the setting that chose it."""

    def __init__(self, where: str, tell: Tell) -> None:
        self.found: list[Finding] = []
        self._where = where
        self._tell = tell

    async def run(
        self,
        name: str,
        body: Callable[[], Awaitable[str]],
        *,
        within: float = math.inf,
        needs: Collection[str] = (),
    ) -> None:
        """Make one check.

        ``body`` returns what it saw, or raises Flaw or a MicroError; it has ``within`` seconds. It
        is skipped when one of those that it ``needs`` has failed, or was skipped.
        """
        if any(one.check in needs and one.state in ("failed", "skipped") for one in self.found):
            cause = next(one.check for one in self.found if one.state == "failed")
            seen = f"not tried, as {cause!r} failed"
            self._add(Finding(check=name, state="skipped", seconds=0, seen=seen))
            return
        began = time.monotonic()
        state, seen, mend = await self._outcome(body, within)
        seconds = time.monotonic() - began
        self._add(Finding(check=name, state=state, seconds=seconds, seen=seen, mend=mend))

    async def _outcome(
        self, body: Callable[[], Awaitable[str]], within: float
    ) -> tuple[State, str, str]:
        try:
            return "ok", await bounded(body(), within), ""
        except Flaw as flaw:
            return flaw.state, flaw.seen, flaw.mend
        except MicroError as exc:
            texts = (text for kind, text in _REMEDIES.items() if isinstance(exc, kind))
            return "failed", str(exc), next(texts, _OTHERWISE).format(where=self._where)
        except Exception as exc:  # a backend of others may raise anything, and that is a finding
            return "failed", f"{type(exc).__name__}: {exc}", _OTHERWISE

    def _add(self, finding: Finding) -> None:
        self.found.append(finding)
        self._tell(finding)


async def timed(seconds: float, often: int, body: Callable[[], Awaitable[object]]) -> list[float]:
    """How long ``body`` took each time, ``often`` times or for ``seconds``; once at least."""
    until = time.monotonic() + seconds
    took: list[float] = []
    while len(took) < often and (not took or time.monotonic() < until):
        began = time.monotonic()
        await body()
        took.append(time.monotonic() - began)
    return sorted(took)


def quantile(took: Sequence[float], share: float) -> float:
    """That of sorted times which a share of them does not exceed."""
    return took[math.ceil(len(took) * share) - 1]


def shown(took: Sequence[float]) -> str:
    """The middle and the end of sorted times."""
    return f"p50 {time_text(quantile(took, 0.5))}, p99 {time_text(quantile(took, 0.99))}"


async def bounded(what: Awaitable[T], within: float) -> T:
    """What comes of it, within so many seconds.

    Raises:
        DeadlineExceeded: it takes longer.
    """
    timer = asyncio.timeout(None if within == math.inf else within)
    try:
        async with timer:
            return await what
    except TimeoutError:
        if not timer.expired():
            raise
        raise DeadlineExceeded(f"no answer in {within:g} s") from None


# -- what is printed ------------------------------------------------------------------------------


def show_part(kind: str, url: str, source: str) -> None:
    """Print whose checks follow."""
    where = "the default" if source == "default" else f"from {source}"
    click.echo(f"{click.style(printable(f'{kind} {url}'), bold=True)} ({printable(where)})")


def show_finding(finding: Finding) -> None:
    """Print a line of what was seen, and one of what to do."""
    word = finding.state.upper() if finding.state == "failed" else finding.state
    colour = _COLOURS.get(finding.state)
    state = click.style(f"{word:<8}", fg=colour) if colour else f"{word:<8}"
    click.echo(f"  {state} {finding.check:<10} {printable(finding.seen)}")
    if finding.mend:
        click.echo(f"{'':>22}-> {printable(finding.mend)}")


def as_json(parts: Sequence[Part]) -> dict[str, Any]:
    """What ``micro doctor --json`` prints."""
    return {"healthy": is_healthy(parts), "parts": msgspec.to_builtins(parts)}


def is_healthy(parts: Sequence[Part]) -> bool:
    """Whether no check failed."""
    return not any(one.state == "failed" for part in parts for one in part.checks)


def show_end(parts: Sequence[Part]) -> None:
    """Print how many checks there were, and how they went."""
    states = [one.state for part in parts for one in part.checks]
    told = [f"{states.count(state)} {state}" for state in ("ok", "warning", "failed", "skipped")]
    click.echo(f"\n{len(states)} checks: {', '.join(one for one in told if one[0] != '0')}")
