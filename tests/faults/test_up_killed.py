"""`fleet-worker up` killed by SIGKILL, again and again, with a managed server: nothing is left, nothing is doubled."""

import re
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import free_port, python
from fleet_worker.host.file_lock import holder
from fleet_worker.testing import embedded_broker, worker_toml
from tests.mlx_clients import until
from tests.ups import running_up

CHAT = "sim-chat"
HELLO = [{"role": "user", "content": "Hello"}]
WITHIN = 30.0
KILLS = 20
MOMENTS = ["runs the nodes of", "the server of local (starts|runs)", "accepts connections", "local@mini starts"]
PORT = free_port()


@pytest.fixture
def environment():
    """A host whose nodes have a short grace."""
    serve = [*python("-P", "-m", "fleet_worker.simulator"), "--port", "{port}", "--model", CHAT]
    instance = {"serve": serve, "base_url": f"http://127.0.0.1:{PORT}", "models": {CHAT: {}}}
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder, embedded_broker() as url:
        config = Path(folder, "worker.toml")
        config.write_text('host = "mini"\n[worker]\ndrain_grace = 1\n' + worker_toml("local", instance))
        yield {"FLEET_CONFIG": str(config), "FLEET_STATE_DIR": f"{folder}/state", "FLEET_BROKER_URL": url}


def processes(environment):
    """All of this host: those with its variables, and its servers, which do not get them."""
    found = []
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if variables.get("FLEET_CONFIG") == environment["FLEET_CONFIG"] or str(PORT) in words:
            found.append(words)
    return found


@pytest.mark.faults
@pytest.mark.rest
@pytest.mark.timeout(180)
def test_nothing_is_left_of_an_up_that_is_killed_and_the_next_one_serves(environment):
    up = python("-m", "fleet_worker", "up")
    with ExitStack() as stack:
        for number in range(KILLS):
            process = stack.enter_context(running_up(up, environment))
            moment = MOMENTS[number % len(MOMENTS)] if number < KILLS - 1 else "local@mini is ready"
            process.wait_for(lambda line, moment=moment: re.search(moment, line), WITHIN)
            assert sum(str(PORT) in words for words in processes(environment)) <= 1
            process.signal(signal.SIGKILL)
            process.wait(WITHIN)
        until(lambda: not processes(environment), WITHIN)

        process = stack.enter_context(running_up(up, environment))
        process.wait_for("local@mini is ready", WITHIN)
        with Router(Settings(broker_url=environment["FLEET_BROKER_URL"])) as router:
            assert router.chat(CHAT, HELLO, max_tokens=3, timeout=WITHIN).content
        process.signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0
        until(lambda: not processes(environment), WITHIN)
    left = list(Path(environment["FLEET_STATE_DIR"]).iterdir())
    assert all(path.suffix == ".lock" and holder(path) is None for path in left), left
