import signal
import subprocess
import sys
import time

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.node_process import NEVER, Backoff, NodeProcess

WITHIN = 10.0
WARM = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a handler may miss what comes just before a pause
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
"""
DEAF = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-S", "-c", "import signal; print('up', flush=True); signal.pause()"])
signal.pause()
"""
LEAVING_A_CHILD = """
import subprocess, sys
subprocess.Popen([sys.executable, "-S", "-c", "import signal; print('up', flush=True); signal.pause()"])
sys.stdin.readline()
sys.exit(3)
"""


class Node:
    """A node of the host `mini` whose process runs the program that it is given next."""

    def __init__(self, backoff):
        self.program = ""
        self.names = []
        self.processes = []
        self.under_test = NodeProcess("local", self._start, backoff)

    def _start(self, name):
        self.names.append(name)
        if isinstance(self.program, Exception):
            raise self.program
        command = [sys.executable, "-S", "-c", self.program]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.processes.append(subprocess.Popen(command, **pipes, start_new_session=True))
        return self.process

    @property
    def process(self):
        return self.processes[-1]

    def run(self, program):
        self.program = program
        self.under_test.act("local@mini")
        return self.under_test

    def up(self, program):
        self.run(program)
        assert self.process.stdout.readline() == b"up\n"
        return self.under_test

    def ended(self):
        """Its exit code, once the supervisor has noticed it."""
        code = self.process.wait(WITHIN)
        self.under_test.reap()
        return code

    def close(self):
        """Fails by its timeout if a process of ours, or a child of one, is left."""
        self.under_test.kill()
        for process in self.processes:
            process.communicate(timeout=WITHIN)


@pytest.fixture
def node():
    node = Node(Backoff(first=10.0, longest=40.0))
    yield node
    node.close()


def waits(node):
    """Seconds until something is due, at most a second too few."""
    return node.due - time.monotonic()


# --- Back-off


@pytest.mark.parametrize(
    ("failures", "delay"), [(1, 0), (2, 1), (3, 2), (4, 4), (6, 16), (7, 30), (8, 30), (100_000, 30)]
)
def test_the_delay_doubles_with_each_failure_up_to_its_limit(failures, delay):
    delays = [Backoff().delay(failures) for _ in range(100)]
    assert 0.8 * delay <= min(delays) <= max(delays) <= delay
    assert len(set(delays)) > 1 or not delay


def test_the_first_failure_costs_no_time_and_the_others_more_and_more(node):
    told = []
    for _ in range(5):
        process = node.run("raise SystemExit(69)")
        assert node.ended() == 69
        told.append(waits(process))
    assert told[0] <= 0
    for waited, delay in zip(told[1:], [10, 20, 40, 40], strict=True):
        assert 0.8 * delay - 1 < waited <= delay


def test_failures_are_forgotten_after_a_while():
    node = Node(Backoff(first=10.0, forgotten_after=0.05))
    for _ in range(3):
        process = node.run("import time; time.sleep(0.06)")
        node.ended()
        assert waits(process) <= 0
    node.close()


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)"])
def test_however_a_node_ends_that_nobody_stopped_it_starts_again(node, end):
    process = node.run(end)
    assert process.due == NEVER
    node.ended()
    assert waits(process) <= 0
    node.up(WARM)
    assert node.names == ["local@mini", "local@mini"]


@pytest.mark.parametrize("error", [OSError(11, "no more processes"), ConfigurationError("state_dir is full")])
def test_a_node_that_cannot_be_started_has_failed(node, error):
    process = node.run(error)
    assert waits(process) <= 0
    node.run(error)
    assert 7 < waits(process) <= 10


# --- What exit codes and signals mean


def test_a_wrong_configuration_is_waited_out(node):
    process = node.run("raise SystemExit(78)")
    node.ended()
    assert process.given_up
    assert process.due == NEVER
    process.reload()
    assert not process.given_up
    assert waits(process) <= 0


@pytest.mark.parametrize("end", ["raise SystemExit(75)", "import os; os.kill(os.getpid(), 1)"])
def test_a_node_that_asks_for_a_new_start_has_not_failed(node, end):
    for _ in range(3):
        process = node.run(end)
        node.ended()
        assert waits(process) <= 0
    node.run("raise SystemExit(69)")
    node.ended()
    assert waits(process) <= 0  # it was the first failure


def test_a_running_node_is_told_to_reload(node):
    process = node.up(
        "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {1}); print('up', flush=True); "
        "signal.sigwait({1}); sys.exit(75)"
    )
    process.reload()
    assert node.ended() == 75
    assert waits(process) <= 0


def test_a_reload_shortens_the_wait_of_a_node_that_has_failed(node):
    for _ in range(3):
        process = node.run("raise SystemExit(69)")
        node.ended()
    assert waits(process) > 1
    process.reload()
    assert waits(process) <= 0


# --- The end


def test_a_node_that_nobody_wants_any_more_is_gone_when_it_has_ended(node):
    process = node.up(WARM)
    process.wanted = False
    process.stop(grace=15)
    assert 14 < waits(process) <= 15
    assert not process.gone
    assert node.ended() == 0
    assert process.gone
    assert process.due == NEVER


def test_a_node_is_replaced_when_it_has_ended(node):
    process = node.up(WARM)
    process.replace(grace=15)
    process.reload()  # which must not disturb its end
    assert node.ended() == 0
    assert waits(process) <= 0


def test_a_node_that_was_given_up_is_replaced_at_once(node):
    process = node.run("raise SystemExit(78)")
    node.ended()
    process.replace(grace=15)
    assert waits(process) <= 0
    assert not process.given_up


def test_a_node_that_does_not_end_in_time_is_killed_with_its_children(node):
    process = node.up(DEAF)
    process.wanted = False
    process.stop(grace=0.0)
    process.stop(grace=15.0)  # once is enough
    assert waits(process) <= 0
    process.act("local@mini")
    assert node.ended() == -signal.SIGKILL
    assert process.gone


def test_a_frozen_node_ends_too(node):
    process = node.up(WARM)
    node.process.send_signal(signal.SIGSTOP)
    process.stop(grace=15)
    assert node.ended() == 0


def test_what_a_node_leaves_behind_is_killed(node):
    node.up(LEAVING_A_CHILD)
    node.process.stdin.write(b"\n")
    node.process.stdin.flush()
    assert node.ended() == 3
    assert node.process.stdout.read() == b""  # nobody has it open any more


def test_what_does_not_run_is_stopped_and_killed_without_harm(node):
    process = node.under_test
    process.stop(grace=1)
    process.kill()
    assert waits(process) <= 0
