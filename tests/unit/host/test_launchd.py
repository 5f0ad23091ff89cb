"""The property list of the agent, read back by plistlib."""

import plistlib
from pathlib import Path

import pytest

from fleet_worker.host.launchd import Launchd
from tests.unit.host.service_paths import CONFIG, FOLDERS, HOME, OP, PYTHON, QUOTES, launchd_plist

LOG = HOME / "Library/Logs/fleet-worker/up.log"


def test_the_agent_is_complete():
    assert plistlib.loads(launchd_plist()) == {
        "Label": "org.fleet-worker.up",
        "ProgramArguments": [PYTHON, "-m", "fleet_worker", "up"],
        "EnvironmentVariables": {"FLEET_CONFIG": str(CONFIG)},
        "RunAtLoad": True,
        "KeepAlive": True,
        "ThrottleInterval": 10,
        "ExitTimeOut": 60,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 8192},
        "HardResourceLimits": {"NumberOfFiles": 8192},
        "StandardOutPath": str(LOG),
        "StandardErrorPath": str(LOG),
    }


@pytest.mark.parametrize("name", [*FOLDERS, *QUOTES])
def test_launchd_is_given_every_path_as_it_is(name):
    config, interpreter, home = Path("/", name, "worker.toml"), f"/{name}/python", Path("/", name)
    agent = plistlib.loads(launchd_plist(config, home=home, interpreter=interpreter))
    assert agent["EnvironmentVariables"] == {"FLEET_CONFIG": str(config)}
    assert agent["ProgramArguments"][0] == interpreter
    assert agent["StandardOutPath"] == f"/{name}/Library/Logs/fleet-worker/up.log"


def test_a_daemon_of_the_system_runs_under_an_account_with_its_home():
    agent, daemon = plistlib.loads(launchd_plist()), plistlib.loads(launchd_plist(of_system=OP))
    assert daemon == agent | {
        "UserName": "op",
        "EnvironmentVariables": {"FLEET_CONFIG": str(CONFIG), "HOME": str(HOME)},
    }
    assert Launchd(60.0, OP).file == Path("/Library/LaunchDaemons/org.fleet-worker.up.plist")
