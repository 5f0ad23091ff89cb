"""`fleet-worker service` for the whole system, with managers that only take notes."""

import os
import plistlib
import shlex
import stat
import sys
from pathlib import Path

import pytest

from fleet_worker.host import account as accounts
from fleet_worker.host import launchd, service, systemd
from fleet_worker.host.account import Account
from fleet_worker.host.launchd import LABEL
from fleet_worker.host.systemd import UNIT
from tests.commands import fleet_worker
from tests.integration.test_service import LAUNCHCTL, SYSTEMCTL, Host

AGENT = f"system/{LABEL}"
OF_SYSTEM = LAUNCHCTL.replace('gui/"*/*', 'system/"*')


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host whose root runs commands by sudo for the person who owns its home; `host.as_person()` changes that."""
    host = Host(tmp_path)
    person = Account("op", os.getuid(), os.getgid(), host.home)
    for module in (accounts, service):
        monkeypatch.setattr(module, "account", lambda name=None: Account(name, 0, 0, Path("/")) if name else person)
    for name, value in host.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))  # as sudo may have it
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    host.as_person = lambda: monkeypatch.setattr(os, "geteuid", lambda: 501)
    for module, name in ((launchd, "DAEMONS"), (systemd, "SYSTEM_UNITS")):
        monkeypatch.setattr(module, name, tmp_path / name)
    host.daemon, host.system_unit = tmp_path / "DAEMONS" / f"{LABEL}.plist", tmp_path / "SYSTEM_UNITS" / UNIT
    return host


@pytest.fixture
def mac(host):
    return host.has("launchctl", OF_SYSTEM)


@pytest.fixture
def linux(host):
    return host.has("systemctl", SYSTEMCTL)


@pytest.fixture(params=["launchctl", "systemctl"])
def managed(request, host):
    host.file = host.daemon if request.param == "launchctl" else host.system_unit
    return host.has(request.param, {"launchctl": OF_SYSTEM, "systemctl": SYSTEMCTL}[request.param])


def test_on_a_mac_a_daemon_is_installed_told_and_removed(mac):
    done = fleet_worker("service install --system")
    assert (done.returncode, done.stderr) == (0, "")
    assert "also if nobody logs in" in done.stdout
    daemon = plistlib.loads(mac.daemon.read_bytes())
    assert daemon["UserName"] == "op"
    assert daemon["EnvironmentVariables"] == {"FLEET_CONFIG": str(mac.config), "HOME": str(mac.home)}
    assert Path(daemon["StandardOutPath"]).parent == mac.home / "Library/Logs/fleet-worker"
    assert Path(daemon["StandardOutPath"]).parent.is_dir()
    assert stat.S_IMODE(mac.daemon.stat().st_mode) == 0o644
    assert mac.calls() == [
        ["launchctl", "print", AGENT],
        ["launchctl", "enable", AGENT],
        ["launchctl", "bootstrap", "system", str(mac.daemon)],
    ]
    mac.as_person()
    assert fleet_worker("service status").stdout.startswith(f"{LABEL} is running")
    done = fleet_worker("service uninstall")
    assert (done.returncode, mac.daemon.exists()) == (69, True)
    assert "a service of the system needs root: sudo " in done.stderr


def test_root_removes_a_daemon(mac):
    fleet_worker("service install --system")
    mac.calls()
    assert fleet_worker("service uninstall").stdout == f"Stopped and removed: {mac.daemon}\n"
    assert ["launchctl", "bootout", AGENT] in mac.calls()
    assert not mac.daemon.exists()


def test_on_linux_a_unit_of_the_system_is_installed_told_and_removed(linux):
    done = fleet_worker("service install --system")
    assert (done.returncode, done.stderr) == (0, "")
    text = linux.system_unit.read_text("utf-8")
    for line in ("User=op", f'Environment="FLEET_CONFIG={linux.config}"', "WantedBy=multi-user.target"):
        assert f"{line}\n" in text
    reload = ["systemctl", "daemon-reload"]
    assert linux.calls() == [
        ["systemctl", "show-environment"],
        reload,
        ["systemctl", "enable", UNIT],
        ["systemctl", "restart", UNIT],
    ]
    assert fleet_worker("service status").stdout == "Active: active (running)\n"
    assert fleet_worker("service uninstall").stdout == f"Stopped and removed: {linux.system_unit}\n"
    assert linux.calls()[-2:] == [["systemctl", "disable", "--now", UNIT], reload]


def test_without_root_the_command_with_sudo_is_told(managed):
    managed.as_person()
    done = fleet_worker("service install --system")
    assert (done.returncode, managed.file.exists()) == (69, False)
    again = [sys.executable, "-m", "fleet_worker", "service", "install", "--system", "--config", str(managed.config)]
    assert f"nothing was installed: a service of the system needs root: sudo {shlex.join(again)}\n" in done.stderr
    assert "fleet_worker" in done.stdout


def test_print_needs_no_root(managed):
    managed.as_person()
    printed = fleet_worker("service install --system --print")
    assert (printed.returncode, managed.calls()) == (0, [])
    assert f"this text belongs in {managed.file}" in printed.stderr
    assert "op" in printed.stdout


def test_by_sudo_the_file_in_the_home_of_the_person_counts(managed, monkeypatch):
    """Not the one of root, whose HOME this is."""
    monkeypatch.delenv("FLEET_CONFIG")
    file = managed.home / "fleet" / "worker.toml"
    file.parent.mkdir()
    managed.config.rename(file)
    assert fleet_worker("service install --system").returncode == 0
    assert str(file) in managed.file.read_text("utf-8").replace("%%", "%")


def test_a_file_that_an_option_names_is_found_from_anywhere(managed, monkeypatch):
    monkeypatch.delenv("FLEET_CONFIG")
    monkeypatch.chdir(managed.config.parent)
    assert fleet_worker(f"service install --system --config '{managed.config.name}'").returncode == 0
    assert str(managed.config) in managed.file.read_text("utf-8")


@pytest.mark.parametrize("first", ["", " --system"])
def test_one_service_is_not_installed_beside_another(first, linux, monkeypatch):
    monkeypatch.setenv("HOME", str(linux.home))
    assert fleet_worker(f"service install{first}").returncode == 0
    done = fleet_worker(f"service install{'' if first else ' --system'}")
    kind = "the system" if first else "this user"
    assert done.returncode == 69
    assert f"it is installed as a service of {kind} already" in done.stderr


def test_a_user_is_only_for_a_service_of_the_system(linux):
    done = fleet_worker("service install --user op")
    assert (done.returncode, linux.system_unit.exists()) == (2, False)
    assert "--user is for a service of the system: add --system" in done.stderr
