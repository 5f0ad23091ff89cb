"""What ends the wait of `fleet-worker up`: in processes of their own, as only a main thread gets signals."""

import subprocess

import pytest

from fleet_worker.host.child_process import python

WITHIN = 20.0
BEGIN = """
import os, signal, threading, time
from fleet_worker.host.up.event_loop import EventLoop
from fleet_worker.host.node_process import NEVER
heard = []
began = time.monotonic()
send = lambda number: os.kill(os.getpid(), number)
call = lambda loop: loop.call(lambda: heard.append("called"))
"""


@pytest.mark.parametrize(
    ("program", "prints"),
    [
        ("send(signal.SIGHUP); loop.wait(NEVER); print(heard)", "[1]"),
        ("send(signal.SIGTERM); send(signal.SIGINT); loop.wait(NEVER); print(sorted(heard))", "[2, 15]"),
        ("os.spawnlp(os.P_NOWAIT, 'true', 'true'); loop.wait(NEVER); print(heard)", "[]"),
        ("threading.Thread(target=call, args=(loop,)).start(); loop.wait(NEVER); print(heard)", "['called']"),
        ("loop.wait(began + 0.1); print(0.1 <= time.monotonic() - began < 5)", "True"),
        ("loop.wait(began - 9); print(time.monotonic() - began < 5)", "True"),
    ],
    ids=["hangup", "two signals", "child", "another thread", "time", "time that has passed"],
)
def test_a_wait_ends(program, prints):
    """Also by what came just before it."""
    whole = f"{BEGIN}\nwith EventLoop(heard.append) as loop: {program}"
    done = subprocess.run(python("-c", whole), capture_output=True, text=True, timeout=WITHIN)
    assert (done.stdout, done.stderr) == (f"{prints}\n", "")


def test_handlers_of_signals_are_those_of_before_when_it_ends():
    """As for Ctrl-C in a command that goes on."""
    whole = f"{BEGIN}\nbefore = signal.getsignal(signal.SIGINT)\nwith EventLoop(heard.append): pass\n"
    check = "print(signal.getsignal(signal.SIGINT) is before, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    done = subprocess.run(python("-c", whole + check), capture_output=True, text=True, timeout=WITHIN)
    assert done.stdout == "True True\n"
