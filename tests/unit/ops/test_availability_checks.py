"""What doctor says of the owner's settings."""

import pytest

from fleet_worker import Settings
from fleet_worker.host.availability.probes import MemoryPressure, ProbeFailed, Thermal
from fleet_worker.ops import availability_checks
from fleet_worker.ops.availability_checks import availability


class Mac:
    def idle_seconds(self):
        return 12.3

    def on_power(self):
        return False

    def memory_pressure(self):
        return MemoryPressure.WARNING

    def thermal(self):
        raise ProbeFailed("notifyutil is not there")


@pytest.fixture(autouse=True)
def complete(monkeypatch):
    """A system on which every command is there."""
    monkeypatch.setattr(availability_checks, "find_program", lambda command: f"/usr/bin/{command}")
    monkeypatch.setattr(availability_checks.sleep_notice, "monitor_command", lambda: ["gdbus"])


def findings(probes=None, **wanted):
    return [(found.severity, found.found) for found in availability(Settings(availability=wanted), probes or Mac())]


def test_without_the_section_there_is_nothing_to_say():
    assert findings() == []


def test_each_setting_is_shown_with_what_is_there_now():
    assert findings(idle_user=300, only_on_power=True, max_memory_pressure="normal", max_thermal="heavy") == [
        ("ok", "idle_user: used 12 s ago"),
        ("ok", "only_on_power: on battery"),
        ("ok", "max_memory_pressure: warning"),
        ("warning", "max_thermal: notifyutil is not there"),
    ]


def test_hours_are_shown_as_they_are_now():
    ((severity, text),) = findings(hours="mon-sun")
    assert (severity, text) == ("ok", "within its hours")
    ((_, text),) = findings(hours=["mon 8:00-9:00", "tue 9:01-10:00"])
    assert text.startswith(("within its hours, until ", "outside of its hours, until "))


def test_nobody_logged_in_is_said():
    class Alone(Mac):
        def idle_seconds(self):
            return float("inf")

        def thermal(self):
            return Thermal.NOMINAL

    assert findings(Alone(), idle_user=300, max_thermal="heavy") == [
        ("ok", "idle_user: nobody is logged in"),
        ("ok", "max_thermal: nominal"),
    ]


def test_commands_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(availability_checks, "find_program", lambda _: None)
    monkeypatch.setattr(availability_checks.sleep_notice, "monitor_command", lambda: None)
    (awake, notice) = findings(keep_awake=True)
    assert awake[0] == notice[0] == "warning"
    assert "is not there" in awake[1]
    assert "gdbus" in notice[1]
    assert [text for _, text in findings(keep_awake=False)] == [notice[1]]
