"""A test run that is ended from outside leaves no process behind: no broker, no node, no MLX server, no Flower."""

import os
import signal
from pathlib import Path

import pytest

from fleet_worker.host.child_process import child, python
from tests.mlx_clients import until
from tests.processes import descendants, processes

ROOT = Path(__file__).parent.parent.parent
PARTS = ("valkey-server", "beam.smp", "epmd", "fleet_worker.simulator", "-n one@", "-n registry@", "flower")
STARTED_WITHIN, ENDED_WITHIN = 60.0, 10.0

NEVER_ENDING = """
import pathlib, time
from tests.brokers import RabbitMQ, Valkey
from tests.fleets import Fleet
from tests.flower import running_flower

def test_that_never_ends():
    with Valkey() as valkey, RabbitMQ(), Fleet(valkey.url, {"one": "mlx_lm"}), running_flower(valkey.url):
        pathlib.Path(__file__).with_name("started").touch()
        time.sleep(600)
"""


@pytest.mark.rest
@pytest.mark.timeout(150)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_behind(tmp_path, number, workers):
    file = tmp_path / "test_never_ending.py"
    file.write_text(NEVER_ENDING, "utf-8")
    command = python("-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-n", str(workers))
    with child("pytest", [*command, str(file)], {"PYTHONPATH": str(ROOT)}) as run:
        until(lambda: file.with_name("started").exists() or run.ended, STARTED_WITHIN)
        assert not run.ended, run.output
        started = descendants(run.pid)
        for part in PARTS:
            assert any(part in command for command in started.values()), part
        run.signal(number)
        run.wait(5)
        try:
            until(lambda: not left_of(started), ENDED_WITHIN)
        finally:
            for pid in left_of(started):
                os.kill(pid, signal.SIGKILL)


def left_of(started):
    return started.keys() & processes().keys()
