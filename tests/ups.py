"""`fleet-worker up` in tests. What it starts shares its output, whose end so tells that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fleet_worker.host.child_process import ChildProcess


@contextmanager
def running_up(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[ChildProcess]:
    """Nothing of it survives the block, even if it should have ended its nodes and did not."""
    process = ChildProcess("up", command, env)
    try:
        yield process
    finally:
        process.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if not process.ended or not is_gone(process, within=5):
            process.signal(signal.SIGKILL)
            for pid in re.findall(r"starts, pid (\d+)", process.output):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid), signal.SIGKILL)
        process.stop()


def is_gone(process: ChildProcess, within: float = 20.0) -> bool:
    """Whether it and all its nodes end by then."""
    process._reader.join(within)
    return not process._reader.is_alive()
