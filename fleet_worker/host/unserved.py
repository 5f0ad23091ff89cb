"""Instances that are configured and not served, which may be a mistake."""

from __future__ import annotations

from collections.abc import Iterator

from fleet_worker import config_file
from fleet_worker.settings import Settings


def unserved(settings: Settings) -> Iterator[str]:
    """Yield why each such instance of the file is not served, and what would change that.

    Of one that only variables name, `mistyped` tells more.
    """
    in_file = config_file.tables("instances")
    for name, instance in settings.instances.items():
        if name not in in_file:
            continue
        switches = {"enabled": instance.fleet.enabled, "respond_to_requests": instance.fleet.respond_to_requests}
        off = " and ".join(f"{switch} = true" for switch, is_on in switches.items() if not is_on)
        if off:
            yield f"the instance {name!r} is not served: its fleet needs {off}"
        elif not instance.capabilities:
            yield f"the instance {name!r} is not served: its fleet.capabilities name nothing that its usage allows"
