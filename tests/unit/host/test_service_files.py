"""What the files of both service managers have in common."""

import plistlib
from pathlib import Path

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.launchd import LABEL
from tests.unit.host.service_paths import CONFIG, launchd_plist, systemd_unit

UNUSABLE = ["two\nlines", "a\x00b", "\x1b[31m", "not UTF-8: \udcff"]


@pytest.mark.parametrize(("grace", "seconds"), [(0.0, 15), (90.5, 106)])
def test_a_longer_drain_is_waited_for(grace, seconds):
    agent = plistlib.loads(launchd_plist(ends_within=grace))
    assert agent["ExitTimeOut"] == seconds
    assert f"\nTimeoutStopSec={seconds}\n" in systemd_unit(ends_within=grace)


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_path_that_a_file_cannot_hold_is_refused(name):
    path = f"/{name}/x"
    for wrong in ({"config": Path(path)}, {"config": CONFIG, "interpreter": path}):
        with pytest.raises(ConfigurationError, match="control characters"):
            launchd_plist(**wrong)
        with pytest.raises(ConfigurationError, match="control characters"):
            systemd_unit(**wrong)


def test_nothing_of_the_environment_is_in_the_files(monkeypatch):
    monkeypatch.setenv("FLEET_BROKER_URL", "redis://:hush-hush@broker/0")
    monkeypatch.setenv("FLEET_INSTANCES__LOCAL__API_KEY", "hush-hush")
    text = launchd_plist().decode() + systemd_unit()
    assert "hush" not in text
    assert text.count("FLEET_") == 2
    assert LABEL in text
