"""A program that is killed leaves no process behind, whatever it started by our means."""

import os
import signal

from fleet_worker.host.child_process import child, python
from tests.fleets import until
from tests.processes import descendants, processes

WITHIN = 60.0
PROGRAM = """
import signal
from fleet_worker.host.child_process import child, free_port, python
from fleet_worker.testing import embedded_broker, running_node
port = free_port()
simulator = python("-m", "fleet_worker.simulator", "--port", str(port), "--model", "sim")
with embedded_broker() as url, child("the simulator", simulator) as process:
    process.wait_for("base_url", 30)
    with running_node(url, base_url=f"http://127.0.0.1:{port}", models={"sim": {}}):
        print("all of it runs", flush=True)
        signal.pause()
"""


def test_a_program_that_is_killed_takes_all_that_it_started_with_it():
    with child("the program", python("-c", PROGRAM)) as program:
        program.wait_for("all of it runs", WITHIN)
        started = descendants(program.pid)
        for part in ("valkey-server", "fleet_worker.simulator", "-m fleet_worker.node sim@test"):
            assert any(part in command for command in started.values())
        program.signal(signal.SIGKILL)
        program.wait(WITHIN)
        try:
            until(lambda: not started.keys() & processes().keys(), 5)
        finally:
            for pid in started.keys() & processes().keys():
                os.kill(pid, signal.SIGKILL)
