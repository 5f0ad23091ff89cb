"""What `fleet-worker doctor` says of `availability`: whether this host may work now, and what it cannot tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime

from fleet_worker.host.availability import keep_awake, sleep_notice
from fleet_worker.host.availability.policy import opening
from fleet_worker.host.availability.probes import Probes, find_program
from fleet_worker.host.availability.readings import probes_of_this_host, reason_of, wanted_probes
from fleet_worker.ops.findings import Finding
from fleet_worker.settings import Settings


def availability(settings: Settings, probes: Probes | None = None) -> Iterator[Finding]:
    """Yield nothing without the section."""
    wanted = settings.availability
    if not wanted.in_use:
        return
    if hours := wanted.open_hours:
        now = datetime.now()
        is_open = hours.contain(now)
        until = f", until {opening(hours, now)}" if hours.minutes_to_change(now) else ""
        yield Finding("ok", f"{'within' if is_open else 'outside of'} its hours{until}")
    for name, probe in wanted_probes(wanted, probes or probes_of_this_host()).items():
        try:
            answer = probe()
        except Exception as error:  # whatever a system answers
            advice = "without an answer this setting has no effect: the host works as if it were not set"
            yield Finding("warning", f"{name}: {reason_of(error)}", advice)
        else:
            yield Finding("ok", f"{name}: {_described(answer)}")
    command = keep_awake.command()[0]
    if wanted.keep_awake and not find_program(command):
        yield Finding("warning", f"keep_awake: {command} is not there", "see to it that this machine does not sleep")
    if not sleep_notice.monitor_command():
        programs = ", ".join(program for program, *_ in sleep_notice.MONITORS)
        advice = "it loses its requests then, and other nodes continue them after router.lost_after"
        yield Finding(
            "warning", f"nothing tells before this machine goes to sleep: none of {programs} is there", advice
        )


def _described(answer: object) -> str:
    if isinstance(answer, bool):
        return "on power" if answer else "on battery"
    if isinstance(answer, float):
        return f"used {answer:.0f} s ago" if math.isfinite(answer) else "nobody is logged in"
    return str(getattr(answer, "name", answer)).lower()
