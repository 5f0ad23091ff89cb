"""The text of the service files, read back by other means than those that wrote it."""

import configparser
import os
import plistlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.launchd import LABEL, launchd_plist
from fleet_worker.host.systemd import UNIT, systemd_unit

CONFIG = Path("/etc/fleet/worker.toml")
LOG = Path("/Users/op/Library/Logs/fleet-worker/up.log")
PYTHON = "/opt/fleet/bin/python3"
FOLDERS = ["plain", "with a space", "100%h %n", "größer 東京 🚢", "$HOME ${HOME}", "a;b # c", "&amp; <b>"]
QUOTES = ['say "hi"', "it's", "back\\slash \\n"]
UNUSABLE = ["two\nlines", "a\x00b", "\x1b[31m", "not UTF-8: \udcff"]


def unit(config=CONFIG, **values):
    """Sections by name, each a dictionary."""
    reader = configparser.ConfigParser(interpolation=None, delimiters="=", strict=True)
    reader.optionxform = str
    reader.read_string(systemd_unit(config, **{"interpreter": PYTHON, **values}))
    return {name: dict(reader[name]) for name in reader.sections()}


def words(value):
    """Double quotes and backslashes are the shell's; %% is systemd's."""
    assert "%" not in value.replace("%%", "")  # it would begin a specifier
    return [word.replace("%%", "%") for word in shlex.split(value)]


# --- launchd --------------------------------------------------------------------------------------------------------


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


# --- systemd --------------------------------------------------------------------------------------------------------


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
        systemd_unit(CONFIG, interpreter=f"/{name}/python")


@pytest.mark.parametrize("name", FOLDERS)
def test_systemd_itself_finds_nothing_to_complain_about(name, tmp_path, monkeypatch):
    """It looks for the program, so it must have read that path as it was meant."""
    interpreter = tmp_path / name / "python"
    interpreter.parent.mkdir()
    interpreter.write_text("#!/bin/sh\n")
    interpreter.chmod(0o755)
    text = systemd_unit(CONFIG, interpreter=str(interpreter))
    assert verified(text, tmp_path) == (0, "")
    interpreter.unlink()
    assert verified(text, tmp_path) != (0, "")


@pytest.mark.parametrize("name", [*FOLDERS, *QUOTES])
def test_systemd_itself_reads_the_configuration_s_path_as_it_is(name, tmp_path):
    config = Path("/", name, "worker.toml")
    _, printed = verified(systemd_unit(config, interpreter="/bin/sh"), tmp_path, SYSTEMD_LOG_LEVEL="debug")
    assert f"\tEnvironment: FLEET_CONFIG={config}\n" in printed


def verified(text, folder, **variables):
    """The exit code and the words of `systemd-analyze verify`."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    (folder / UNIT).write_text(text, "utf-8")
    command = ["systemd-analyze", "--user", "verify", str(folder / UNIT)]
    environ = os.environ | {"XDG_RUNTIME_DIR": str(folder), **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=10)
    return done.returncode, done.stdout + done.stderr


# --- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grace", "seconds"), [(0.0, 15), (90.5, 106)])
def test_a_longer_drain_is_waited_for(grace, seconds):
    agent = plistlib.loads(launchd_plist(CONFIG, log=LOG, ends_within=grace))
    assert agent["ExitTimeOut"] == seconds
    assert unit(ends_within=grace)["Service"]["TimeoutStopSec"] == str(seconds)


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_path_that_a_file_cannot_hold_is_refused(name):
    path = f"/{name}/x"
    for wrong in ({"config": Path(path)}, {"config": CONFIG, "interpreter": path}):
        with pytest.raises(ConfigurationError, match="control characters"):
            launchd_plist(**wrong, log=LOG)
        with pytest.raises(ConfigurationError, match="control characters"):
            systemd_unit(**wrong)


def test_nothing_of_the_environment_is_in_the_files(monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", "redis://:hush-hush@broker/0")
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__API_KEY", "hush-hush")
    text = launchd_plist(CONFIG, log=LOG).decode() + systemd_unit(CONFIG)
    assert "hush" not in text
    assert text.count("FLEET_") == 2
    assert LABEL in text
