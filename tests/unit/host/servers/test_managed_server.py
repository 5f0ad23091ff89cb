"""`ManagedServer` with real processes: tests/servers.py has their manners."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fleet_worker import Settings
from fleet_worker.host.child_process import free_port
from fleet_worker.host.node_process import NEVER
from fleet_worker.host.servers import managed_server, server_port, server_record
from fleet_worker.host.servers.custody import Custody
from fleet_worker.host.servers.managed_server import ManagedServer
from fleet_worker.host.servers.process_family import is_alive, marked
from fleet_worker.host.servers.restart_policy import PACE, Pace
from fleet_worker.host.servers.server_process import ServerProcess
from tests import servers

WITHIN = 10.0
SERVER = servers.__file__
QUICK = Pace(first=0.01, longest=0.05, quarantine=0.15)


class Up:
    """Plays `fleet-worker up` for one instance; `again` is another `up` on the same state."""

    def __init__(self, folder, port, *manners, pace=QUICK, **instance):
        self.folder, self.port, self.pace = folder, port, pace
        self.managed = ManagedServer.of(self.settings(*manners, **instance), "local", pace)
        self.stages = []

    def settings(self, *manners, **instance):
        words = [sys.executable, "-S", SERVER, "{port}", *manners]
        local = {"serve": words, "base_url": f"http://127.0.0.1:{self.port}", **instance}
        return Settings(state_dir=self.folder, host="mini", instances={"local": local})

    def again(self, *manners, **instance):
        return Up(self.folder, self.port, *manners, pace=self.pace, **instance)

    def until(self, wanted, within=WITHIN):
        """Do what `up` does until this is true."""
        deadline = time.monotonic() + within
        while not wanted():
            assert time.monotonic() < deadline, self.status
            self.step()
            time.sleep(0.005)
        return self.status

    def step(self):
        self.managed.reap()
        if self.managed.due <= time.monotonic():
            self.managed.act()
        if not self.stages or self.stages[-1] != self.status.stage:
            self.stages.append(self.status.stage)

    def serve(self):
        self.managed.start()
        return self.until(lambda: self.managed.serves)

    @property
    def status(self):
        return self.managed.status

    def close(self):
        self.managed.stop(grace=0.0)
        self.until(lambda: self.managed.gone)
        self.managed.close()


@pytest.fixture
def ups(tmp_path, monkeypatch):
    """Starts `Up`s on one state folder and one free port; all of them and their servers are gone in the end."""
    monkeypatch.setattr(server_port, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(server_port, "PAUSE", 0.1)
    found = []
    port = free_port()

    def start(*manners, folder=tmp_path, **instance):
        found.append(Up(folder, port, *manners, **instance))
        return found[-1]

    yield start
    for up in reversed(found):
        up.close()
    assert not list(marked(Custody("local", folder=tmp_path, host="mini")._owner))


def processes_of(up):
    return [process.pid for process in marked(up.managed._custody.mark)]


def has_it_print(port, text):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"print {text}\n".encode())
        assert client.recv(10)


def refuses(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def ends(pid, within=WITHIN):
    deadline = time.monotonic() + within
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def stranger(port):
    """Another program that listens on a port."""
    process = subprocess.Popen([sys.executable, "-S", SERVER, str(port)], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- A good life


def test_it_starts_serves_and_ends(ups, tmp_path):
    up = ups()
    assert (up.status.stage, up.managed.due, up.managed.gone) == ("off", NEVER, True)
    status = up.serve()
    assert (status.reason, status.restarts, status.deaths) == ("", 0, 0)
    assert psutil.Process(status.pid).cmdline()[3:] == [str(up.port)]
    up.managed.stop()
    assert up.status.stage == "stopping"
    assert up.until(lambda: up.managed.gone).stage == "off"
    up.managed.close()
    assert refuses(up.port)
    assert list(tmp_path.iterdir()) == []


def test_what_it_prints_is_in_the_log_by_its_name(ups, caplog):
    caplog.set_level(logging.INFO)
    ups("says=hello from the server").serve()
    assert "[local] hello from the server" in [record.getMessage() for record in caplog.records]


def test_variables_reach_it_and_secrets_do_not_reach_the_log(ups, caplog, monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", "redis://:pass@broker:6379/0")
    caplog.set_level(logging.INFO)
    named = {"HF_TOKEN": "hf_very_secret", "HF_HOME": "/models"}
    up = ups("shows=HF_TOKEN", "shows=HF_HOME", "shows=FLEET_BROKER_URL", environment=named)
    up.serve()
    assert "[local] HF_TOKEN is ***" in caplog.text
    assert "[local] HF_HOME is /models" in caplog.text
    assert "[local] FLEET_BROKER_URL is None" in caplog.text
    assert "hf_very_secret" not in caplog.text + repr(up.managed.__dict__)


def test_a_restart_is_no_death(ups):
    up = ups(pace=PACE)
    first = up.serve().pid
    up.managed.restart("its node says so")
    assert up.status.stage == "stopping"
    assert up.status.reason == "its node says so"
    status = up.until(lambda: up.managed.serves)
    assert status.pid != first
    assert (status.restarts, status.deaths) == (1, 0)
    assert up.managed.restarts_from > time.monotonic() + 20
    up.managed.restart("again", by_operator=True)
    assert up.managed.restarts_from < time.monotonic()


@pytest.mark.rest
def test_another_command_line_counts_from_the_next_start(ups):
    up = ups()
    up.serve()
    assert not up.managed.configure(up.settings(max_memory="9 GB"))
    assert up.managed.configure(up.settings("says=more"))
    assert up.managed.serves


# --- Deaths


def test_a_server_that_is_killed_serves_again_within_its_start_and_a_second(ups):
    up = ups()
    pid = up.serve().pid
    os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    up.until(lambda: not up.managed.serves)
    status = up.until(lambda: up.managed.serves)
    assert time.monotonic() - killed_at < 2.0
    assert (status.restarts, status.deaths) == (1, 1)


def test_one_that_dies_at_once_is_quarantined_after_five_deaths_and_says_why(ups, caplog):
    up = ups("dies=3")
    up.managed.start()
    status = up.until(lambda: up.status.stage == "quarantined")
    assert status.deaths == 5
    assert "ended with exit code 3" in status.reason
    assert "No module named 'mlx_lm'" in status.reason
    assert status.pid is None
    in_quarantine = time.monotonic()
    up.until(lambda: up.status.deaths == 7)
    assert time.monotonic() - in_quarantine > 0.28
    assert caplog.text.count("died too often") == 3
    up.managed.configure(up.settings())
    up.managed.start()
    assert up.until(lambda: up.managed.serves, within=2).reason == ""


@pytest.mark.rest
def test_what_it_printed_after_it_served_is_in_no_reason(ups):
    """It may hold a part of a prompt."""
    up = ups(pace=Pace(first=30.0))
    up.managed.start()
    for deaths in (1, 2):
        up.until(lambda: up.managed.serves)
        has_it_print(up.port, "a prompt")
        with socket.create_connection(("127.0.0.1", up.port)) as client:
            client.sendall(b"exit\n")
        status = up.until(lambda deaths=deaths: up.status.deaths == deaths)
    assert (status.stage, status.reason) == ("waiting", "ended with exit code 1")


def test_a_command_that_does_not_exist_is_named_and_tried_rarely(ups):
    up = ups(serve="no-such-server --port {port}")
    up.managed.start()
    status = up.until(lambda: up.status.stage == "quarantined")
    assert "there is no program no-such-server, which serve names: install it" in status.reason
    assert (status.deaths, status.restarts) == (5, 0)


@pytest.mark.rest
def test_a_restart_that_a_fault_asks_for_ends_no_quarantine_but_that_of_an_operator_does(ups):
    up = ups("dies", pace=Pace(first=0.01, longest=0.05))
    up.managed.start()
    up.until(lambda: up.status.stage == "quarantined")
    up.managed.restart("its node says so")
    assert up.status.stage == "quarantined"
    assert up.managed.due > time.monotonic() + 500
    up.managed.restart("an operator says so", by_operator=True)
    up.until(lambda: up.status.deaths == 6)


@pytest.mark.rest
def test_one_that_is_never_ready_is_ended_and_counts_as_dead(ups):
    up = ups("never_ready", serve_timeout=0.15)
    up.managed.start()
    status = up.until(lambda: up.status.stage == "quarantined")
    assert status.reason == f"accepted no connection on port {up.port} within 0.15 s"
    assert status.deaths == 5


@pytest.mark.rest
def test_one_that_loads_for_a_while_is_left_alone(ups):
    up = ups("loads=0.7")
    up.managed.start()
    status = up.until(lambda: up.managed.serves)
    assert (status.restarts, status.deaths) == (0, 0)


# --- Ends


def test_what_it_has_started_ends_with_it_also_what_left_its_group_or_is_nobody_s_child(ups):
    up = ups("forks", "detaches")
    up.serve()
    pids = processes_of(up)
    assert len(pids) == 4
    os.kill(up.status.pid, signal.SIGKILL)
    up.until(lambda: up.status.deaths == 1)
    for pid in pids:
        ends(pid)


@pytest.mark.rest
def test_one_that_ignores_sigterm_is_killed_with_its_children(ups):
    up = ups("deaf", "forks")
    up.serve()
    pids = processes_of(up)
    up.managed.stop(grace=0.3)
    up.until(lambda: up.managed.gone)
    for pid in pids:
        ends(pid)
    assert refuses(up.port)


@pytest.mark.rest
def test_one_that_is_frozen_ends_too(ups):
    up = ups()
    os.kill(up.serve().pid, signal.SIGSTOP)
    up.managed.stop()
    up.until(lambda: up.managed.gone, within=5)


@pytest.mark.rest
def test_kill_ends_it_at_once_and_for_good(ups):
    up = ups("deaf")
    up.serve()
    up.managed.kill()
    up.until(lambda: up.managed.gone, within=2)
    assert up.managed.due == NEVER


@pytest.mark.rest
def test_a_child_that_outlives_its_parent_does_not_keep_the_port(ups):
    """The child holds it, in a session of its own, and ignores SIGTERM."""
    up = ups("abandons")
    up.managed.start()
    up.until(lambda: up.status.deaths == 2)
    assert "blocked" not in up.stages


# --- Memory


@pytest.mark.rest
def test_one_that_grows_beyond_its_limit_wants_a_restart_but_not_again_and_again(ups):
    up = ups("holds=150", max_memory="100 MB", pace=PACE)
    up.serve()
    up.until(lambda: up.managed.wants_restart)
    assert "more than max_memory (0.10 GB)" in up.managed.wants_restart
    assert up.status.memory > 150e6
    up.managed.restart(up.managed.wants_restart)
    up.until(lambda: up.managed.serves and up.status.memory)
    assert up.managed.wants_restart == ""
    assert up.managed.restarts_from > time.monotonic() + 20


# --- Its port


@pytest.mark.rest
def test_the_server_after_one_that_could_not_be_killed_is_left_alone(ups, monkeypatch):
    monkeypatch.setattr(managed_server, "UNKILLABLE_AFTER", 0.05)
    up = ups("deaf")
    up.serve()
    child = up.managed._run.process._child
    with monkeypatch.context() as patched:
        patched.setattr(ServerProcess, "kill", lambda process: None)
        up.managed.restart("an operator restarts it", by_operator=True, grace=0.0)
        up.until(lambda: up.status.deaths)
    status = up.until(lambda: up.managed.serves)
    assert (status.deaths, status.restarts) == (1, 1)
    child.wait(WITHIN)  # it had the port


@pytest.mark.rest
def test_a_stranger_on_its_port_is_named_never_fought_and_waited_for(ups, caplog):
    up = ups()
    with stranger(up.port) as other:
        up.managed.start()
        status = up.until(lambda: up.status.stage == "blocked")
        assert (
            status.reason
            == f"port {up.port} is in use by {psutil.Process(other.pid).name()} servers.py, pid {other.pid}"
        )
        assert (status.deaths, status.pid) == (0, None)
        assert "; end that, or set another base_url" in caplog.text
        assert other.poll() is None
    assert up.until(lambda: up.managed.serves).deaths == 0


@pytest.mark.rest
def test_a_stranger_that_takes_the_port_during_its_start_does_not_pass_for_it(ups):
    up = ups("loads=60")
    up.managed.start()
    up.until(lambda: up.status.pid)
    with stranger(up.port):
        status = up.until(lambda: up.status.stage == "blocked")
        assert "servers.py" in status.reason
        assert status.deaths == 0


@pytest.mark.rest
def test_two_ups_that_want_one_port_do_not_fight(ups, tmp_path):
    first = ups()
    first.serve()
    second = ups(folder=tmp_path / "other")
    second.managed.start()
    second.until(lambda: second.status.stage == "blocked")
    assert first.managed.serves
    assert f"pid {first.status.pid}" in second.status.reason


# --- An `up` that was killed


def shells():
    """Those that watch over children of this process: a broker of other tests has one, too."""
    return {each for each in psutil.Process().children() if each.name() == "sh"}


def test_the_next_up_takes_the_server_over(ups, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    others = shells()
    killed = ups()
    pid = killed.serve().pid
    (guard,) = shells() - others
    up = ups()
    status = up.serve()
    assert status.pid == pid
    assert (status.restarts, status.deaths) == (0, 0)
    assert guard.wait(WITHIN) == -signal.SIGKILL
    killed.managed._custody.close()  # nothing guards it there any more
    os.kill(pid, signal.SIGKILL)
    killed.managed._run.process._child.wait()  # the kernel tells its parent; here that is this process still
    status = up.until(lambda: up.status.deaths == 1 and up.managed.serves)
    assert status.pid != pid


@pytest.mark.rest
def test_the_next_up_restarts_a_server_whose_command_line_has_changed(ups):
    pid = ups().serve().pid
    up = ups("says=something else")
    up.managed.start()
    status = up.until(lambda: up.managed.serves)
    assert status.pid != pid
    assert status.deaths == 0
    ends(pid)


@pytest.mark.rest
@pytest.mark.parametrize("damage", ["missing", "half", "garbage", "other pid", "reused pid", "a folder"])
def test_without_a_good_record_the_next_up_ends_what_is_left_and_starts_afresh(damage, ups, tmp_path):
    former = ups("deaf", "forks")
    pid = former.serve().pid
    left = processes_of(former)
    (record,) = tmp_path.glob("*.json")
    text = record.read_text()
    record.unlink()
    if damage == "half":
        record.write_text(text[: len(text) // 2])
    elif damage == "garbage":
        record.write_bytes(os.urandom(20_000))
    elif damage == "other pid":
        record.write_text(text.replace(str(pid), "99999999999999999999"))
    elif damage == "reused pid":
        record.write_text(text.replace(f'"pid": {pid}', f'"pid": {os.getpid()}'))
    elif damage == "a folder":
        record.mkdir()
    up = ups()
    status = up.serve()
    assert status.pid != pid
    for each in left:
        ends(each)


@pytest.mark.rest
def test_a_state_folder_that_cannot_be_written_costs_the_take_over_only(ups, tmp_path, caplog):
    (tmp_path / "file").touch()
    up = Up(tmp_path / "file" / "state", free_port())
    up.serve()
    assert "no other fleet-worker up could take over the server" in caplog.text
    up.close()


UP = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.host.servers.test_managed_server import Up
up = Up(Path(sys.argv[2]), int(sys.argv[3]), "deaf", "forks")
up.serve()
descriptor = up.managed.guard_fd
if os.fork() == 0:  # the node
    os.set_inheritable(descriptor, True)
    os.execv("/bin/sh", ["sh", "-c", "echo $$; exec sleep 60"])
while True:
    up.step()
    time.sleep(0.005)
"""


@contextlib.contextmanager
def killed_up(folder, port):
    """An `up` in another process, killed by SIGKILL while a node of it lives on. Yields the node's id."""
    command = [sys.executable, "-c", UP, str(Path(SERVER).parents[1]), str(folder), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as up:
        try:
            node = int(up.stdout.readline())
        finally:
            up.kill()
    try:
        yield node
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(node, signal.SIGKILL)


@pytest.mark.rest
def test_if_up_is_killed_the_server_lives_as_long_as_its_node_and_nothing_is_left_then(tmp_path):
    port = free_port()
    with killed_up(tmp_path, port) as node:
        left = list(marked(Custody("local", folder=tmp_path, host="mini")._owner))
        assert len(left) == 3
        time.sleep(0.3)
        assert all(process.is_running() for process in left)
        assert not refuses(port)
        os.kill(node, signal.SIGKILL)
        for process in left:
            ends(process.pid)
        assert refuses(port)


@pytest.mark.rest
def test_a_server_that_was_taken_over_outlives_the_node_of_the_killed_up_and_what_it_prints_is_read(
    ups, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    up = ups("deaf", "forks")
    with killed_up(tmp_path, up.port) as node:
        (server,) = (each for each in marked(up.managed._custody._owner) if each.cmdline()[-1] == "forks")
        has_it_print(up.port, "while nobody reads")
        assert up.serve().pid == server.pid
        os.kill(node, signal.SIGKILL)
        time.sleep(0.3)
        has_it_print(up.port, "hello")
        up.managed._output.last_lines()
        messages = [record.getMessage() for record in caplog.records]
        assert {"[local] while nobody reads", "[local] hello"} <= set(messages)
        up.until(lambda: up.status.memory)
        assert up.managed.serves


@pytest.mark.rest
def test_the_guard_of_a_killed_up_does_not_end_the_server_of_the_next(ups, tmp_path):
    """Without the record that guard is not known, and acts when the node has ended."""
    up = ups()
    with killed_up(tmp_path, up.port) as node:
        (path,) = tmp_path.glob("*.json")
        guard = server_record.read(path).guard.process()
        path.unlink()
        pid = up.serve().pid
        os.kill(node, signal.SIGKILL)
        up.until(lambda: not is_alive(guard))
        assert (up.status.pid, up.status.deaths) == (pid, 0)


@pytest.mark.rest
def test_a_guard_that_somebody_kills_is_replaced(ups, caplog):
    others = shells()
    up = ups()
    up.serve()
    (guard,) = shells() - others
    guard.kill()
    up.until(lambda: "another one starts" in caplog.text)
    (other,) = shells() - others - {guard}
    assert other.pid != guard.pid


@contextlib.contextmanager
def bystander(**options):
    """Another program, which leads its own group."""
    process = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("marked_as", ["another folder", "this instance", "this process"])
def test_a_wrong_record_kills_no_other_program(ups, tmp_path, marked_as):
    up = ups()
    mark = up.managed._custody.mark if marked_as != "another folder" else "0123456789abcdef/0123456789abcdef"
    with bystander(env={"FLEET_SERVER": "of another"}) as leader, bystander() as guard:
        server = os.getpid() if marked_as == "this process" else leader.pid
        record = server_record.ServerRecord(
            server_record.Identity.of(server), server_record.Identity.of(guard.pid), "fingerprint", mark
        )
        server_record.write(tmp_path / "server-local@mini.json", record)
        assert up.serve().pid not in (server, None)
        assert leader.poll() is None
        assert guard.poll() is None
