"""`fleet-worker service` as an operator runs it, in a home of its own, with managers that only take notes."""

import os
import plistlib
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_worker.host.launchd import LABEL
from fleet_worker.host.systemd import UNIT
from fleet_worker.testing import worker_toml

SECRET = "hush-hush-4711"
DOMAIN = f"gui/{os.getuid()}"
AGENT = f"{DOMAIN}/{LABEL}"

# Only what the shell itself can do: the PATH of these tests leads nowhere else.
RECORD = """#!/bin/sh
line=${0##*/}
for word; do line="$line|$word"; done
echo "$line" >> "$STATE/calls"
[ -e "$STATE/broken" ] && [ "$*" != "$ALLOWED" ] && { echo "it is" >&2; echo "broken" >&2; exit 1; }
"""

# An agent that ends is still there for one more question, and the next one is refused once: so does launchd.
LAUNCHCTL = (
    RECORD
    + """
case "$1 $2" in
"print gui/"*/*)
    if [ -e "$STATE/leaving" ]; then /bin/rm "$STATE/leaving"; exit 0; fi
    [ -e "$STATE/loaded" ] || { echo "Could not find service" >&2; exit 113; }
    printf '%s = {\\n\\tstate = %s\\n\\tpid = 4711\\n' "$2" "$RUNS"
    printf '\\tenvironment = {\\n\\t\\tKEY => hush-hush-4711\\n\\t}\\n'
    printf '\\tlast exit code = 69: EX_UNAVAILABLE\\n\\tendpoints = {\\n\\t\\tstate = 1\\n\\t}\\n}\\n' ;;
"bootstrap "*)
    [ -e "$STATE/loaded" ] && exit 5
    if [ -e "$STATE/busy" ]; then /bin/rm "$STATE/busy"; exit 5; fi
    : > "$STATE/loaded" ;;
"bootout "*) /bin/rm "$STATE/loaded"; : > "$STATE/leaving"; : > "$STATE/busy"; exit 36 ;;
esac
"""
)

SYSTEMCTL = (
    RECORD
    + """
case "$*" in
*restart*) : > "$STATE/loaded" ;;
*disable*) /bin/rm "$STATE/loaded" ;;
*status*) [ -e "$STATE/loaded" ] || { echo "Unit could not be found." >&2; exit 4; }; echo "Active: active (running)" ;;
esac
"""
)


class Host:
    """A home, a PATH and a configuration file; `calls` says what its manager was asked."""

    def __init__(self, folder):
        self.home = folder / "hôme of 100% Jürgen"
        self.bin = folder / "bin"
        self.state = folder / "state"
        for each in (self.home, self.bin, self.state):
            each.mkdir()
        self.config = folder / "wörker 1.toml"
        self.config.write_text(worker_toml("local", {}), "utf-8")
        self.agent = self.home / "Library/LaunchAgents" / f"{LABEL}.plist"
        self.unit = self.home / ".config/systemd/user" / UNIT
        self.variables = {
            "HOME": str(self.home),
            "PATH": str(self.bin),
            "STATE": str(self.state),
            "RUNS": "running",
            "FLEET_CONFIG": str(self.config),
        }

    def has(self, command, script):
        file = self.bin / command
        file.write_text(script)
        file.chmod(0o755)
        return self

    def run(self, line, *, umask=0o002, cwd=None, **variables):
        environ = {name: value for name, value in os.environ.items() if name != "XDG_CONFIG_HOME"}
        done = subprocess.run(
            [sys.executable, "-m", "fleet_worker", "service", *shlex.split(line)],
            env={**environ, **self.variables, **variables},
            cwd=cwd,
            umask=umask,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def calls(self):
        """Since the last time."""
        file = self.state / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.split("|") for line in lines]

    def files(self):
        return sorted(path for path in self.home.rglob("*") if path.is_file())


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.fixture
def mac(host):
    return host.has("launchctl", LAUNCHCTL)


@pytest.fixture
def linux(host):
    return host.has("systemctl", SYSTEMCTL)


@pytest.fixture(params=["launchctl", "systemctl"])
def managed(request, host):
    return host.has(request.param, {"launchctl": LAUNCHCTL, "systemctl": SYSTEMCTL}[request.param])


# --- launchd --------------------------------------------------------------------------------------------------------


def test_on_a_mac_an_agent_is_installed_once_more_and_removed(mac):
    done = mac.run("install")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(mac.agent) in done.stdout
    assert "automatic login" in done.stdout
    load = [["launchctl", "enable", AGENT], ["launchctl", "bootstrap", DOMAIN, str(mac.agent)]]
    assert mac.calls() == [["launchctl", "print", DOMAIN], ["launchctl", "print", AGENT], *load]
    agent = plistlib.loads(mac.agent.read_bytes())
    assert agent["ProgramArguments"] == [sys.executable, "-m", "fleet_worker", "up"]
    assert agent["EnvironmentVariables"] == {"FLEET_CONFIG": str(mac.config)}
    assert Path(agent["StandardOutPath"]).parent == mac.home / "Library/Logs/fleet-worker"
    assert Path(agent["StandardOutPath"]).parent.is_dir()

    assert mac.run("install").returncode == 0
    calls = mac.calls()
    ended = calls.index(["launchctl", "bootout", AGENT])
    assert calls[ended + 1 : ended + 3] == [["launchctl", "print", AGENT]] * 2  # there, then gone
    assert calls[ended + 3 :] == [*load, load[-1]]  # refused, then taken

    assert mac.run("uninstall").returncode == 0
    assert ["launchctl", "bootout", AGENT] in mac.calls()
    assert not mac.agent.exists()
    done = mac.run("uninstall")
    assert (done.returncode, done.stdout) == (0, "The service is not installed.\n")


@pytest.mark.rest
def test_on_a_mac_an_agent_without_its_file_is_ended_too(mac):
    mac.run("install")
    mac.agent.unlink()
    assert "Stopped" in mac.run("uninstall").stdout
    assert mac.run("status").stdout == f"{LABEL} is not installed\n"


@pytest.mark.rest
def test_on_a_mac_the_status_is_launchd_s_without_its_environment(mac):
    done = mac.run("status")
    assert (done.returncode, done.stdout) == (3, f"{LABEL} is not installed\n")
    mac.run("install")
    done = mac.run("status")
    assert (done.returncode, done.stdout) == (
        0,
        f"{LABEL} is running, pid 4711, last exit code 69: EX_UNAVAILABLE\n",
    )
    done = mac.run("status", RUNS="spawn scheduled")
    assert (done.returncode, done.stdout.partition(",")[0]) == (3, f"{LABEL} is spawn scheduled")


# --- systemd --------------------------------------------------------------------------------------------------------


def test_on_linux_a_unit_is_installed_once_more_and_removed(linux):
    reachable, reload = ["systemctl", "--user", "show-environment"], ["systemctl", "--user", "daemon-reload"]
    for _ in range(2):
        done = linux.run("install")
        assert (done.returncode, done.stderr) == (0, "")
        assert str(linux.unit) in done.stdout
        assert "loginctl enable-linger" in done.stdout
        start = [["systemctl", "--user", "enable", UNIT], ["systemctl", "--user", "restart", UNIT]]
        assert linux.calls() == [reachable, reload, *start]
    text = linux.unit.read_text("utf-8")
    assert f'Environment="FLEET_CONFIG={linux.config}"\n' in text
    assert f'ExecStart=:"{sys.executable}" -m fleet_worker up\n' in text

    assert linux.run("uninstall").returncode == 0
    assert linux.calls() == [reachable, ["systemctl", "--user", "disable", "--now", UNIT], reload]
    assert not linux.unit.exists()
    done = linux.run("uninstall")
    assert (done.returncode, done.stdout) == (0, "The service is not installed.\n")
    assert linux.calls() == [reachable]


@pytest.mark.rest
def test_on_linux_the_status_is_systemd_s(linux):
    done = linux.run("status")
    assert (done.returncode, done.stdout) == (3, "Unit could not be found.\n")
    linux.run("install")
    done = linux.run("status")
    assert (done.returncode, done.stdout) == (0, "Active: active (running)\n")


@pytest.mark.parametrize(
    ("given", "used"), [("{}/elsewhere", "elsewhere"), pytest.param("relative", ".config", marks=pytest.mark.rest)]
)
def test_on_linux_the_unit_is_where_systemd_looks(given, used, linux):
    linux.run("install", XDG_CONFIG_HOME=given.format(linux.home))
    assert linux.files() == [linux.home / used / "systemd/user" / UNIT]


@pytest.mark.rest
def test_without_a_bus_nothing_is_done(linux):
    (linux.state / "broken").touch()
    done = linux.run("install")
    assert (done.returncode, linux.files()) == (69, [])
    assert done.stdout.startswith("[Unit]\n")
    for word in ("nothing was installed", "it is broken", "not by su or sudo", str(linux.unit)):
        assert word in done.stderr
    assert linux.run("status").returncode == 69
    assert linux.run("uninstall").stdout == "The service is not installed.\n"


@pytest.mark.rest
def test_a_service_that_cannot_be_ended_is_not_called_removed(linux):
    linux.run("install")
    (linux.state / "broken").touch()
    done = linux.run("uninstall")
    assert (done.returncode, done.stdout) == (69, "")
    assert f"{linux.unit} is still there" in done.stderr
    assert linux.unit.exists()


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [pytest.param(None, marks=pytest.mark.rest), 0o666])
def test_only_the_owner_may_write_the_file(before, mac):
    """launchd loads no other, and this shell's umask would let the group."""
    if before:
        mac.agent.parent.mkdir(parents=True)
        mac.agent.touch()
        mac.agent.chmod(before)
    mac.run("install")
    assert stat.S_IMODE(mac.agent.stat().st_mode) == 0o644


def test_variables_of_the_shell_stay_there_and_are_named(managed):
    secrets = {"FLEET_BROKER_URL": f"redis://:{SECRET}@broker:6379/0", "fleet_instances__local__api_key": SECRET}
    done = managed.run("install", **secrets)
    assert done.returncode == 0
    for word in (*secrets, str(managed.config), "chmod 600"):
        assert word in done.stderr
    (file,) = managed.files()
    assert SECRET not in file.read_text("utf-8")
    assert file.read_text("utf-8").upper().count("FLEET_") == 2  # -m fleet_worker, FLEET_CONFIG


def test_a_relative_configuration_is_found_from_anywhere(linux):
    linux.run("install", FLEET_CONFIG=linux.config.name, cwd=linux.config.parent)
    assert f'"FLEET_CONFIG={linux.config}"' in linux.unit.read_text("utf-8")


WRONG = {
    "is not set": ({"FLEET_CONFIG": ""}, "FLEET_CONFIG is not set"),
    "is not there": ({"FLEET_CONFIG": "/nowhere/worker.toml"}, "/nowhere/worker.toml"),
    "is right only with a variable": ({"FLEET_WORKER__MAX_PENDING": "5"}, "worker.max_pending"),
}


@pytest.mark.parametrize(("variables", "word"), WRONG.values(), ids=WRONG)
def test_a_wrong_configuration_is_refused_before_anything_is_written(variables, word, linux):
    linux.config.write_text(f"[worker]\nmax_pending = '{SECRET}'\n")
    done = linux.run("install", **variables)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (78, "", 1)
    assert word in done.stderr
    assert (linux.files(), linux.calls()) == ([], [])


def test_print_only_prints_what_would_be_written(managed):
    printed = managed.run("install --print")
    assert (printed.returncode, managed.files(), managed.calls()) == (0, [], [])
    managed.run("install")
    (file,) = managed.files()
    assert file.read_text("utf-8") == printed.stdout
    assert str(file) in printed.stderr


def test_a_manager_that_refuses_is_quoted_in_one_line(managed):
    (managed.state / "broken").touch()
    reachable = "--user show-environment" if (managed.bin / "systemctl").exists() else f"print {DOMAIN}"
    done = managed.run("install", ALLOWED=reachable)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "failed: it is broken" in done.stderr


def test_a_place_that_cannot_be_written_is_named(linux):
    (linux.home / ".config").touch()
    done = linux.run("install")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "cannot be written" in done.stderr


def test_without_a_manager_the_file_is_printed_and_nothing_installed(host):
    done = host.run("install")
    assert (done.returncode, host.files()) == (69, [])
    assert "fleet_worker" in done.stdout
    assert "nothing was installed" in done.stderr
    assert "on the PATH" in done.stderr
    assert host.run("status").returncode == 69
    assert host.run("uninstall").returncode == 0


def test_on_a_mac_that_nobody_is_logged_in_to_nothing_is_installed(mac):
    (mac.state / "broken").touch()
    done = mac.run("install")
    assert (done.returncode, mac.files()) == (69, [])
    assert "logged in at the screen" in done.stderr


def test_help_shows_what_can_be_done():
    done = subprocess.run([sys.executable, "-m", "fleet_worker", "service", "-h"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("install", "uninstall", "status", "launchd", "systemd"):
        assert word in done.stdout
