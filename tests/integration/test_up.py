"""`fleet-worker up` with nodes that are programs of a few lines: what is started, started again, told and stopped."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet_worker.host.file_lock import holder
from fleet_worker.testing import worker_toml
from tests.ups import is_gone, running_up, up_with

WITHIN = 15.0
BIN = Path(sys.executable).parent
LIVES = """
import os, signal, sys
name = sys.argv[1]
def say(what):
    os.write(1, f"{name} {what}\\n".encode())  # at once, or it may get between two parts of another's
def ends(*_):
    say("ends")
    sys.exit()
def lives(on_reload=lambda *_: say("reloads")):
    told = {signal.SIGHUP: on_reload, signal.SIGTERM: ends}
    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # a handler may miss what comes in the moment before a pause
    say("lives")
    while True:
        told[signal.sigwait(told)]()
"""


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEET_CONFIG", str(tmp_path / "worker.toml"))
    monkeypatch.setenv("FLEET_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def configure(tmp_path):
    """Write the configuration of a host with these instances: so many slots, or None, which has not opted in."""

    def write(text='host = "mini"', /, **instances):
        tables = [
            worker_toml(name, {"limits": {"concurrency": slots}} if slots else {"fleet": {"enabled": False}})
            for name, slots in instances.items()
        ]
        (tmp_path / "worker.toml").write_text("\n".join([text, *tables]))

    return write


@contextmanager
def up(program=""):
    """An up whose nodes are this program. It has to be gone at the end of the block."""
    with running_up(up_with(f"{LIVES}\n{program or 'lives()'}")) as process:
        yield process
        assert is_gone(process)


@pytest.mark.rest
def test_a_mistyped_variable_and_an_unused_instance_are_said_when_up_starts_and_reloads(configure, monkeypatch):
    configure(local=1, idle=None)
    monkeypatch.setenv("FLEET_BROKER", "redis://:hush-hush@h/0")
    monkeypatch.setenv("FLEET_INSTANCES__LOCL__API_KEY", "hush-hush")
    lines = (
        "the variable FLEET_BROKER is not read, the nearest that exists is FLEET_BROKER_URL",
        "the variable FLEET_INSTANCES__LOCL__API_KEY is for an instance 'locl', which is not in the configuration, "
        "the nearest that exists is local",
        "the instance 'idle' is not served: its fleet needs enabled = true and respond_to_requests = true",
    )
    with up() as process:
        for line in lines:
            hear(process, line)
        process.signal(signal.SIGHUP)
        for line in lines:
            hear(process, line, times=2)
        stop(process)
    assert "hush" not in process.output


def hear(process, line, times=1):
    process.wait_for(lambda _: process.output.splitlines().count(line) >= times, WITHIN)


def stop(process, number=signal.SIGTERM):
    process.signal(number)
    return process.wait(WITHIN)


def reload(process, *says):
    process.signal(signal.SIGHUP)
    process.wait_for("the configuration has been read again", WITHIN)
    for line in says:
        hear(process, line)


def fleet_worker(command):
    return subprocess.run([BIN / "fleet-worker", command], capture_output=True, text=True, timeout=WITHIN)


# --- Start and end


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_every_node_runs_until_a_signal_stops_them_all(configure, number, exit_code):
    configure(local=1, embed=1, idle=None)
    with up() as process:
        for name in ("local", "embed", "registry"):
            hear(process, f"{name}@mini lives")
        assert stop(process, number) == exit_code
        for name in ("local", "embed", "registry"):
            assert process.output.count(f"{name}@mini lives\n") == 1
            assert f"{name}@mini ends\n" in process.output
            assert f"{name}@mini ended with exit code 0\n" in process.output
        assert "idle@mini" not in process.output
        lines = process.output.splitlines()  # they are all told before the first has ended
        assert lines[-1] == "fleet-worker up ends: all of its nodes have ended"
        assert max(n for n, line in enumerate(lines) if "is told to end" in line) < min(
            n for n, line in enumerate(lines) if "ended with" in line
        )


def test_a_second_signal_kills_what_does_not_end(configure):
    configure(local=1)
    with up("ends = lambda: None; lives()") as process:
        hear(process, "local@mini lives")
        process.signal(signal.SIGTERM)
        process.wait_for("local@mini is told to end within 45 s", WITHIN)
        assert stop(process, signal.SIGINT) == 0
        assert "local@mini was killed by signal 9\n" in process.output


def test_nodes_lead_groups_of_their_own_and_inherit_nothing_but_what_binds_them(configure):
    configure(local=1, embed=1)
    program = """
inherited = {str(number) for number in range(3, 64) if os.path.exists(f"/dev/fd/{number}")}
binding = {os.environ["FLEET_PARENT_PIPE"], os.environ["FLEET_NODE_LOCK"]}
say(f"leads {os.getpgid(0) == os.getpid()}, inherits {inherited ^ binding} more")
lives()
"""
    with up(program) as process:
        hear(process, "local@mini leads True, inherits set() more")
        hear(process, "embed@mini leads True, inherits set() more")
        assert stop(process) == 0


def test_an_up_without_an_instance_is_wrongly_configured(configure):
    configure(idle=None)
    done = fleet_worker("up")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("fleet-worker: no instance has opted in: set fleet = ")


# --- Nodes that end by themselves


def test_a_node_that_keeps_failing_is_started_again_ever_later_and_disturbs_nobody(configure):
    configure(local=1, embed=1)
    with up("lives() if name[0] != 'l' else sys.exit(69)") as process:
        process.wait_for(lambda _: process.output.count("local@mini ended with exit code 69") >= 5, WITHIN)
        delays = re.findall(r"local@mini ended with exit code 69, starts again (.*)", process.output)[:5]
        assert delays[0] == "at once"
        assert all(re.fullmatch(r"in 0\.\d s", delay) for delay in delays[1:])
        assert process.output.count("embed@mini lives") == 1
        assert stop(process) == 0


def test_a_node_that_is_wrongly_configured_waits_for_a_reload(configure):
    configure(local=1, embed=1)
    with up("lives() if name[0] != 'l' else sys.exit(78)") as process:
        hear(process, "embed@mini lives")
        process.wait_for("local@mini ended with exit code 78: its configuration is wrong", WITHIN)
        process.signal(signal.SIGHUP)
        process.wait_for(lambda _: process.output.count("local@mini ended with exit code 78") == 2, WITHIN)
        assert process.output.count("local@mini starts") == 2
        assert process.output.count("embed@mini lives") == 1
        assert stop(process) == 0


def test_an_up_of_which_every_instance_is_wrongly_configured_ends(configure):
    """The registry node would have nothing to say."""
    configure(local=1, embed=1)
    with up("lives() if name[0] == 'r' else sys.exit(78)") as process:
        assert process.wait(WITHIN) == 78
        assert "no instance can be served" in process.output


def test_an_up_whose_last_good_instance_leaves_ends_too(configure):
    """It takes its time, so that the wrong one has ended again by then."""
    configure(local=1, embed=1)
    slow = "import time; at_last = ends; ends = lambda *_: (time.sleep(0.3), at_last())"
    with up(f"{slow}; lives() if name[0] != 'l' else sys.exit(78)") as process:
        hear(process, "embed@mini lives")
        configure(local=1)
        process.signal(signal.SIGHUP)
        assert process.wait(WITHIN) == 78


# --- Reload


def test_a_reload_changes_what_has_changed_and_nothing_else(configure):
    configure(same=1, changed=1, leaves=1, opts_out=1)
    with up() as process:
        for name in ("same", "changed", "leaves", "opts_out", "registry"):
            hear(process, f"{name}@mini lives")
        configure(same=1, changed=2, comes=1, opts_out=None)
        told = ("changed@mini reloads", "registry@mini reloads", "comes@mini lives")
        reload(process, *told, "leaves@mini ended with exit code 0", "opts_out@mini ended with exit code 0")
        assert process.output.count("same@mini ") == 2  # it starts, and lives
        for name in ("changed", "registry"):
            assert process.output.count(f"{name}@mini lives") == 1
        assert stop(process) == 0


def test_a_node_that_cannot_apply_a_change_begins_anew(configure):
    configure(local=1)
    with up("lives(lambda *_: sys.exit(75))") as process:
        hear(process, "local@mini lives")
        configure(local=2)
        reload(process, "local@mini ended with exit code 75, starts again at once")
        hear(process, "local@mini lives", times=2)
        assert stop(process) == 0


def test_a_wrong_configuration_changes_nothing(configure):
    configure(local=1)
    with up() as process:
        hear(process, "local@mini lives")
        hear(process, "registry@mini lives")
        for text, says in [("no TOML", "not valid TOML"), ("unknown = 1", "unknown"), ("host = ''", "host")]:
            configure(text, local=2)
            process.signal(signal.SIGHUP)
            process.wait_for(lambda line, says=says: "stays as it was" in line and says in line, WITHIN)
        assert stop(process) == 0
        assert "reload" not in process.output
        assert process.output.count("ended with") == 2  # when it was stopped


def test_a_host_that_opts_out_serves_no_longer(configure):
    configure(local=1)
    with up() as process:
        hear(process, "local@mini lives")
        configure(local=None)
        process.signal(signal.SIGHUP)
        assert process.wait(WITHIN) == 78
        assert "no instance has opted in: set fleet = " in process.output
        assert "local@mini ended with exit code 0\n" in process.output


@pytest.mark.parametrize(
    ("text", "host"),
    [('host = "other"', "other"), ('host = "mini"\nbroker_url = "redis://127.0.0.1:1/0"', "mini")],
    ids=["host", "broker"],
)
def test_another_host_name_or_broker_begins_everything_anew(configure, tmp_path, text, host):
    configure(local=1)
    with up() as process:
        hear(process, "local@mini lives")
        hear(process, "registry@mini lives")
        configure(text, local=1)
        done = fleet_worker("reload")  # which finds it by either name
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "The configuration was read again: local starts anew, registry starts anew\n"
        for name in ("local", "registry"):
            hear(process, f"{name}@mini ended with exit code 0, starts again at once")
            hear(process, f"{name}@{host} lives", times=1 + (host == "mini"))
        assert holder(tmp_path / "state" / f"up-{host}.lock") == process.pid
        assert stop(process) == 0


def test_reload_says_that_the_availability_has_changed(configure):
    configure(local=1)
    with up() as process:
        hear(process, "local@mini lives")
        configure('host = "mini"\navailability = { grace = 4.0 }', local=1)
        assert fleet_worker("reload").stdout == "The configuration was read again: availability has changed\n"
        assert stop(process) == 0


# --- One up a host


def test_a_second_up_is_refused_and_told_who_runs(configure):
    configure(local=1)
    with up() as process:
        hear(process, "local@mini lives")
        done = fleet_worker("up")
        assert (done.returncode, done.stdout) == (75, "")
        assert f"up runs already on this host, pid {process.pid}: fleet-worker reload makes it" in done.stderr
        assert stop(process) == 0
        assert process.output.count("starts") == 2


def test_a_host_name_that_another_up_has_is_refused(configure):
    configure(local=1)
    with up() as process:
        hear(process, "local@mini lives")
        configure('host = "other"', local=1)
        with up() as other:
            hear(other, "local@other lives")
            process.signal(signal.SIGHUP)
            process.wait_for(f"the configuration stays as it was: up-other.lock is held by process {other.pid}", WITHIN)
            assert stop(other) == 0
        assert stop(process) == 0


def test_a_reload_needs_somebody_to_reload(configure):
    configure(local=1)
    done = fleet_worker("reload")
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == "fleet-worker: no fleet-worker up runs on this host\n"
