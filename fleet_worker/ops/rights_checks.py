"""Checks that the user of broker_url may do what a node and a router do: it does all of that, on names of its own."""

from __future__ import annotations

from typing import Any

from fleet_worker.broker.faults import BROKER_ERRORS, Refusal, refusal
from fleet_worker.broker.rehearsal import rehearse
from fleet_worker.broker.topology import Transport
from fleet_worker.ops.findings import Finding


def rights(connection: Any, transport: Transport) -> list[Finding]:
    """Return one error for each kind of refusal, with all that fails because of it.

    Raises:
        one of BROKER_ERRORS: the broker was lost meanwhile.
    """
    refused: dict[Refusal, list[str]] = {}
    unknown: Exception | None = None
    with connection.channel() as channel:
        for what, act in rehearse(channel, transport):
            try:
                act()
            except BROKER_ERRORS as error:
                if found := refusal(error):
                    refused.setdefault(found, []).append(what)
                else:
                    unknown = error  # perhaps what was refused to be made does not exist
    if unknown and not refused:
        raise unknown
    if not refused:
        return [Finding("ok", "it lets its user do all that a node and a router do")]
    return [
        Finding("error", f"it {found.found}, so nobody can {', '.join(whats)}", found.advice)
        for found, whats in refused.items()
    ]
