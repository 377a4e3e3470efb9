"""What all rounds say: figures, ratios, and which promises hold."""

from __future__ import annotations

import datetime as dt
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from bench.load import Point
from bench.processes import CORES
from bench.programs import Programs
from bench.rounds import Spread, spread
from bench.rows import LOADS, MEASURES, ROWS, Row

_PACKAGES = (
    *("micro-core", "msgspec", "httptools", "uvloop", "grpcio", "protobuf"),
    *("fastapi", "pydantic", "uvicorn", "aiohttp", "nats-py"),
)
#: What follows the name of a measure, where it is a ratio to the base of its load.
OVER_BASE = "_over_base"
#: What was measured: by load, by peer, round for round.
Rounds = Mapping[str, Mapping[str, Sequence[Point]]]


class Effort(msgspec.Struct, frozen=True):
    """How long to measure: the rounds of what has to be known finely, and of all else; seconds."""

    fine_rounds: int
    rounds: int
    seconds: float


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured; nothing that names the machine."""

    date: str
    system: str
    cpus: int
    versions: tuple[str, ...]

    @classmethod
    def this(cls, programs: Programs) -> Machine:
        beside = [f"{_said(programs.beside, '--version')} beside it"] if programs.beside else []
        tools = [
            *([_said(programs.go, "version")] if programs.go else []),
            *(["wrk"] if programs.wrk else []),
        ]
        quick = f"{interpreter_ns():.0f} ns to make an object, call it and keep the result"
        return cls(
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            system=f"{platform.system()} {platform.machine()}",
            cpus=len(CORES),
            versions=(
                f"{platform.python_implementation()} {platform.python_version()} ({quick})",
                *beside,
                *(f"{name} {_version(name)}" for name in _PACKAGES),
                *tools,
            ),
        )


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A row and what was measured of it; None where it was not."""

    row: Row
    measured: Spread | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "NOT MEASURED"
        if self._reaches(self.row.goal):
            return "goal met"
        return "floor met" if self._reaches(self.row.floor) else "FLOOR MISSED"

    @property
    def is_bad(self) -> bool:
        return self.verdict.isupper()

    def _reaches(self, bound: float) -> bool:
        assert self.measured is not None
        more = MEASURES[self.row.measure].more
        return self.measured.median >= bound if more else self.measured.median <= bound


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """All that is told. ``figures`` is by load, by peer, by measure."""

    machine: Machine
    effort: Effort
    rows: tuple[Result, ...]
    figures: dict[str, dict[str, dict[str, Spread]]]

    @classmethod
    def of(cls, machine: Machine, effort: Effort, rounds: Rounds) -> Results:
        return cls(
            machine=machine,
            effort=effort,
            rows=tuple(
                Result(row=row, measured=_compared(row, rounds[row.load]))
                for row in ROWS
                if row.load in rounds
            ),
            figures={
                load: {
                    peer: _figures(points, peers.get(LOADS[load].base, ()))
                    for peer, points in peers.items()
                }
                for load, peers in rounds.items()
            },
        )

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        verdicts = [
            {**row, "verdict": result.verdict}
            for row, result in zip(msgspec.to_builtins(self.rows), self.rows, strict=True)
        ]
        return {**msgspec.to_builtins(self), "rows": verdicts}


def _figures(points: Sequence[Point], base: Sequence[Point]) -> dict[str, Spread]:
    figures = {name: spread(point[name] for point in points) for name in points[0]}
    ratios = {
        name + OVER_BASE: found
        for name in figures
        if MEASURES[name].ratio and (found := _ratio(name, points, base))
    }
    return figures | ratios


def _compared(row: Row, peers: Mapping[str, Sequence[Point]]) -> Spread | None:
    ours = peers.get(row.peer, ())
    if row.base is None:
        return spread(point[row.measure] for point in ours) if ours else None
    return _ratio(row.measure, ours, peers.get(row.base, ()))


def _ratio(measure: str, ours: Sequence[Point], base: Sequence[Point]) -> Spread | None:
    """One over the other, round for round: a machine that is slow for a while is slow for both."""
    ratios = [one[measure] / other[measure] for one, other in zip(ours, base, strict=False)]
    return spread(ratios) if ratios else None


def _said(program: str | None, *args: str) -> str:
    done = subprocess.run([str(program), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


class _Adder:
    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def add(self, number: int) -> int:
        return self.number + number


def interpreter_ns() -> float:
    """How quick this interpreter is here: nothing tells whether it was built with a profile."""
    return min(_round_ns(50_000) for _ in range(7))


def _round_ns(times: int) -> float:
    kept: dict[int, tuple[int, int]] = {}
    total = 0
    began = time.perf_counter_ns()
    for number in range(times):
        total += _Adder(number).add(1)
        kept[number & 255] = (total, number)
    return (time.perf_counter_ns() - began) / times


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
