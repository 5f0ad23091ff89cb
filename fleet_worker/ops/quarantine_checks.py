"""Which managed MLX servers of the fleet cannot be started, as far as their hosts tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fleet_worker.ops.findings import Finding
from fleet_worker.protocol.status import InstanceStatus

CHECK = "managed servers"
_ADVICE = {
    "quarantined": (
        "read the log of fleet-worker up on {host}, correct serve or free memory, then fleet-worker restart {node} "
        "--server"
    ),
    "blocked": "on {host}, end that program, or give the instance another port in base_url",
}
"""By stage of the server."""


def unstarted_servers(instances: Iterable[InstanceStatus]) -> Iterator[Finding]:
    """Return a finding for each server that is not started any more, or only once in a while."""
    for instance in instances:
        if advice := _ADVICE.get(instance.server_stage):
            found = f"{instance.node}: {instance.reason}"
            yield Finding("error", found, advice.format(host=instance.host, node=instance.node), check=CHECK)
