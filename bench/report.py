"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from bench.results import OVER_BASE, Result, Results
from bench.rounds import Spread
from bench.rows import LOADS, MEASURES, Load, Measure, Row


def markdown(results: Results) -> str:
    """The whole report."""
    loads = [_load(LOADS[name], peers) for name, peers in results.figures.items() if peers]
    return "\n".join([_head(results), _rows(results.rows), *loads])


def _head(results: Results) -> str:
    machine, effort = results.machine, results.effort
    return (
        "# Results\n\n"
        "Written by `python3 dev.py bench`; README.md says how it measures. Trust the ratios, "
        "which hold within one run, and not the absolute figures.\n\n"
        f"{machine.date}, {machine.cpus} CPUs, {machine.system}; {', '.join(machine.versions)}. "
        f"Medians of {effort.fine_rounds} rounds of import, start and registries, "
        f"{effort.rounds} of all else, with minimum and maximum.\n"
    )


def _rows(results: Iterable[Result]) -> str:
    names = ["", "measured (min-max)", "goal", "floor", "verdict", "gates"]
    return f"## Goals and floors\n\n{_table(names, map(_row, results))}"


def _row(result: Result) -> list[str]:
    row = result.row
    return [
        row.what,
        _spread(result.measured, lambda value: _bound(row, value)),
        _bound(row, row.goal),
        _bound(row, row.floor),
        f"**{result.verdict}**" if result.is_bad else result.verdict,
        "yes" if row.gates else "",
    ]


def _bound(row: Row, value: float) -> str:
    """A ratio as the promise has it: 18x, or 1/35 of a cost."""
    if row.base is None:
        return f"{value:.0f}"
    if row.measure.endswith("_us"):
        return f"1/{1 / value:.1f}"
    return f"{value:.2f}x"


def _load(load: Load, peers: Mapping[str, Mapping[str, Spread]]) -> str:
    found = dict.fromkeys(name for figures in peers.values() for name in figures)
    names = [name for name in MEASURES if name in found]
    titles, lines = [""], [[peer] for peer in peers]
    for name in names:
        measure, over_base = MEASURES[name], name + OVER_BASE
        titles.append(f"{measure.title} (min-max)")
        for line, figures in zip(lines, peers.values(), strict=True):
            line.append(_spread(figures.get(name), measure.form.format))
        if measure.ratio and over_base in found:
            titles.append(f"x {load.base}")
            for line, figures in zip(lines, peers.values(), strict=True):
                line.append(_ratio(measure, figures.get(over_base)))
    return f"## {load.title}\n\n{load.about}\n\n{_table(titles, lines)}"


def _ratio(measure: Measure, spread: Spread | None) -> str:
    if spread is None:
        return ""
    inverse = str(measure.ratio).startswith("1/")
    return str(measure.ratio).format(1 / spread.median if inverse else spread.median)


def _spread(spread: Spread | None, form: Callable[[float], str]) -> str:
    if spread is None:
        return ""
    return f"{form(spread.median)} ({form(spread.min)} - {form(spread.max)})"


def _table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, ["---" if not title else "--:" for title in titles], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
