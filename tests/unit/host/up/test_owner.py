"""How the loop of `up` learns whether this host may work: calls of a real watcher, which this test makes itself."""

import queue
from datetime import datetime

import pytest

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability import sleep_notice
from fleet_worker.host.availability.watcher import UNKNOWN
from fleet_worker.host.up.owner import Owner
from fleet_worker.hours import DAYS

ALWAYS = AvailabilitySettings(hours="mon-sun", keep_awake=False)
NOT_NOW = AvailabilitySettings(
    hours=DAYS[(datetime.now().weekday() + 3) % 7], grace=3.0, stop_servers=False, keep_awake=False
)


class Loop:
    """Keeps what other threads want to be called."""

    def __init__(self):
        self.calls = queue.Queue()
        self.call = self.calls.put

    def run_next(self):
        self.calls.get(timeout=10)()


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setattr(sleep_notice, "monitor_command", lambda: None)
    found = Owner(Loop())
    yield found
    found.close()


def test_without_the_section_a_host_always_works(owner):
    owner.settle(AvailabilitySettings())
    assert owner.away is None
    assert owner._watcher is None


def test_until_it_is_known_whether_a_host_may_work_it_does_not(owner):
    owner.settle(ALWAYS)
    assert owner.away.reason == UNKNOWN
    owner._loop.run_next()
    assert owner.away is None


def test_the_settings_say_what_becomes_of_requests_and_servers(owner):
    owner.settle(NOT_NOW)
    owner._loop.run_next()
    assert owner.away.reason.startswith("outside of its hours, until ")
    assert (owner.away.grace, owner.away.stops_server) == (3.0, False)


def test_what_an_earlier_watcher_has_said_counts_no_more(owner):
    owner.settle(NOT_NOW)
    late = owner._loop.calls.get(timeout=10)
    owner.settle(ALWAYS)
    owner._loop.run_next()
    late()
    assert owner.away is None
    owner.settle(AvailabilitySettings())
    assert owner.away is None


def test_the_same_settings_start_no_other_watcher(owner):
    owner.settle(ALWAYS)
    before = owner._watcher
    owner.settle(AvailabilitySettings(hours="mon-sun", keep_awake=False))
    assert owner._watcher is before


def test_the_watcher_is_told_once_that_all_is_handed_over(owner):
    owner.settle(NOT_NOW)
    owner._loop.run_next()
    told = []
    owner._watcher.drained = lambda: told.append(True)
    owner.act(running=2, all_idle=False)
    assert not told
    for _ in range(3):
        owner.act(running=0, all_idle=True)
    assert told == [True]


def test_nodes_that_are_idle_by_themselves_have_handed_over_nothing(owner):
    owner.settle(ALWAYS)
    owner._loop.run_next()
    owner._watcher.drained = lambda: pytest.fail("this host works")
    owner.act(running=0, all_idle=True)
