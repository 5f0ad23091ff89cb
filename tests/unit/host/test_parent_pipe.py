"""What becomes of the children of a process that is killed."""

import os
import signal
import subprocess
import time

import pytest

from fleet_worker.host.child_process import ChildProcess, child, python
from fleet_worker.host.parent_pipe import attach_to_parent

WITHIN = 10.0
PARENT = """
import os, subprocess, sys
from fleet_worker.host.parent_pipe import PARENT_PIPE, parent_pipe
with parent_pipe() as end:
    env = os.environ | {PARENT_PIPE: str(end)}
    command = [sys.executable, "-c", sys.argv[1]]
    children = [subprocess.Popen([*command, number], pass_fds=[end], env=env) for number in "12"]
    for each in children:
        each.wait()
"""
CHILD = """
import os, select, signal, sys, threading
from fleet_worker.host.parent_pipe import PARENT_PIPE, attach_to_parent

def say(what):
    os.write(1, f"child {sys.argv[1]} {what}\\n".encode())  # at once, or it may get between two parts of another's

def end(*_):
    say("ends")
    sys.exit()

def live(begin, handler, grace):
    signal.signal(signal.SIGTERM, handler)
    begin()
    attach_to_parent("local@mini", grace=grace)
    say("is bound")
    for _ in range(100):  # as Celery's loop: a signal that comes just before a wait does not end it
        threading.Event().wait(0.2)

def imports():
    say("begins")
    select.select([int(os.environ[PARENT_PIPE])], [], [], 20)

"""
WARM = CHILD + "live(lambda: None, end, 15)"
DEAF = CHILD + "live(lambda: None, signal.SIG_IGN, 0.2)"
LATE = CHILD + "live(imports, end, 15)"
SUCCESSOR = """
import logging, os, signal, sys
from fleet_worker.host.parent_pipe import NODE_LOCK, attach_to_parent
logging.basicConfig(level=logging.INFO)
os.environ[NODE_LOCK] = str(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT))
attach_to_parent("local@mini", grace=float(sys.argv[2]) - 5)
print("begins", flush=True)
signal.pause()
"""


def parent_of(text, says):
    """Nobody is left of the three when its output ends."""
    parent = ChildProcess("the parent", python("-c", PARENT, text))
    for number in "12":
        parent.wait_for(f"child {number} {says}", WITHIN)
    return parent


def killed(parent):
    """Kill it with SIGKILL, and return what its family printed to the end."""
    started = time.monotonic()
    parent.signal(signal.SIGKILL)
    parent.wait(WITHIN)
    parent._reader.join(WITHIN)
    assert time.monotonic() - started < WITHIN / 2
    parent.stop()
    return parent.output


def ends(output):
    return {line for line in output.splitlines() if line.startswith("child") and line.endswith("ends")}


def test_children_end_warmly_when_their_parent_is_killed():
    parent = parent_of(WARM, "is bound")
    assert not ends(parent.output)
    assert ends(killed(parent)) == {"child 1 ends", "child 2 ends"}


def test_children_that_do_not_obey_are_killed_after_their_grace():
    output = killed(parent_of(DEAF, "is bound"))
    assert not ends(output)


def test_a_child_that_still_begins_when_its_parent_is_killed_notices_it_later():
    output = killed(parent_of(LATE, "begins"))
    assert ends(output) == {"child 1 ends", "child 2 ends"}


def test_a_process_without_such_a_parent_is_not_bound():
    attach_to_parent("local@mini", grace=0.0)


@pytest.fixture
def lock(tmp_path):
    return str(tmp_path / "node-local@mini.lock")


def test_a_node_begins_when_the_one_before_it_has_ended(lock):
    with child("first", python("-c", SUCCESSOR, lock, "15")) as first:
        first.wait_for("begins", WITHIN)
        with child("second", python("-c", SUCCESSOR, lock, "15")) as second:
            second.wait_for("local@mini waits until its earlier process has ended", WITHIN)
            assert "begins" not in second.output
            first.signal(signal.SIGKILL)
            second.wait_for("begins", WITHIN)


def test_a_node_does_not_wait_for_ever_for_the_one_before_it(lock):
    with child("first", python("-c", SUCCESSOR, lock, "15")) as first:
        first.wait_for("begins", WITHIN)
        with child("second", python("-c", SUCCESSOR, lock, "0.1")) as second:
            second.wait_for("InstanceUnavailable: the earlier process of local@mini did not end within 0.1 s", WITHIN)
            assert second.wait(WITHIN) == 1
    assert os.path.exists(lock)


KILLED = """
import os, subprocess, sys
from fleet_worker.host.parent_pipe import OrphanKiller
killer = OrphanKiller()
group = subprocess.Popen(["sh", "-c", "sleep 30 & sleep 30"], start_new_session=True, stdout=subprocess.DEVNULL)
killer.watch(group.pid)
if sys.argv[1] == "closed":
    killer.close()
print(group.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def group_of_a_killed_process(killer):
    done = subprocess.run(python("-c", KILLED, killer), stdout=subprocess.PIPE, text=True, timeout=WITHIN)
    assert done.returncode == -signal.SIGKILL
    return int(done.stdout)


def exists(group):
    states = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], check=True, capture_output=True, text=True).stdout
    return any(row[0] == str(group) and row[1][0] != "Z" for row in map(str.split, states.splitlines()))


def test_all_processes_of_a_watched_group_are_killed_with_their_parent():
    group = group_of_a_killed_process("watches")
    deadline = time.monotonic() + WITHIN
    while exists(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_group_that_is_watched_no_longer_lives_on():
    group = group_of_a_killed_process("closed")
    time.sleep(0.3)
    assert exists(group)
    os.killpg(group, signal.SIGKILL)
