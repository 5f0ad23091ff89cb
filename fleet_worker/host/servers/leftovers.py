"""Kills what is left of a managed server: `python -m fleet_worker.host.servers.leftovers MARK`, for the guard."""

from __future__ import annotations

import sys

from fleet_worker.host.servers.process_family import kill_all, marked


def kill_leftovers(mark: str) -> int:
    """Kill all processes with this mark, until there are none; return how many there were."""
    killed = set()
    for _ in range(5):  # a process may start another one meanwhile
        found = [process for process in marked(mark) if process not in killed]
        kill_all(found)
        if not found:
            break
        killed.update(found)
    return len(killed)


if __name__ == "__main__":
    kill_leftovers(sys.argv[1])
