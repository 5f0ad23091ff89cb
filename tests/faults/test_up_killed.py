"""`fleet-worker up` killed by SIGKILL, again and again, with a managed server: nothing is left, nothing is doubled."""

import re
import signal
import tempfile
from contextlib import ExitStack

import psutil
import pytest

from fleet_worker import Router
from fleet_worker.host.file_lock import holder
from fleet_worker.testing import embedded_broker
from tests.minis import CHAT, HELLO, UP, Mini
from tests.mlx_clients import until
from tests.ups import up_with

WITHIN = 30.0
KILLS = 20
REAL_EVERY = 5
"""So many kills have one of real nodes. Those of the others are programs of a line, which start sooner."""
NODE = "import os; os.read(int(os.environ['FLEET_PARENT_PIPE']), 1)"
MOMENTS = ["runs the nodes of", "the server of local (starts|runs)", "accepts connections", "local@mini starts"]


@pytest.fixture
def mini():
    """One whose nodes have a short grace."""
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder, embedded_broker() as url:
        mini = Mini(folder, "mini", url, "[worker]\ndrain_grace = 1\n")
        mini.configure()
        yield mini


def processes(mini):
    """All of this host: those with its variables, and its servers, which do not get them."""
    found = []
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if variables.get("FLEET_CONFIG") == mini.environment["FLEET_CONFIG"] or str(mini.port) in words:
            found.append(words)
    return found


@pytest.mark.faults
@pytest.mark.rest
@pytest.mark.timeout(180)
def test_nothing_is_left_of_an_up_that_is_killed_and_the_next_one_serves(mini):
    with ExitStack() as stack:
        for number in range(KILLS):
            is_last = number == KILLS - 1
            command = UP if is_last or number % REAL_EVERY == 0 else up_with(NODE)
            process = stack.enter_context(mini.up(command)).process
            moment = "local@mini is ready" if is_last else MOMENTS[number % len(MOMENTS)]
            process.wait_for(lambda line, moment=moment: re.search(moment, line), WITHIN)
            assert sum(str(mini.port) in words for words in processes(mini)) <= 1
            process.signal(signal.SIGKILL)
            process.wait(WITHIN)
        until(lambda: not processes(mini), WITHIN)

        process = stack.enter_context(mini.up()).process
        process.wait_for("local@mini is ready", WITHIN)
        with Router(mini.settings) as router:
            assert router.chat(CHAT, HELLO, max_tokens=3, timeout=WITHIN).content
        process.signal(signal.SIGTERM)
        assert process.wait(WITHIN) == 0
        until(lambda: not processes(mini), WITHIN)
    left = list(mini.settings.state_dir.iterdir())
    assert all(path.suffix == ".lock" and holder(path) is None for path in left), left
