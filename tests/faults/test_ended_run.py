"""A test run that is ended from outside leaves no process behind: no broker, no node, no MLX server, no Flower."""

import signal
import subprocess
import uuid
from pathlib import Path

import pytest

from fleet_worker.host.child_process import child, python
from tests.clients import until

ROOT = Path(__file__).parent.parent.parent
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


def running(run):
    """The command lines of the processes that have this word in their environment."""
    listed = subprocess.run(["ps", "axeww", "-o", "command="], check=True, capture_output=True, text=True).stdout
    return [line[:200] for line in listed.splitlines() if f"TEST_RUN={run}" in line]


@pytest.mark.rest
@pytest.mark.timeout(150)
@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_process_behind(tmp_path, number, processes):
    run = uuid.uuid4().hex
    file = tmp_path / "test_never_ending.py"
    file.write_text(NEVER_ENDING, "utf-8")
    command = python("-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-n", str(processes))
    with child("pytest", [*command, str(file)], {"TEST_RUN": run, "PYTHONPATH": str(ROOT)}) as pytest_process:
        until(lambda: file.with_name("started").exists() or pytest_process.ended, STARTED_WITHIN)
        assert not pytest_process.ended, pytest_process.output
        assert len(running(run)) > 8
        pytest_process.signal(number)
        pytest_process.wait(5)
        until(lambda: not running(run), ENDED_WITHIN)
