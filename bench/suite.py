"""Benchmarks side by side with peers: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from bench.load import Point
from bench.points import Turn
from bench.processes import prepare
from bench.programs import Programs, find
from bench.report import markdown
from bench.results import Effort, Machine, Results
from bench.rounds import in_turns
from bench.rows import ASKED, LOADS, Load

HERE = Path(__file__).parent

WHOLE = Effort(21, 7, 1.0)
QUICK = Effort(5, 2, 0.4)


def run(args: Sequence[str]) -> int:
    """Measure, print, write what was measured whole; 1 when a floor that gates was missed."""
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few, short rounds; writes no files")
    parser.add_argument("--only", choices=LOADS, action="append", help="one load; writes no files")
    parser.add_argument("--beside", help="a second Python, with the same packages")
    chosen = parser.parse_args(args)
    effort = QUICK if chosen.quick else WHOLE
    programs = find(chosen.beside)
    pythons = [sys.executable, *([chosen.beside] if chosen.beside else [])]
    prepare(pythons, [HERE, *map(Path, _folder_of_micro())])
    rounds = {name: _rounds(programs, load, effort) for name, load in _chosen(chosen.only).items()}
    results = Results.of(Machine.this(programs), effort, rounds)
    print(markdown(results))
    if not chosen.quick and not chosen.only:
        _write(results)
    return _verdict(results)


def _chosen(names: Sequence[str] | None) -> dict[str, Load]:
    return {name: load for name, load in LOADS.items() if not names or name in names}


def _folder_of_micro() -> list[str]:
    spec = find_spec("micro")
    assert spec is not None
    return list(spec.submodule_search_locations or ())


def _rounds(programs: Programs, load: Load, effort: Effort) -> dict[str, list[Point]]:
    print(f"measuring {load.title} ...", file=sys.stderr)
    is_process = load.kind in ("import", "start")
    competitors = {
        name: Turn(programs=programs, load=load, peer=name, seconds=effort.seconds).measure
        for name in load.peers
        if programs.has(load, name)
    }
    # Of a registry and its raw client, a tenth has to be told from the moods of the machine.
    is_fine = is_process or load.kind in ASKED
    rounds = effort.fine_rounds if is_fine else effort.rounds
    # The first two rounds of processes fill the cache of files.
    return in_turns(competitors, rounds=rounds, warm_up=2 if is_process else 0)


def _verdict(results: Results) -> int:
    bad = [result for result in results.rows if result.is_bad]
    for result in bad:
        print(f"{result.verdict}: {result.row.what}", file=sys.stderr)
    return int(any(result.row.gates for result in bad))


def _write(results: Results) -> None:
    (HERE / "RESULTS.md").write_text(markdown(results))
    text = msgspec.json.format(msgspec.json.encode(_rounded(results.told())), indent=1)
    (HERE / "results.json").write_bytes(text + b"\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
