"""What ``micro bench`` tells of a load that is over: as JSON, and for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import click
import msgspec

from micro.cli import _output
from micro.cli._load import SECOND, Histogram, Load, Tally
from micro.logs import printable
from micro.routes import Counts

#: Characters of the longest bar.
_BAR = 40
#: The share of a core from which on this process is as likely the limit as the service is.
_BUSY = 0.9
_UNITS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds."""

    min: float
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Calls that took ``up_to`` seconds, and longer than those of the row before."""

    up_to: float
    calls: int


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Calls that failed alike; the text is that of the first, ``longest`` in seconds."""

    kind: str
    calls: int
    longest: float
    detail: str


class Uncounted(msgspec.Struct, frozen=True, kw_only=True):
    """Calls of the warm-up."""

    calls: int
    failed: int
    unfinished: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What ``micro bench --json`` prints; docs/bench.md says what each field is."""

    service: str
    endpoint: str
    callers: int
    rate: float | None
    seconds: float
    interrupted: bool
    calls: int
    succeeded: int
    failed: int
    unfinished: int
    missed: int
    calls_per_second: float
    latency: Latency | None
    histogram: list[Row]
    errors: list[Errors]
    warm_up: Uncounted
    cpu: float
    client: dict[str, int]

    @property
    def status(self) -> _output.Exit:
        """The status to exit with."""
        if self.interrupted:
            return _output.Exit.INTERRUPTED
        return _output.Exit.ERROR if self.failed or not self.succeeded else _output.Exit.OK


def report(load: Load, service: str, endpoint: str, counts: Counts) -> Report:
    """What came of a load that is over; ``counts`` are those of the client that carried it."""
    tally, before = load.measured, load.warm_up
    return Report(
        service=service,
        endpoint=endpoint,
        callers=load.callers,
        rate=load.rate,
        seconds=load.seconds,
        interrupted=load.interrupted,
        calls=tally.succeeded + tally.failed,
        succeeded=tally.succeeded,
        failed=tally.failed,
        unfinished=tally.unfinished,
        missed=load.missed,
        calls_per_second=load.done / load.seconds if load.seconds else 0.0,
        latency=_latency(tally.latencies) if tally.succeeded else None,
        histogram=[Row(up_to=up_to, calls=calls) for up_to, calls in tally.latencies.rows()],
        errors=_errors(tally),
        warm_up=Uncounted(
            calls=before.succeeded + before.failed,
            failed=before.failed,
            unfinished=before.unfinished,
        ),
        cpu=load.cpu,
        client=msgspec.to_builtins(counts),
    )


def _latency(latencies: Histogram) -> Latency:
    p50, p90, p99, p999 = latencies.percentiles(0.5, 0.9, 0.99, 0.999)
    return Latency(
        min=latencies.smallest / SECOND,
        mean=latencies.total / latencies.count / SECOND,
        p50=p50,
        p90=p90,
        p99=p99,
        p999=p999,
        max=latencies.largest / SECOND,
    )


def _errors(tally: Tally) -> list[Errors]:
    """The most frequent first."""
    found = [
        Errors(
            kind=kind,
            calls=failure.calls,
            longest=failure.longest / SECOND,
            detail=str(failure.error),
        )
        for kind, failure in tally.failures.items()
    ]
    return sorted(found, key=lambda errors: -errors.calls)


def show(told: Report) -> None:
    """Print a report for people."""
    rate = f", {told.rate:,g} calls/s asked for" if told.rate else ""
    title = f"{told.service} {told.endpoint}: {told.callers:,} callers, {told.seconds:.3g} s{rate}"
    click.echo(click.style(printable(title), bold=True))
    click.echo()
    _show_pairs(
        ("calls", f"{told.calls:,}"),
        ("succeeded", f"{told.succeeded:,}"),
        ("failed", f"{told.failed:,}"),
        ("calls/s", f"{told.calls_per_second:,.1f}"),
    )
    if told.latency is not None:
        click.echo()
        names = {"p999": "p99.9"}
        times = msgspec.structs.asdict(told.latency).items()
        _show_pairs(*((names.get(name, name), time_text(value)) for name, value in times))
        click.echo()
        _show_bars(told.histogram)
    if told.errors:
        click.echo()
        rows = [[f"{e.calls:,}", time_text(e.longest), e.kind, e.detail] for e in told.errors]
        _output.show_table(rows, title=("FAILED", "LONGEST", "ERROR", "THE FIRST SAID"))
    for remark in _remarks(told):
        click.echo(f"\n{remark}")


def _show_pairs(*pairs: tuple[str, str]) -> None:
    width = max(len(value) for _, value in pairs)
    _output.show_table([[name, value.rjust(width)] for name, value in pairs], indent="  ")


def _show_bars(rows: Sequence[Row]) -> None:
    most = max(row.calls for row in rows)
    width = len(f"{most:,}")
    table = [
        [
            f"up to {time_text(row.up_to):>7}",
            f"{row.calls:>{width},}",
            "#" * math.ceil(row.calls / most * _BAR),
        ]
        for row in rows
    ]
    _output.show_table(table, indent="  ")


def _remarks(told: Report) -> Iterator[str]:
    """What a reader has to know before believing the figures."""
    if told.interrupted:
        yield f"Interrupted; {told.unfinished:,} calls had not ended."
    if told.failed and told.succeeded:
        yield "The times are those of the calls that succeeded."
    if told.warm_up.failed:
        failed, calls = told.warm_up.failed, told.warm_up.calls
        yield f"Of the {calls:,} calls of the warm-up, which are not counted, {failed:,} failed."
    if told.missed and told.rate:
        due = told.missed + told.calls + told.unfinished
        yield (
            f"The rate was NOT reached: of {due:,} calls due {told.missed:,} never began, as "
            f"{told.callers:,} ran;\nthe times above do not have them. Either the service "
            "cannot do more, or it takes more callers (-c)."
        )
    if told.cpu >= _BUSY and (told.missed or not told.rate):
        yield (
            f"This process used {told.cpu:.0%} of a core: it is as likely the limit as the "
            "service is. Run several at once."
        )
    decided = ", ".join(f"{name} {count:,}" for name, count in told.client.items() if count)
    if decided:
        yield f"The client decided: {decided}."


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    unit, size = next((one for one in _UNITS if seconds >= 0.9995 * one[1]), _UNITS[-1])
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"
