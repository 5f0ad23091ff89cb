"""`python -m fleet_worker.node NAME` runs the same node as `celery -A fleet_worker worker -n NAME`. So `up` starts it.

The modules of Celery's command line, which are not loaded here, would take 8 MB of every node.
"""

from __future__ import annotations

import os
import sys

from fleet_worker.node.worker import node_app


def main(node_name: str) -> int:
    """Run the node until it ends, and return the exit code of the process."""
    worker = node_app().Worker(hostname=node_name, loglevel="INFO", no_color="NO_COLOR" in os.environ)
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else "usage: python -m fleet_worker.node NAME")
