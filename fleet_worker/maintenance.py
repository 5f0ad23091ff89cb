"""What an operator is told while nodes are taken out of service and back: a line for each, and an exit code for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import click

from fleet_worker import exit_codes
from fleet_worker.draining import Drained, Draining
from fleet_worker.settings import Settings

__all__ = ["drain", "undrain"]


def drain(settings: Settings, names: Iterable[str], *, wait: float | None = None) -> int:
    """Drain these, and return the exit code. With `wait`, only when nothing runs there any more: what runs has so many
    seconds, or with `math.inf` as many as its node gives it.
    """
    draining = Draining(settings)
    said = draining.drain(draining.find(names))
    if wait is None:
        return _tell(draining, said, lambda node: node.drained)
    ended = draining.wait(said, None if math.isinf(wait) else wait)
    return _tell(draining, ended, lambda node: node.drained and not node.running)


def undrain(settings: Settings, names: Iterable[str]) -> int:
    """Undrain these, and return the exit code."""
    draining = Draining(settings)
    return _tell(draining, draining.undrain(draining.find(names)), lambda node: not node.drained)


def _tell(draining: Draining, said: Iterable[Drained], is_done: Callable[[Drained], bool]) -> int:
    all_done = True
    for node in said:
        click.echo(_words(node))
        all_done = all_done and is_done(node)
    for name in draining.silent:
        advice = "is it running, with its broker in reach? fleet-worker status shows what there is"
        click.echo(f"fleet-worker: {name} does not answer: {advice}", err=True)
    return exit_codes.UNAVAILABLE if draining.silent else 0 if all_done else exit_codes.FAILED


def _words(node: Drained) -> str:
    if not node.drained:
        return f"{node.node} is not drained: it takes work as soon as its MLX server has proved that it works"
    if node.running:
        return f"{node.node} is drained: it takes no more work, {_requests(node.running)} not finished yet"
    handed_over = f", {_requests(node.handed_over)} handed over to other nodes" if node.handed_over else ""
    return f"{node.node} is drained: nothing runs there any more{handed_over}"


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"
