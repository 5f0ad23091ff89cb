"""`fleet-worker up` in tests. What it starts shares its output, whose end so tells that nothing of it is left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fleet_worker.host.child_process import ChildProcess, python

_WITH_NODES = """
import logging, sys
from fleet_worker.host.node_process import Backoff
from fleet_worker.host.up.supervisor import Supervisor
from fleet_worker.settings import Settings
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
command = lambda name: [sys.executable, "-S", "-c", sys.argv[1], name]
sys.exit(Supervisor(Settings(), command=command, backoff=Backoff(first=0.05, longest=0.2)).run())
"""


def up_with(node: str) -> list[str]:
    """Return the command of an `up` whose nodes are this program: a real one takes seconds to start."""
    return python("-c", _WITH_NODES, node)


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
