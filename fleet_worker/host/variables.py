"""FLEET_* variables whose names are mistyped: nothing reads them, or they make an instance that nobody meant."""

from __future__ import annotations

import os
from collections.abc import Iterator

from fleet_worker import config_file
from fleet_worker.host.parent_pipe import NODE_LOCK, PARENT_PIPE
from fleet_worker.settings import Settings

PREFIX = "FLEET_"
READ_ELSEWHERE = {
    "FLEET_CONFIG",
    PARENT_PIPE,
    NODE_LOCK,
    "FLEET_BROKER_PASSWORD",
    "FLEET_BROKER_ADDRESS",
    "FLEET_GATEWAY_ADDRESS",
}
"""Variables that are no settings; docker/compose.yaml reads the last three."""


def mistyped(settings: Settings) -> Iterator[str]:
    """Yield what is wrong with each such variable, without its value. `Settings` has refused other wrong names already.

    An instance needs more than a key or a limit. If variables name one that is not in the configuration file and has
    not opted in, the name of another was meant.
    """
    known = [f"{PREFIX}{field.upper()}" for field in type(settings).model_fields]
    in_file = list(config_file.tables("instances"))
    for name in sorted(os.environ):
        group, _, rest = name.upper().partition("__")
        instance = rest.partition("__")[0].lower()
        if not group.startswith(PREFIX) or group in READ_ELSEWHERE:
            continue
        if group not in known:
            like = config_file.nearest(group.removeprefix(PREFIX), [each.removeprefix(PREFIX) for each in known])
            yield f"the variable {name} is not read{like.replace('is ', f'is {PREFIX}', 1)}"
        elif group == "FLEET_INSTANCES" and instance and instance not in in_file:
            made = settings.instances.get(instance)
            if made and not made.opted_in:
                like = config_file.nearest(instance, in_file)
                yield f"the variable {name} is for an instance {instance!r}, which is not in the configuration{like}"
