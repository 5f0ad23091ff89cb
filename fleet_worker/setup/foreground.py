"""`fleet-worker up` in this terminal, for `up` itself and for the commands that end with it."""

from __future__ import annotations

import logging
import sys

from fleet_worker.host.launchd import Launchd
from fleet_worker.host.log_bound import bound_output
from fleet_worker.host.lossy_output import lose_what_cannot_be_written
from fleet_worker.host.service_files import ENDS_WITHIN
from fleet_worker.host.up.supervisor import Supervisor
from fleet_worker.settings import Settings


def run_up(settings: Settings) -> int:
    """Run until a signal ends it; return the exit code. For the main thread only.

    Raises:
        ConfigurationError: no instance has opted in.
        Held: an `up` of this host runs already.
    """
    supervisor = Supervisor(settings)
    lose_what_cannot_be_written()
    if sys.platform == "darwin":
        bound_output(Launchd(ENDS_WITHIN).log)
    form = "[%(asctime)s: %(levelname)s/up] %(message)s"  # like the lines of the nodes, in the same output
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=form)
    return supervisor.run()
