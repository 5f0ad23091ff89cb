"""The property list of the agent, read back by plistlib."""

import plistlib
from pathlib import Path

import pytest

from fleet_worker.host.launchd import launchd_plist
from tests.unit.host.service_paths import CONFIG, FOLDERS, LOG, PYTHON, QUOTES


def test_the_agent_is_complete():
    assert plistlib.loads(launchd_plist(CONFIG, log=LOG, interpreter=PYTHON)) == {
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
    config, interpreter, log = Path("/", name, "worker.toml"), f"/{name}/python", Path("/", name, "up.log")
    agent = plistlib.loads(launchd_plist(config, log=log, interpreter=interpreter))
    assert agent["EnvironmentVariables"] == {"FLEET_CONFIG": str(config)}
    assert agent["ProgramArguments"][0] == interpreter
    assert agent["StandardOutPath"] == str(log)
