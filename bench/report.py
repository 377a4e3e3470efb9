"""What is told: facts of the machine, goals, tables."""

from __future__ import annotations

import datetime as dt
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import msgspec
from bench.echo import BASE, Level
from bench.processes import CORES
from bench.rounds import Effort, Spread
from bench.startup import Cost

_PACKAGES = (
    *("micro-core", "msgspec", "httptools", "uvloop"),
    *("grpcio", "protobuf", "fastapi", "pydantic", "uvicorn"),
)


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured; nothing that names the machine."""

    date: str
    system: str
    cpus: int
    python: str
    packages: dict[str, str]

    @classmethod
    def this(cls) -> Machine:
        return cls(
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            system=f"{platform.system()} {platform.machine()}",
            cpus=len(CORES),
            python=f"{platform.python_implementation()} {platform.python_version()}",
            packages={name: _version(name) for name in _PACKAGES},
        )


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio by the clock that must not be passed."""

    what: str
    ratio: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.at_most


class Results(msgspec.Struct, kw_only=True):
    """All that was measured; empty where it was not asked for."""

    machine: Machine
    effort: Effort
    imports: dict[str, Cost] = {}
    starts: dict[str, Cost] = {}
    echo: dict[str, dict[str, Level]] = {}

    def goals(self) -> list[Goal]:
        goals: list[Goal] = []
        if self.imports:
            ratio = self.imports["micro"].wall_ratio
            goals.append(Goal(what="import micro / import asyncio", ratio=ratio, at_most=1.3))
        if self.starts:
            ratio = self.starts["micro"].wall_ratio
            goals.append(
                Goal(what="start to serving / FastAPI + uvicorn", ratio=ratio, at_most=0.35)
            )
        return goals


def markdown(results: Results) -> str:
    """The whole report."""
    sections = [_head(results), _goals(results.goals())]
    if results.imports:
        about = "Process start to exit, milliseconds."
        sections.append(_costs("Import", about, results.imports, "asyncio"))
    if results.starts:
        about = (
            "Process start to the first `POST /Helloworld/Call` answered and checked, in ms. "
            "`service.run()` with the memory registry; `uvicorn.run()`."
        )
        sections.append(_costs("Start to serving", about, results.starts, "FastAPI + uvicorn"))
    if results.echo:
        sections.append(_echo(results.echo))
    return "\n".join(sections)


def _head(results: Results) -> str:
    machine, effort = results.machine, results.effort
    packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
    return (
        "# Results\n\n"
        "Written by `python bench/run.py`; README.md says how it measures. Trust the ratios, which "
        "hold within one run, and not the absolute figures.\n\n"
        f"{machine.date}, {machine.cpus} CPUs, {machine.system}, {machine.python}; {packages}. "
        f"Medians of {effort.process_rounds} rounds of processes, {effort.load_rounds} of load.\n"
    )


def _goals(goals: Iterable[Goal]) -> str:
    rows = [
        [goal.what, f"{goal.ratio:.2f}", f"{goal.at_most:.2f}", "yes" if goal.met else "**NO**"]
        for goal in goals
    ]
    return f"## Goals\n\n{_table(['ratio', 'measured', 'at most', 'met'], rows)}" if rows else ""


def _costs(title: str, about: str, costs: Mapping[str, Cost], base: str) -> str:
    rows = [
        [
            name,
            _spread(cost.wall_ms, "{:.0f}"),
            f"{cost.wall_ratio:.2f}",
            _spread(cost.cpu_ms, "{:.0f}"),
            f"{cost.cpu_ratio:.2f}",
        ]
        for name, cost in costs.items()
    ]
    names = ["", "wall (min-max)", f"x {base}", "CPU (min-max)", f"x {base}"]
    return f"## {title}\n\n{about}\n\n{_table(names, rows)}"


def _echo(levels: Mapping[str, Mapping[str, Level]]) -> str:
    rows = [
        [
            callers,
            name,
            _spread(level.calls_per_s, "{:,.0f}"),
            f"{level.calls_per_s.median / competitors[BASE].calls_per_s.median:.2f}",
            f"{level.p50_us.median:,.0f} / {level.p99_us.median:,.0f}",
            f"{level.client_cpu_us.median:.0f} + {level.server_cpu_us.median:.0f}",
            f"1/{_cpu_us(competitors[BASE]) / _cpu_us(level):.1f}",
        ]
        for callers, competitors in levels.items()
        for name, level in competitors.items()
    ]
    names = [
        "callers", "", "calls/s (min-max)", "x grpc.aio", "p50 / p99 us",
        "CPU us client + server", "CPU x grpc.aio",
    ]  # fmt: skip
    return (
        "## Unary echo over http\n\n"
        '`{"name":"Alice"}` -> `{"message":"Hello Alice"}`, a process for each side. Ours: a typed '
        "client of a Service, JSON over HTTP/1.1, a connection for each caller. grpc.aio: protobuf "
        "over HTTP/2, one channel. No goals yet.\n\n"
        f"{_table(names, rows)}"
    )


def _table(names: list[str], rows: list[list[str]]) -> str:
    lines = [names, ["---" if not name else "--:" for name in names], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _spread(value: Spread, form: str) -> str:
    return f"{form.format(value.median)} ({form.format(value.min)}-{form.format(value.max)})"


def _cpu_us(level: Level) -> float:
    return level.client_cpu_us.median + level.server_cpu_us.median


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
