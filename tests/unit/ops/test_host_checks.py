"""What macOS and systemd print, and what is read from it. The texts are those that the commands are documented with."""

import resource
import sys

import pytest

from fleet_worker.ops import host_checks
from fleet_worker.ops.findings import Finding
from fleet_worker.ops.host_checks import (
    boot,
    end_of,
    file_vault,
    idle_sleep,
    linger,
    local_network,
    login,
    open_files,
    power_cuts,
    printed,
    sleep,
    sleep_minutes,
    updates,
)
from fleet_worker.settings import Settings

PMSET = """System-wide power settings:
Currently in use:
 standby              0
 Sleep On Power Button 1
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                0 (sleep prevented by powerd)
 autorestart          {}
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 womp                 1
"""
AWAKE = PMSET.format(1).replace("0 (sleep prevented by powerd)", "{}")
POWER = "Restart After Power Failure: {}\n"
DENIED = "You need administrator access to run this tool... exiting!\n"
UPDATES = """{{
    AutomaticCheckEnabled = 1;
    AutomaticDownload = 1;
    AutomaticallyInstallMacOSUpdates = {};
    CriticalUpdateInstall = 1;
    LastSuccessfulDate = "2026-11-20 08:12:01 +0000";
    RecommendedUpdates =     (
    );
}}
"""
LOGIN = """{
    GuestEnabled = 0;
    autoLoginUser = op;
    lastUser = loggedIn;
}
"""
MANAGER = """EnableWallMessages=no
NAutoVTs=6
KillUserProcesses=no
IdleHint=no
IdleAction={}
IdleActionUSec=30min
HandleLidSwitch=suspend
"""

WARNINGS = {
    "FileVault": (file_vault("FileVault is On.\n"), "waits for a password", "fdesetup"),
    "FileVault soon": (file_vault("FileVault is On, but needs to be restarted to finish.\n"), "FileVault", "fdesetup"),
    "FileVault at work": (
        file_vault("FileVault is On.\nEncryption in progress: Percent completed = 12\n"),
        "FileVault",
        "fdesetup",
    ),
    "a power cut": (power_cuts(PMSET.format(0), ""), "stays off after a power cut", "sudo pmset -a autorestart 1"),
    "a power cut, by root": (power_cuts("", POWER.format("Off")), "stays off", "sudo pmset -a autorestart 1"),
    "an update": (updates(UPDATES.format(1)), "restarts by itself", "AutomaticallyInstallMacOSUpdates -bool false"),
    "nobody logged in": (login(LOGIN.replace("    autoLoginUser = op;\n", "")), "somebody logs in", "--system"),
    "the local network": (
        local_network("local@m is ready, 4 slots\nthe broker at b:1 is on a host to which there is no route: check\n"),
        "no route",
        "Local Network: allow Python",
    ),
    "no linger": (linger("Linger=no\n"), "ends when you log out", "loginctl enable-linger"),
    "suspend": (idle_sleep(MANAGER.format("suspend"), "static\n"), "IdleAction=suspend", "systemctl mask sleep.target"),
    "another kind of it": (
        idle_sleep(MANAGER.format("suspend-then-hibernate"), ""),
        "goes to sleep",
        "systemctl mask sleep.target",
    ),
}


@pytest.mark.parametrize(("found", "said", "advice"), WARNINGS.values(), ids=WARNINGS)
def test_what_keeps_a_host_from_serving_is_told_with_its_remedy(found, said, advice):
    (finding,) = found
    assert finding.severity == "warning"
    assert said in finding.found
    assert advice in finding.advice


GOOD = {
    "FileVault": file_vault("FileVault is Off.\n"),
    "a power cut": power_cuts(PMSET.format(1), POWER.format("Off")),
    "a power cut, by root": power_cuts("", POWER.format("On")),
    "an update": updates(UPDATES.format(0)),
    "somebody logged in": login(LOGIN),
    "linger": linger("Linger=yes\n"),
    "masked": idle_sleep(MANAGER.format("suspend"), "masked\n"),
}


@pytest.mark.parametrize("found", GOOD.values(), ids=GOOD)
def test_what_is_well_is_told(found):
    assert [finding.severity for finding in found] == ["ok"]


UNKNOWN = {
    "FileVault": file_vault(""),
    "FileVault of another kind": file_vault("fdesetup: not supported\n"),
    "a power cut": power_cuts("", ""),
    "a power cut that only root may know": power_cuts("Currently in use:\n sleep 0\n", DENIED),
    "a power cut that cannot be chosen": power_cuts("", POWER.format("Not supported on this machine.")),
    "updates that were never set": updates("{\n    AutomaticCheckEnabled = 1;\n}\n"),
    "updates": updates(""),
    "a login": login(""),
    "a log": local_network(""),
    "a fault that is over": local_network("there is no route\nlocal@mini is ready, 4 slots\n"),
    "linger": linger("Failed to get user: User ID 501 is not logged in or lingering\n"),
    "no idle action": idle_sleep(MANAGER.format("ignore"), "static\n"),
    "a lock": idle_sleep(MANAGER.format("lock"), ""),
    "no logind": idle_sleep("", ""),
}


@pytest.mark.parametrize("found", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_is_no_finding(found):
    assert list(found) == []


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Nothing else is on the PATH."""

    def add(name, script):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return add


def test_a_command_that_is_missing_denied_or_slow_says_nothing(commands, monkeypatch):
    assert printed("fdesetup", "status") == ""
    commands("fdesetup", "echo FileVault is On.; exit 1")
    assert printed("fdesetup", "status") == ""
    monkeypatch.setattr(host_checks, "WITHIN", 0.05)
    commands("fdesetup", "exec /bin/sleep 5")
    assert printed("fdesetup", "status") == ""


def test_a_host_of_which_nothing_is_known_is_well(commands):
    assert [finding.severity for finding in boot(None)] == ["ok"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, False),
        ({"up": {"gateway": True}}, True),
        ({"instances": {"local": {"fleet": {"enabled": True, "respond_to_requests": True}}}}, True),
    ],
)
def test_a_host_that_serves_is_told_that_it_has_no_service(settings, told, commands, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    said = "no service is installed: after a reboot, something else must start fleet-worker up"
    expected = Finding("ok", said, "fleet-worker service install")
    assert (boot(Settings(**settings)) == [expected]) is told
    unit = tmp_path / ".config/systemd/user/fleet-worker.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert expected not in boot(Settings(**settings))


def test_all_of_a_mac_is_told(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    commands("fdesetup", "echo 'FileVault is On.'")
    commands("pmset", "echo ' autorestart 0'")
    commands("defaults", '[ "$2" = /Library/Preferences/com.apple.loginwindow ] && echo "{ GuestEnabled = 0; }"')
    assert [finding.found.split()[0] for finding in boot(None)] == ["FileVault", "it"]
    log = tmp_path / "Library/Logs/fleet-worker/up.log"
    agent = tmp_path / "Library/LaunchAgents/org.fleet-worker.up.plist"
    for file in (log, agent):
        file.parent.mkdir(parents=True)
        file.write_text("No route to host")
    assert len(boot(None)) == 4


def test_all_of_a_linux_machine_is_told(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    commands("loginctl", '[ "$2" ] && echo Linger=no || echo IdleAction=suspend')
    commands("systemctl", "echo static; exit 1")
    assert ["IdleAction" in finding.found for finding in boot(None)] == [True]
    unit = tmp_path / ".config/systemd/user/fleet-worker.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    assert len(boot(None)) == 2
    commands("systemctl", "echo masked; exit 1")
    assert [finding.severity for finding in boot(None)] == ["warning", "ok"]


def test_only_the_end_of_a_log_is_read(tmp_path):
    log = tmp_path / "up.log"
    assert end_of(log) == ""
    log.write_bytes(b"x" * 100_000 + b"\xffend")
    assert (len(end_of(log)), end_of(log)[-3:]) == (64 * 1024, "end")


@pytest.mark.parametrize(
    ("said", "minutes"),
    [
        (AWAKE.format("0"), 0),
        (AWAKE.format("1"), 1),
        (AWAKE.format("0 (sleep prevented by powerd, coreaudiod)"), 0),
        (AWAKE.format("10 (sleep prevented by caffeinate)"), 10),
        ("System-wide power settings:\n SleepDisabled\t\t1\nCurrently in use:\n sleep 1\n", 0),
        ("System-wide power settings:\n SleepDisabled\t\t0\nCurrently in use:\n sleep 1\n", 1),
        ("Battery Power:\n sleep 1\nAC Power:\n sleep 0\n", 1),
        (" disksleep 10\n displaysleep 10\n", None),
        ("pmset: cannot\n", None),
        ("", None),
    ],
)
def test_whether_a_mac_sleeps_is_read_from_pmset(said, minutes):
    assert sleep_minutes(said) == minutes


@pytest.mark.parametrize(
    ("limit", "severity"), {256: "warning", 1023: "warning", 1024: "ok", resource.RLIM_INFINITY: "ok"}.items()
)
def test_a_node_needs_open_files(limit, severity, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    (finding,) = open_files(None)
    assert finding.severity == severity
    assert ("ulimit" in finding.advice) is (severity == "warning")


@pytest.mark.parametrize(("availability", "severity"), [({}, "warning"), ({"idle_user": 300}, "ok")])
def test_a_mac_of_an_owner_may_sleep_while_it_does_not_work(availability, severity, tmp_path, monkeypatch):
    pmset = tmp_path / "pmset"
    pmset.write_text("#!/bin/sh\necho ' sleep 10'\n")
    pmset.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (finding,) = sleep(Settings(availability=availability))
    assert (finding.severity, "after 10 min" in finding.found) == (severity, True)
