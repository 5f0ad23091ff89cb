"""The exit codes of our processes, by the numbers of sysexits.h where it has one. config/operating.md has them all."""

from __future__ import annotations

FAILED = 1
NOT_RUNNING = 3  # as systemctl
USAGE = 64
UNAVAILABLE = 69
SOFTWARE = 70
RESTART = 75
"""EX_TEMPFAIL: start the process again, now or later."""
CONFIGURATION = 78
INTERRUPTED = 130
