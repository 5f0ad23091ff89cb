"""`fleet-worker status`: a snapshot of the fleet as tables or as JSON, once or again and again."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import NoReturn

import click
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fleet_worker.errors import BrokerUnavailable
from fleet_worker.ops.snapshot import SeenInstance, SeenLane, SeenModel, Snapshot, SnapshotCollector
from fleet_worker.ops.terminal import printable
from fleet_worker.registry.view import ALL_WORDS
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings

UNSERVED = "NOBODY SERVES THIS"
NO_REGISTRY_NODE = (
    "No registry node answers, so it is not known which hosts, instances and models there are.\n"
    "Start one on every host: fleet-worker up, or celery -A fleet_worker worker -n registry@%h"
)
NO_LANES = (
    "No lanes are known. Redis and Valkey forget those that were not used for a day; RabbitMQ lists none, so there\n"
    "only those are known that registry nodes name."
)
FITS_A_TABLE = 72
"""Columns of a terminal; in a narrower one each row of a table becomes a paragraph."""
UNLIMITED = 10_000
"""Columns of what is no terminal: nothing is folded there, so that every row is one line."""
NUMBERS = {"used", "free", "tok/s", "last token", "waiting", "oldest", "nodes"}
COLOURS = {"available": "green", "starting": "cyan", "drained": "cyan", "degraded": "yellow"}


def show(settings: Settings, *, as_json: bool = False, every: float | None = None) -> None:
    """Print the fleet; with `every`, again and again after so many seconds, until KeyboardInterrupt.

    Raises:
        BrokerUnavailable: the broker is not there. When a watch loses it, it says so and goes on.
    """
    console = Console(width=None if sys.stdout.isatty() else UNLIMITED, highlight=False, emoji=False, markup=False)
    with Router(settings) as router, closing(SnapshotCollector(settings, router.registry)) as camera:
        time.sleep(ALL_WORDS)  # the host that answers last may be the only one that serves a lane
        if every is not None:
            with _watched(console, as_json=as_json) as put:
                _watch(router, camera, put, every)
        elif as_json:
            _put_json(camera.take())
        else:
            console.print(tables(camera.take()))


def _watch(
    router: Router, camera: SnapshotCollector, put: Callable[[Snapshot | BrokerUnavailable], None], every: float
) -> NoReturn:
    pause = threading.Event()
    while True:
        try:
            put(camera.take())
        except BrokerUnavailable as error:
            put(error)
        else:
            router.registry.refresh()
        pause.wait(every)


@contextmanager
def _watched(console: Console, *, as_json: bool) -> Iterator[Callable[[Snapshot | BrokerUnavailable], None]]:
    """Yield what puts one look after another where they are watched."""
    if as_json:
        yield _put_json
    elif sys.stdout.isatty() and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda seen: live.update(_dated(seen), refresh=True)
    else:
        yield lambda seen: console.print(_dated(seen), "")


def _put_json(seen: Snapshot | BrokerUnavailable) -> None:
    if isinstance(seen, BrokerUnavailable):
        click.echo(f"fleet-worker: {seen.message}", err=True)
        return
    click.echo(json.dumps(asdict(seen)))
    if not seen.instances:
        click.echo(f"fleet-worker: {NO_REGISTRY_NODE}", err=True)


def _dated(seen: Snapshot | BrokerUnavailable) -> RenderableType:
    what = tables(seen) if isinstance(seen, Snapshot) else Text(seen.message, "bold red")
    return Group(Text(f"{datetime.now():%Y-%m-%d %H:%M:%S}", "dim"), what)


# --- The tables ------------------------------------------------------------------------------------------------------


def tables(seen: Snapshot) -> RenderableType:
    """Return what a rich console can print. It is as wide as that console, and nothing of it is cut off."""
    lanes = [each for each in seen.lanes if each.depth != 0 or not each.direct]
    return Group(
        *_summary(seen),
        "",
        *(_instances(seen) if seen.instances else [Text(NO_REGISTRY_NODE, "yellow")]),
        "",
        _lanes(lanes) if lanes else Text(NO_LANES, "yellow"),
    )


def _summary(seen: Snapshot) -> Iterator[Text]:
    """Also for those who see no more than the top of it."""
    if seen.instances:
        ready = sum(each.ready for each in seen.instances)
        hosts = len({each.host for each in seen.instances})
        used, slots = sum(each.used for each in seen.instances), sum(each.slots for each in seen.instances)
        yield Text(
            f"{ready} of {_count(len(seen.instances), 'instance')} on {_count(hosts, 'host')} ready, "
            f"{used} of {_count(slots, 'slot')} used"
        )
    depths = [each.depth for each in seen.lanes if each.depth]
    yield Text(f"{_count(sum(depths), 'request')} waiting in {_count(len(depths), 'lane')}")
    if unserved := sum(each.unserved for each in seen.lanes):
        yield Text(f"{UNSERVED}: {_count(unserved, 'lane')} with waiting requests", "bold red")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _instances(seen: Snapshot) -> Iterator[RenderableType]:
    listing = _Listing("node", "status", "models", "used", "free", "tok/s", "last token", "server", "version")
    for each in seen.instances:
        listing.add(
            _text(each.node),
            _text(each.status, _colour(each)),
            _text(", ".join(_models(each, seen.models)) or "-"),
            Text(str(each.used)),
            Text(str(each.free)),
            Text(f"{each.tokens_per_second:.1f}"),
            Text(_age(each.last_token_age)),
            _text(each.server or "-"),
            _text(each.version or "-"),
        )
    yield listing
    for each in seen.instances:
        if each.reason:
            yield _text(f"{each.node} is {each.status}: {each.reason}", _colour(each))


def _colour(instance: SeenInstance) -> str:
    return COLOURS.get(instance.status, "red")


def _models(instance: SeenInstance, models: list[SeenModel]) -> Iterator[str]:
    for each in models:
        if (each.host, each.instance) == (instance.host, instance.instance):
            yield each.model if each.ready or not instance.ready else f"{each.model} (not there)"


def _lanes(lanes: list[SeenLane]) -> RenderableType:
    listing = _Listing("lane", "waiting", "oldest", "nodes", "")
    for each in lanes:
        cells = [each.lane, _known(each.depth), _age(each.oldest_age), _known(each.nodes)]
        marked = [*cells, UNSERVED if each.unserved else ""]
        listing.add(*(_text(cell, "bold red" if each.unserved else "") for cell in marked))
    return listing


def _known(number: int | None) -> str:
    return "?" if number is None else str(number)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    for unit, name, below in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800)):
        if seconds < below:
            return f"{seconds / unit:.0f}{name}"
    return f"{seconds / 86_400:.0f}d"


def _text(words: str, style: str = "") -> Text:
    return Text(printable(words), style)


class _Listing:
    """Rows of cells: a table, or paragraphs where a table does not fit."""

    def __init__(self, *headers: str) -> None:
        self._headers = headers
        self._rows: list[tuple[Text, ...]] = []

    def add(self, *cells: Text) -> None:
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if options.max_width >= FITS_A_TABLE:
            yield self._table()
        else:
            for row in self._rows:
                yield from self._paragraph(row)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for header in self._headers:
            justify: JustifyMethod = "right" if header in NUMBERS else "left"
            name, no_wrap = header.replace(" ", "\n"), header in ("status", "")
            table.add_column(name, justify=justify, no_wrap=no_wrap, overflow="fold")
        for row in self._rows:
            table.add_row(*row)
        return table

    def _paragraph(self, row: tuple[Text, ...]) -> Iterator[RenderableType]:
        title, *cells = row
        yield title
        below = Table.grid(padding=(0, 2, 0, 0))
        below.add_column(no_wrap=True)
        below.add_column(overflow="fold")
        for header, cell in zip(self._headers[1:], cells, strict=True):
            if cell.plain:
                below.add_row(f"  {header}", cell)
        yield below
