"""The process that keeps a machine awake, with a `systemd-inhibit` that does nothing but run its command."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability import keep_awake, probes
from fleet_worker.host.availability.keep_awake import KeepAwake
from fleet_worker.host.child_process import python
from fleet_worker.host.node_process import NEVER
from tests.clock import Clock

WANTED = AvailabilitySettings(keep_awake=True)
INHIBIT = """#!/bin/sh
echo "$$ $@" >>"$0.log"
while [ "${1#--}" != "$1" ]; do shift; done
"$@"
"""
"""As the real one: it runs the command after its options as a child, and ends with it."""
WITHIN = 10.0


@pytest.fixture
def inhibit(tmp_path, monkeypatch):
    """Returns a function: the calls of `systemd-inhibit` so far, each its process id and its arguments."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(probes, "FOLDERS", os.defpath)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "systemd-inhibit"
    program.write_text(INHIBIT)
    program.chmod(0o755)
    log = tmp_path / "systemd-inhibit.log"

    def calls():
        return [line.split(" ", 1) for line in log.read_text().splitlines()] if log.exists() else []

    return calls


@pytest.fixture
def awake():
    clock = Clock(1000.0)
    found = KeepAwake(WANTED, linger=30.0, clock=clock)
    found.clock = clock
    yield found
    found.close()


def until(condition):
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(call):
    return psutil.pid_exists(int(call[0])) and psutil.Process(int(call[0])).status() != psutil.STATUS_ZOMBIE


def test_a_machine_stays_awake_while_requests_run_and_a_while_after_them(inhibit, awake):
    awake.working(0)
    assert awake.due == NEVER
    awake.working(2)
    until(inhibit)
    for running, due in ((1, NEVER), (3, NEVER), (0, 1030.0), (0, 1030.0), (1, NEVER), (0, 1030.0)):
        awake.working(running)
        awake.act()
        assert awake.due == due
    awake.clock.now = 1029.0
    awake.act()
    (call,) = inhibit()
    assert is_running(call)
    assert call[1].startswith("--what=idle:sleep --who=fleet-worker ")
    awake.clock.now = awake.due
    awake.act()
    assert awake.due == NEVER
    until(lambda: not is_running(call))


def test_the_next_request_starts_another_one(inhibit, awake):
    awake.working(1)
    awake.working(0)
    awake.clock.now = awake.due
    awake.act()
    awake.working(1)
    until(lambda: len(inhibit()) == 2)
    awake.close()
    assert not any(map(is_running, inhibit()))


@pytest.mark.parametrize("settings", [AvailabilitySettings(), AvailabilitySettings(hours="sat", keep_awake=False)])
def test_a_host_that_does_not_ask_for_it_may_sleep(settings, inhibit):
    KeepAwake(settings).working(5)
    assert inhibit() == []


def test_a_system_that_refuses_it_is_asked_once(inhibit, awake, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "systemd-inhibit").write_text("#!/bin/sh\nexit 1\n")
    awake.working(1)
    until(lambda: awake._process.poll() is not None)
    for _ in range(5):
        awake.working(1)
    assert len(caplog.records) == 1
    assert "systemd-inhibit ended with exit code 1" in caplog.text


def test_a_system_without_the_command_is_told_once(inhibit, awake, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(keep_awake, "find_program", lambda _: None)
    awake.working(1)
    awake.working(1)
    assert [record.getMessage() for record in caplog.records] == [
        "this machine may go to sleep while it runs requests: systemd-inhibit is not there"
    ]


def test_on_macos_it_is_caffeinate(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_awake.command() == ["caffeinate", "-i", "-s"]


HOLDS = """
import sys, time
from fleet_worker.host.availability.keep_awake import KeepAwake
from fleet_worker.availability_settings import AvailabilitySettings
KeepAwake(AvailabilitySettings(keep_awake=True)).working(1)
print("works", flush=True)
time.sleep(60)
"""


def test_it_ends_with_a_process_that_is_killed(inhibit):
    with subprocess.Popen(python("-c", HOLDS), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"works\n"
        until(inhibit)
        (call,) = inhibit()
        assert is_running(call)
        process.send_signal(signal.SIGKILL)
    until(lambda: not is_running(call))
