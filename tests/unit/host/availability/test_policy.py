"""When a host leaves, and when it comes back: time and readings in, a reason out."""

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability.policy import BATTERY, HEAT, MEMORY, UNKNOWN, USER, WOKEN, Condition, Pauses, Policy
from fleet_worker.host.availability.probes import MemoryPressure, Thermal
from fleet_worker.host.availability.readings import Readings

MONDAY = datetime(2026, 11, 30)
PAUSES = Pauses()


class Host:
    """A host with these settings, at second 0 of its clock, Monday noon."""

    def __init__(self, **settings):
        self.policy = Policy(AvailabilitySettings(**settings), PAUSES)
        self.now = 0.0
        self.noon = MONDAY + timedelta(hours=12)

    def reason(self, seconds=0.0, **read):
        """Why it is away, so many seconds later."""
        self.now += seconds
        local = self.noon + timedelta(seconds=self.now)
        return self.policy.reason_to_be_away(self.now, local, Readings(**read))

    def back_after(self, **read):
        """Seconds until these readings, one each second, bring it back."""
        return next(seconds for seconds in range(10_000) if not self.reason(1.0 if seconds else 0.0, **read))


def test_a_user_is_noticed_with_the_first_key_and_has_left_after_the_time_that_is_set():
    host = Host(idle_user=300)
    assert host.reason(idle=299.0) == USER
    assert host.reason(1, idle=300.0) == ""
    assert host.reason(1, idle=0.4) == USER
    assert host.reason(1, idle=1.4) == USER
    assert host.reason(300, idle=301.0) == ""


def test_nobody_logged_in_is_nobody_at_it():
    assert Host(idle_user=300).reason(idle=float("inf")) == ""


def test_outside_of_its_hours_it_says_until_when():
    host = Host(hours="mon-fri 19:00-08:00")
    assert host.reason() == "outside of its hours, until 19:00"
    assert host.reason(7 * 3600 - 1) == "outside of its hours, until 19:00"
    assert host.reason(1) == ""
    weekend = Host(hours="sat")
    assert weekend.reason() == "outside of its hours, until Sat 00:00"
    assert Host(hours="mon 08:00-09:00").reason() == "outside of its hours, until Mon 08:00"


def test_on_battery_it_leaves_at_once_and_comes_back_when_the_power_stays():
    host = Host(only_on_power=True)
    assert host.reason(on_power=True) == ""
    assert host.reason(1, on_power=False) == BATTERY
    assert host.reason(1, on_power=True) == BATTERY
    assert host.reason(1, on_power=False) == BATTERY
    assert host.back_after(on_power=True) == PAUSES.power


@pytest.mark.parametrize(
    ("setting", "reading", "fine", "bad", "reason"),
    [
        ({"max_memory_pressure": "normal"}, "memory", MemoryPressure.NORMAL, MemoryPressure.WARNING, MEMORY),
        ({"max_memory_pressure": "warning"}, "memory", MemoryPressure.WARNING, MemoryPressure.CRITICAL, MEMORY),
        ({"max_thermal": "nominal"}, "thermal", Thermal.NOMINAL, Thermal.MODERATE, HEAT),
        ({"max_thermal": "heavy"}, "thermal", Thermal.HEAVY, Thermal.TRAPPING, HEAT),
    ],
)
def test_pressure_and_heat_count_when_they_last_and_must_be_gone_for_a_minute(setting, reading, fine, bad, reason):
    host = Host(**setting)
    assert host.reason(**{reading: fine}) == ""
    assert host.reason(1, **{reading: bad}) == ""
    assert host.reason(PAUSES.confirmed - 1, **{reading: bad}) == ""
    assert host.reason(1, **{reading: fine}) == "", "it was gone in time"
    assert host.reason(1, **{reading: bad}) == ""
    assert host.reason(PAUSES.confirmed, **{reading: bad}) == reason
    assert host.reason(30, **{reading: fine}) == reason
    assert host.reason(29, **{reading: bad}) == reason, "it must be gone for a minute without a break"
    assert host.back_after(**{reading: fine}) == PAUSES.first


def test_a_host_whose_own_server_fills_the_memory_comes_back_ever_later():
    """The pressure is there as long as it works, and gone as soon as it has left."""
    host = Host(max_memory_pressure="normal")
    pauses = []
    host.reason(memory=MemoryPressure.NORMAL)
    for _ in range(9):
        host.reason(20, memory=MemoryPressure.WARNING)
        assert host.reason(PAUSES.confirmed, memory=MemoryPressure.WARNING) == MEMORY
        pauses.append(host.back_after(memory=MemoryPressure.NORMAL))
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    host.reason(PAUSES.soon, memory=MemoryPressure.WARNING)
    host.reason(PAUSES.confirmed, memory=MemoryPressure.WARNING)
    assert host.back_after(memory=MemoryPressure.NORMAL) == 60, "it had worked for half an hour"


def test_what_cannot_be_read_makes_no_host_leave():
    host = Host(idle_user=300, only_on_power=True, max_memory_pressure="normal", max_thermal="nominal")
    assert host.reason() == ""
    assert host.reason(3600) == ""


def test_a_probe_that_fails_once_brings_no_host_back_while_its_user_is_there():
    host = Host(idle_user=300)
    assert host.reason(idle=1.0) == USER
    assert host.reason(1, idle=None) == USER
    assert host.reason(1, idle=3.0) == USER
    assert host.back_after(idle=None) == UNKNOWN


def test_after_a_sleep_it_waits_until_it_is_sure_to_be_awake():
    host = Host(idle_user=300)
    assert host.reason(idle=900.0) == ""
    host.policy.woke_up(host.now)
    assert host.reason(idle=900.0) == WOKEN
    assert host.reason(PAUSES.awake - 1, idle=900.0) == WOKEN
    assert host.reason(1, idle=2.0) == USER


READS = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 5.0, 70.0, 400.0]), st.sampled_from([True, False, None])), max_size=60
)


@given(READS, st.sampled_from([0.0, 5.0, 60.0]), st.sampled_from([0.0, 10.0]))
def test_it_leaves_only_while_it_is_bad_and_returns_only_while_it_is_not(reads, returns_after, leaves_after):
    condition = Condition(leaves_after=leaves_after, returns_after=returns_after, longest=600.0, soon=1800.0)
    now, before, left_at, bad_since = 0.0, True, None, None
    for step, (seconds, read) in enumerate(reads):
        now += seconds
        bad_since = (bad_since if bad_since is not None else now) if read is False else None
        allows = condition.allows(now, read)
        if before and not allows:
            assert read is False
            assert step == 0 or now - bad_since >= leaves_after
            left_at = now
        if allows and not before:
            assert read is not False
            assert now - left_at >= returns_after
        if read is False and now - bad_since >= leaves_after:
            assert not allows
        before = allows


@given(st.lists(st.floats(0.1, 5000.0), min_size=1, max_size=40))
def test_however_long_it_was_away_it_comes_back_within_an_hour_of_good_readings(bad_for):
    host = Host(max_thermal="nominal")
    for seconds in bad_for:
        host.reason(seconds, thermal=Thermal.HEAVY)
        host.reason(seconds, thermal=Thermal.HEAVY)
        host.reason(1, thermal=Thermal.NOMINAL)
        assert host.reason(PAUSES.longest, thermal=Thermal.NOMINAL) == ""
