"""`fleet-worker status`: a snapshot of the fleet as tables or as JSON, once or repeatedly."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from fleet_worker.broker.topology import direct_lane
from fleet_worker.errors import BrokerUnavailable
from fleet_worker.ops.clocks import ADVICE, described
from fleet_worker.ops.snapshot import LaneStatus, Snapshot, SnapshotCollector
from fleet_worker.registry.view import ALL_ANSWERS_WITHIN
from fleet_worker.router.router import Router
from fleet_worker.settings import Settings
from fleet_worker.terminal import Listing, cell, count, output

UNSERVED = "NOBODY SERVES THIS"
NO_REGISTRY_NODE = (
    "No registry node answers, so hosts, instances and models are unknown.\n"
    "Start one on every host: fleet-worker up, or celery -A fleet_worker worker -n registry@%h"
)
NO_LANES = (
    "No lanes are known. Redis and Valkey forget lanes that were not used for a day; on RabbitMQ only the lanes are\n"
    "known that registry nodes name."
)
INSTANCES_FIT = 80
"""Columns of a terminal that take the table of instances, whose columns are many."""
COLOURS = {"available": "green", "starting": "cyan", "drained": "cyan", "away": "cyan", "degraded": "yellow"}


def show(settings: Settings, *, as_json: bool = False, every: float | None = None) -> None:
    """Print the fleet; with `every`, again after so many seconds, until KeyboardInterrupt.

    Raises:
        BrokerUnavailable: the broker does not answer. If a watch loses it, this is printed, and the watch goes on.
    """
    console = output()
    with Router(settings, patient=False) as router, closing(SnapshotCollector(settings, router.registry)) as collector:
        time.sleep(ALL_ANSWERS_WITHIN)  # the host that answers last may be the only one that serves a lane
        if every is None:
            snapshot = collector.take()
            return _print_json(snapshot) if as_json else console.print(tables(snapshot))
        with _watched(console, as_json=as_json) as put:
            while True:
                try:
                    put(collector.take())
                    router.registry.refresh()
                except BrokerUnavailable as error:
                    put(error)
                time.sleep(every)


@contextmanager
def _watched(console: Console, *, as_json: bool) -> Iterator[Callable[[Snapshot | BrokerUnavailable], None]]:
    """Yield a function that prints one snapshot after another: on a real terminal in place, elsewhere below."""
    if as_json:
        yield _print_json
    elif sys.stdout.isatty() and not console.is_dumb_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda snapshot: live.update(_dated(snapshot), refresh=True)
    else:
        yield lambda snapshot: console.print(_dated(snapshot), "")


def _print_json(result: Snapshot | BrokerUnavailable) -> None:
    if isinstance(result, BrokerUnavailable):
        click.echo(f"fleet-worker: {result.message}", err=True)
        return
    click.echo(json.dumps(result.as_json()))
    if not result.instances:
        click.echo(f"fleet-worker: {NO_REGISTRY_NODE}", err=True)


def _dated(result: Snapshot | BrokerUnavailable) -> RenderableType:
    what = tables(result) if isinstance(result, Snapshot) else Text(result.message, "bold red")
    return Group(Text(f"{datetime.now():%Y-%m-%d %H:%M:%S}", "dim"), what)


def tables(snapshot: Snapshot) -> RenderableType:
    """Return a snapshot for a rich console of any width."""
    # An empty lane of a single node is no news.
    lanes = [each for each in snapshot.lanes if each.depth != 0 or not each.lane.startswith(direct_lane(""))]
    return Group(
        *_summary(snapshot),
        "",
        *(_instances(snapshot) if snapshot.instances else [Text(NO_REGISTRY_NODE, "yellow")]),
        "",
        _lanes(lanes) if lanes else Text(NO_LANES, "yellow"),
    )


def _summary(snapshot: Snapshot) -> Iterator[Text]:
    """The top lines, which also a small terminal shows."""
    if snapshot.instances:
        ready = sum(each.ready for each in snapshot.instances)
        hosts = len({each.host for each in snapshot.instances})
        used, slots = sum(each.running for each in snapshot.instances), sum(each.slots for each in snapshot.instances)
        yield Text(
            f"{ready} of {count(len(snapshot.instances), 'instance')} on {count(hosts, 'host')} ready, "
            f"{used} of {count(slots, 'slot')} used"
        )
    depths = [each.depth for each in snapshot.lanes if each.depth]
    yield Text(f"{count(sum(depths), 'request')} waiting in {count(len(depths), 'lane')}")
    if unserved := sum(each.unserved for each in snapshot.lanes):
        yield Text(f"{UNSERVED}: {count(unserved, 'lane')} with waiting requests", "bold red")


def _instances(snapshot: Snapshot) -> Iterator[RenderableType]:
    figures = ("used", "free", "tok/s", "from cache", "last token")
    headers = ("node", "status", "models", *figures, "server", "version")
    listing = Listing(*headers, numbers=figures, whole=("status",), spare=("version", "server"), fits=INSTANCES_FIT)
    for each in snapshot.instances:
        models = (
            offered.model if offered.ready or not each.ready else f"{offered.model} (not there)"
            for offered in snapshot.models_of(each)
        )
        listing.add(
            cell(each.node),
            cell(each.status, COLOURS.get(each.status, "red")),
            cell(", ".join(models) or "-"),
            cell(str(each.running)),
            cell(str(each.free)),
            cell(f"{each.tokens_per_second:.1f}"),
            cell("-" if each.cached_share is None else f"{each.cached_share:.0%}"),
            cell(_age(snapshot.token_age(each))),
            cell(each.server or "-"),
            cell(each.version or "-"),
        )
    yield listing
    for each in snapshot.instances:
        if each.reason:
            yield cell(f"{each.node} is {each.status}: {each.reason}", COLOURS.get(each.status, "red"))
    for found in described(snapshot.wrong_clocks):
        yield cell(f"{found}: {ADVICE}", "yellow")


def _lanes(lanes: list[LaneStatus]) -> RenderableType:
    figures = ("waiting", "oldest", "nodes")
    listing = Listing("lane", *figures, "", numbers=figures, whole=("",))
    for each in lanes:
        texts = (each.lane, _known(each.depth), _age(each.oldest_age), _known(each.nodes))
        marked = (*texts, UNSERVED if each.unserved else "")
        listing.add(*(cell(text, "bold red" if each.unserved else "") for text in marked))
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
