"""What `fleet-worker usage` prints: a table, JSON or CSV. No gateway imports it, since tables take 2 MB."""

from __future__ import annotations

import csv
import json
import sys
from typing import Literal

import click

from fleet_worker.gateway.accounts.usage import NONE, By, Used, as_json, written
from fleet_worker.terminal import Listing, cell, output

Form = Literal["table", "json", "csv"]


def show(used: list[Used], by: By, since: float, form: Form) -> None:
    """Print it. An empty table or CSV says so on standard error."""
    if form == "json":
        click.echo(json.dumps({"by": by, "since": written(since), "usage": [as_json(each, by) for each in used]}))
        return
    if not used:
        click.echo(f"fleet-worker: no requests since {written(since)}", err=True)
    if form == "csv":
        _write_csv(used, by)
    elif used:
        output().print(_table(used, by))


def _table(used: list[Used], by: By) -> Listing:
    figures = ("requests", "failed", "prompt", "output", "cached", "ttft", "wait")
    listing = Listing(by, *figures, numbers=figures)
    for each in used:
        counts = (each.requests, each.failed, each.prompt_tokens, each.completion_tokens, each.cached_tokens)
        averages = (each.ttft, each.queue_wait)
        listing.add(
            cell(each.name), *(cell(_short(count)) for count in counts), *(cell(_seconds(each)) for each in averages)
        )
    return listing


def _write_csv(used: list[Used], by: By) -> None:
    rows = [as_json(each, by) for each in used]
    columns = [by, *(name for name in Used.__dataclass_fields__ if name != "name")]
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _short(number: int) -> str:
    """For people: `9,999`, `10k`, `12.3M`."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= max(unit, 10_000):
            return f"{number / unit:.4g}{name}"
    return f"{number:,}"


def _seconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds:.1f}s"
