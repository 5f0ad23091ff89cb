"""What an operator is told while nodes are taken out of service and back: a line for each, and an exit code for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import click

from fleet_worker import exit_codes
from fleet_worker.ops.drain import Drained, Draining
from fleet_worker.settings import Settings

__all__ = ["drain", "undrain"]

TAKES_WORK = "if it is starting, frozen or cut off, it takes work when it comes back: drain it again then."
STAYS_DRAINED = "if it is drained, and frozen or cut off, it still is when it comes back: undrain it again then."


def drain(settings: Settings, names: Iterable[str], *, wait: float | None = None) -> int:
    """Drain these, and return the exit code. With `wait`, only when nothing runs there any more: what runs has so many
    seconds, or with `math.inf` as many as its node gives it.
    """
    draining = Draining(settings)
    said = draining.drain(draining.find(names))
    if wait is None:
        return _tell(draining, said, lambda node: node.drained, TAKES_WORK)
    ended = draining.wait(said, None if math.isinf(wait) else wait)
    return _tell(draining, ended, lambda node: node.drained and not node.running, TAKES_WORK)


def undrain(settings: Settings, names: Iterable[str]) -> int:
    """Undrain these, and return the exit code."""
    draining = Draining(settings)
    return _tell(draining, draining.undrain(draining.find(names)), lambda node: not node.drained, STAYS_DRAINED)


def _tell(draining: Draining, said: Iterable[Drained], is_done: Callable[[Drained], bool], of_a_node: str) -> int:
    """`of_a_node` is the advice about one that does not answer."""
    all_done = True
    for node in said:
        click.echo(_words(node))
        all_done = all_done and is_done(node)
    for name in draining.silent:
        advice = of_a_node if "@" in name else "is it running, with its broker in reach?"
        click.echo(f"fleet-worker: {name} does not answer: {advice} fleet-worker status shows what there is", err=True)
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
