"""What a process uses, as Linux tells."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_seconds", "descriptors", "pss_mb", "rss_mb", "threads"]


def cpu_seconds(pid: int) -> float:
    """Of all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    return _status(pid, "VmRSS") / 1024


def pss_mb(pid: int) -> float:
    """Its memory, with its part of what it shares with other processes: libraries, mostly."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024


def threads(pid: int) -> int:
    return _status(pid, "Threads")


def descriptors(pid: int) -> int:
    """Open files, sockets and pipes."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _status(pid: int, name: str) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])
