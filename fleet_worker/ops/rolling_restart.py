"""One node after the other is restarted, or its MLX server; the next one only when the last one works again.

A node finishes or hands over its requests first, so none fails. What only that node serves waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import click

from fleet_worker import exit_codes
from fleet_worker.ops.node_control import print_silent
from fleet_worker.ops.restart_control import RestartControl, RestartReply
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.view import Registry
from fleet_worker.terminal import printable

LOOK_EVERY = 0.25
"""Seconds between two looks at what the registry says."""
REFRESH_EVERY = 5.0
"""Seconds after which hosts are asked again: an event may have been lost."""
CHECK_NAME = "check its name; one that is frozen or cut off cannot be restarted from here."
STAYS = ("drained", "away")
"""A node that has one of these states takes no work for a reason that its restart does not touch."""


class RegistryView:
    """What the registry nodes say about the nodes of the fleet."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.refresh = registry.refresh

    def nodes(self) -> list[str]:
        """All inference nodes, sorted by host."""
        return [each.node for each in self._registry.instances() if each.node]

    def status(self, node: str) -> InstanceStatus | None:
        return next((each for each in self._registry.instances() if each.node == node), None)

    def served_alone(self, node: str) -> list[str]:
        """The models that no other node can serve now."""
        ready = self._registry.offerings(ready=True)
        others = {each.model for each in ready if each.node != node}
        return sorted({each.model for each in ready if each.node == node} - others)


def is_back(seen: InstanceStatus | None, before: InstanceStatus | None, reply: RestartReply, *, server: bool) -> bool:
    """Return whether what was restarted works again, or takes no work for the reason for which it took none before."""
    if seen is None or seen.pid is None:
        return False
    process, restarts = reply.process, reply.server_restarts
    if before and not process:  # `up` has replied, which does not know them
        process, restarts = before.process, before.server_restarts
    is_new = seen.process != process or (server and (seen.server_restarts or 0) > (restarts or 0))
    return is_new and (seen.ready or (before is not None and seen.status == before.status in STAYS))


class RollingRestart:
    """One node after the other. The first that does not come back within `within` seconds ends it."""

    def __init__(
        self,
        control: RestartControl,
        view: RegistryView,
        within: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._control = control
        self._view = view
        self._within = within
        self._clock = clock
        self._sleep = sleep
        self._all_done = True

    def run(self, nodes: Sequence[str], *, only_available: bool = False) -> int:
        """Restart these nodes; with `only_available`, leave out those that take no work. Return the exit code."""
        for number, node in enumerate(nodes, start=1):
            before = self._view.status(node)
            if only_available and before and not before.ready:
                self._leave_out(before)
            elif not self._restart(node, before):
                self._tell_left(nodes[number:])
                break
        print_silent(self._control.silent, CHECK_NAME)
        return exit_codes.UNAVAILABLE if self._control.silent else 0 if self._all_done else exit_codes.FAILED

    def _leave_out(self, node: InstanceStatus) -> None:
        if node.status in STAYS:
            why = f"it is {node.status}, and stays so"
        else:
            self._all_done = False
            why = f"it is {node.status}{f' ({node.reason})' if node.reason else ''}; name it to restart it"
        click.echo(printable(f"{node.node} is left out: {why}"))

    def _restart(self, node: str, before: InstanceStatus | None) -> bool:
        """Return whether the next node may be restarted: nothing was lost by this one."""
        alone = self._view.served_alone(node)
        reply = self._tell(node)
        if reply is None:
            return True
        if reply.error:
            self._all_done = False
            click.echo(printable(f"{node} is not restarted: {reply.error}"))
            return True
        if alone:
            click.echo(printable(f"{node} alone serves {', '.join(alone)}: requests wait until it is back"))
        began = self._clock()
        seen = self._wait(node, before, reply)
        seconds = self._clock() - began
        if is_back(seen, before, reply, server=self._control.server):
            what = "has a restarted MLX server" if self._control.server else "was restarted"
            click.echo(printable(f"{node} {what}, {seen.status if seen else ''} after {seconds:.1f} s"))
            return True
        self._all_done = False
        click.echo(printable(f"{node} is not back after {seconds:.0f} s: {_now(seen)}"))
        return False

    def _tell(self, node: str) -> RestartReply | None:
        """A node that was restarted just now is told once more when it obeys again."""
        reply = self._control.restart(node)
        if reply and reply.error and 0 < reply.again_in <= self._within:
            click.echo(printable(f"{node} was restarted just now: this waits for {reply.again_in:.0f} s"))
            self._sleep(reply.again_in)
            reply = self._control.restart(node)
        return reply

    def _wait(self, node: str, before: InstanceStatus | None, reply: RestartReply) -> InstanceStatus | None:
        """Return its last status: it is back, its time is over, or its server dies again and again."""
        ends = self._clock() + reply.grace + self._within
        refresh_at = self._clock() + REFRESH_EVERY
        has_left = False  # the quarantine in which its server was before
        while True:
            seen, now = self._view.status(node), self._clock()
            quarantined = seen is not None and seen.server_stage == "quarantined"
            has_left = has_left or not quarantined
            given_up = has_left and quarantined
            if is_back(seen, before, reply, server=self._control.server) or given_up or now >= ends:
                return seen
            if now >= refresh_at:
                self._view.refresh()
                refresh_at = now + REFRESH_EVERY
            self._sleep(LOOK_EVERY)

    def _tell_left(self, nodes: Sequence[str]) -> None:
        if nodes:
            click.echo(printable(f"Not restarted: {', '.join(nodes)}"))


def _now(seen: InstanceStatus | None) -> str:
    if seen is None:
        return "no registry node reports it"
    return f"{seen.status}{f' ({seen.reason})' if seen.reason else ''}"
