"""A line for a person whose request waits because no node serves the model now."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, Self

import click

from fleet_worker.errors import FleetError
from fleet_worker.router.router import Router
from fleet_worker.terminal import printable

PATIENCE = 2.0
"""Seconds without an answer before the line is printed."""
SHOWN = 3
"""Nodes that are named."""


class WaitingNotice:
    """Print once on standard error why a request for this model waits: `with WaitingNotice(router, model)`.

    Nothing is printed if the block, or `cancel`, ends it first, or if a node takes requests for the model.
    """

    def __init__(self, router: Router, model: str) -> None:
        self._router = router
        self._model = model
        self._timer = threading.Timer(PATIENCE, self._print)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._timer.cancel()

    def _print(self) -> None:
        offered = []
        with suppress(FleetError):  # the request tells it, too
            offered = self._router.registry.offerings(self._model)
        if not offered or any(each.ready for each in offered):
            return
        shown = [each.instance for each in offered[:SHOWN]]
        why = "; ".join(f"{each.node} is {each.status}: {each.reason}" for each in shown)
        more = f"; and {len(offered) - SHOWN} more" if len(offered) > SHOWN else ""
        text = f"fleet-worker: no node takes requests for {self._model} now, so this one waits ({why}{more})"
        click.echo(printable(text), err=True)
