"""The figures of a benchmark as a table: each with its target, its median and all its runs."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

__all__ = ["Row", "main", "measure"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    scenario: str
    figure: str
    target: str
    measured: float
    unit: str = ""


def main(description: str | None, scenarios: Mapping[str, Callable[[], list[Row]]]) -> None:
    """Read the command line, and measure the scenarios that it names, or all."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", choices=[*scenarios, []], metavar="SCENARIO")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    measure({name: scenarios[name] for name in options.scenarios or scenarios}, options.runs)


def measure(scenarios: Mapping[str, Callable[[], list[Row]]], runs: int) -> None:
    """Run each scenario so many times, one after the other, and print the table."""
    table = Table("scenario", "figure", "target", "median", "runs")
    load = os.getloadavg()[0]
    for scenario in scenarios.values():
        for rows in zip(*(scenario() for _ in range(runs)), strict=True):
            values = [row.measured for row in rows]
            shown = ", ".join(f"{value:,.4g}" for value in values)
            median = f"{statistics.median(values):,.4g} {rows[0].unit}"
            table.add_row(rows[0].scenario, rows[0].figure, rows[0].target, median, shown)
    table.title = f"{os.cpu_count()} cores, on which {load:.1f} threads ran before"
    Console(width=140).print(table)
