"""The text of the unit, read back by other means than those that wrote it, and by systemd itself."""

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.account import Account
from fleet_worker.host.systemd import UNIT
from tests.unit.host.service_paths import CONFIG, FOLDERS, OP, PYTHON, QUOTES, systemd_unit


def unit(config=CONFIG, **values):
    """Sections by name, each a dictionary."""
    reader = configparser.ConfigParser(interpolation=None, delimiters="=", strict=True)
    reader.optionxform = str
    reader.read_string(systemd_unit(config, **values))
    return {name: dict(reader[name]) for name in reader.sections()}


def words(value):
    """Double quotes and backslashes are the shell's; %% is systemd's."""
    assert "%" not in value.replace("%%", "")  # it would begin a specifier
    return [word.replace("%%", "%") for word in shlex.split(value)]


def test_the_unit_is_complete():
    sections = unit()
    assert "fleet-worker" in sections.pop("Unit")["Description"]
    assert sections == {
        "Service": {
            "Type": "exec",
            "Environment": f'"FLEET_CONFIG={CONFIG}"',
            "ExecStart": f':"{PYTHON}" -m fleet_worker up',
            "Restart": "always",
            "RestartSec": "5",
            "RestartPreventExitStatus": "78",
            "KillMode": "mixed",
            "TimeoutStopSec": "60",
            "LimitNOFILE": "8192",
        },
        "Install": {"WantedBy": "default.target"},
    }


def test_a_unit_of_the_system_runs_under_an_account_when_the_network_is_there():
    of_user, of_system = unit(), unit(of_system=OP)
    network = {"Wants": "network-online.target", "After": "network-online.target"}
    assert of_system == {
        "Unit": of_user["Unit"] | network,
        "Service": of_user["Service"] | {"User": "op"},
        "Install": {"WantedBy": "multi-user.target"},
    }


def test_systemd_itself_finds_nothing_to_complain_about_in_a_unit_of_the_system(tmp_path):
    root = Account("root", 0, 0, Path("/root"))
    assert verified(systemd_unit(interpreter="/bin/sh", of_system=root), tmp_path, manager="--system") == (0, "")


@pytest.mark.parametrize("name", [*FOLDERS, *QUOTES])
def test_systemd_reads_the_configuration_s_path_as_it_is(name):
    config = Path("/", name, "worker.toml")
    assert words(unit(config)["Service"]["Environment"]) == [f"FLEET_CONFIG={config}"]


@pytest.mark.parametrize("name", FOLDERS)
def test_systemd_reads_the_interpreter_s_path_as_it_is(name):
    command = unit(interpreter=f"/{name}/python")["Service"]["ExecStart"]
    assert command.startswith(":")  # else $HOME is another word
    assert words(command[1:]) == [f"/{name}/python", "-m", "fleet_worker", "up"]


@pytest.mark.parametrize("name", QUOTES)
def test_an_interpreter_that_systemd_would_not_start_is_refused(name):
    with pytest.raises(ConfigurationError, match="quotes or backslashes"):
        systemd_unit(interpreter=f"/{name}/python")


@pytest.mark.parametrize("name", FOLDERS)
def test_systemd_itself_finds_nothing_to_complain_about(name, tmp_path, monkeypatch):
    """It looks for the program, so it must have read that path as it was meant."""
    interpreter = tmp_path / name / "python"
    interpreter.parent.mkdir()
    interpreter.write_text("#!/bin/sh\n")
    interpreter.chmod(0o755)
    text = systemd_unit(interpreter=interpreter)
    assert verified(text, tmp_path) == (0, "")
    interpreter.unlink()
    assert verified(text, tmp_path) != (0, "")


@pytest.mark.parametrize("name", [*FOLDERS, *QUOTES])
def test_systemd_itself_reads_the_configuration_s_path_as_it_is(name, tmp_path):
    config = Path("/", name, "worker.toml")
    _, printed = verified(systemd_unit(config, interpreter="/bin/sh"), tmp_path, SYSTEMD_LOG_LEVEL="debug")
    assert f"\tEnvironment: FLEET_CONFIG={config}\n" in printed


def verified(text, folder, *, manager="--user", **variables):
    """The exit code and the words of `systemd-analyze verify`."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    (folder / UNIT).write_text(text, "utf-8")
    command = ["systemd-analyze", manager, "verify", str(folder / UNIT)]
    environ = os.environ | {"XDG_RUNTIME_DIR": str(folder), **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=10)
    return done.returncode, done.stdout + done.stderr
