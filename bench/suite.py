"""The benchmarks by name, and the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from bench.echo import echo
from bench.processes import compile_ours, keep_to_the_client_s_core
from bench.report import Machine, Results, markdown
from bench.rounds import Effort
from bench.startup import imports, starts

HERE = Path(__file__).parent


WHOLE = Effort(41, 7, 1.0)
QUICK = Effort(7, 2, 0.4)


def _imports(results: Results, effort: Effort) -> None:
    results.imports = imports(effort.process_rounds)


def _starts(results: Results, effort: Effort) -> None:
    results.starts = starts(effort.process_rounds)


def _echo(results: Results, effort: Effort) -> None:
    results.echo = echo(effort.load_rounds, effort.load_seconds)


BENCHMARKS: dict[str, Callable[[Results, Effort], None]] = {
    "import": _imports,
    "start": _starts,
    "echo": _echo,
}


def run(args: Sequence[str]) -> int:
    """Measure, print, write what was measured whole; 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds; writes no files")
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark; writes no files")
    chosen = parser.parse_args(args)
    effort = QUICK if chosen.quick else WHOLE
    results = Results(machine=Machine.this(), effort=effort)
    compile_ours()
    keep_to_the_client_s_core()
    for name, benchmark in BENCHMARKS.items():
        if chosen.only in (None, name):
            print(f"measuring {name} ...", file=sys.stderr)
            benchmark(results, effort)
    print(markdown(results))
    if not chosen.quick and chosen.only is None:
        _write(results)
    missed = [goal for goal in results.goals() if not goal.met]
    for goal in missed:
        print(f"missed: {goal.what} is {goal.ratio:.2f}, {goal.at_most} at most", file=sys.stderr)
    return 1 if missed else 0


def _write(results: Results) -> None:
    (HERE / "RESULTS.md").write_text(markdown(results))
    told = _rounded({**msgspec.to_builtins(results), "goals": msgspec.to_builtins(results.goals())})
    text = msgspec.json.format(msgspec.json.encode(told), indent=2)
    (HERE / "results.json").write_bytes(text + b"\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
