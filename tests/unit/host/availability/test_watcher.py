"""The thread that looks and tells `up`, with probes that a test answers."""

import queue
import threading
from dataclasses import dataclass

import pytest

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability import sleep_notice, watcher
from fleet_worker.host.availability.policy import USER, WOKEN, Pauses
from fleet_worker.host.availability.watcher import GOES_TO_SLEEP, UNKNOWN, AvailabilityWatcher
from tests.clock import Clock

WITHIN = 10.0


@dataclass
class User:
    """Probes of a machine on which nothing but its user matters."""

    idle: float = 900.0

    def idle_seconds(self):
        return self.idle

    on_power = memory_pressure = thermal = None


class Told:
    """What a watcher has told, in order."""

    def __init__(self):
        self._queue = queue.Queue()

    def __call__(self, reason, grace):
        self._queue.put((reason, grace))

    def next(self):
        return self._queue.get(timeout=WITHIN)

    @property
    def nothing_more(self):
        return self._queue.empty()


@pytest.fixture
def looks_often(monkeypatch):
    monkeypatch.setattr(watcher, "USER_INTERVAL", 0.01)
    monkeypatch.setattr(watcher, "INTERVAL", 0.01)
    monkeypatch.setattr(sleep_notice, "monitor_command", lambda: None)


@pytest.fixture
def watch(looks_often):
    """Returns a function that starts a watcher."""
    started = []

    def start(settings, told, **arguments):
        found = AvailabilityWatcher(settings, changed=told, **arguments)
        started.append(found)
        found.start()
        return found

    yield start
    for each in started:
        each.stop()


def test_without_the_section_there_is_no_thread(watch):
    threads = threading.active_count()
    told = Told()
    assert watch(AvailabilitySettings(), told).reason == ""
    assert threading.active_count() == threads
    assert told.nothing_more


def test_until_the_first_look_a_host_must_not_work():
    assert AvailabilityWatcher(AvailabilitySettings(idle_user=300), changed=Told()).reason == UNKNOWN


def test_the_first_look_is_told_whatever_it_finds_then_only_changes(watch):
    told, user = Told(), User()
    found = watch(AvailabilitySettings(idle_user=300, grace=7.0), told, probes=user)
    assert told.next() == ("", 7.0)
    user.idle = 0.5
    assert told.next() == (USER, 7.0)
    assert found.reason == USER
    user.idle = 300.0
    assert told.next() == ("", 7.0)
    found.stop()
    user.idle = 0.5
    assert told.nothing_more


def test_probes_that_fail_let_a_host_work(watch):
    told = Told()
    watch(AvailabilitySettings(idle_user=300, only_on_power=True), told, probes=User(idle=None))
    assert told.next()[0] == ""


def test_before_a_sleep_requests_have_no_time_and_after_it_the_host_is_looked_at_again(watch):
    told = Told()
    found = watch(AvailabilitySettings(idle_user=300), told, probes=User(), pauses=Pauses(awake=0.05))
    allowed = []
    found._notice.allow = lambda: allowed.append(found.reason)
    assert told.next() == ("", 5.0)
    found.drained()  # of a host that works: means nothing
    found._on_sleep_notice(True)
    assert told.next() == (GOES_TO_SLEEP, 0.0)
    assert not allowed, "it waits until the requests have been handed over"
    found.drained()
    assert allowed == [GOES_TO_SLEEP]
    found._on_sleep_notice(False)
    assert told.next()[0] == WOKEN
    assert told.next()[0] == ""


def test_a_host_that_had_nothing_to_do_lets_the_machine_sleep_at_once(watch):
    told = Told()
    found = watch(AvailabilitySettings(idle_user=300), told, probes=User(idle=1.0))
    allowed = threading.Event()
    found._notice.allow = allowed.set
    assert told.next()[0] == USER
    found.drained()
    assert not allowed.is_set()
    found._on_sleep_notice(True)
    assert told.next()[0] == GOES_TO_SLEEP
    assert allowed.wait(WITHIN)


def test_a_sleep_without_a_notice_is_seen_by_the_clocks(watch):
    told, asleep = Told(), Clock(50.0)
    watch(AvailabilitySettings(idle_user=300), told, probes=User(), pauses=Pauses(awake=0.05), asleep=asleep)
    assert told.next()[0] == ""
    asleep.now += 2.0
    asleep.now += 3600.0
    assert told.next()[0] == WOKEN
    assert told.next()[0] == ""


def test_everything_is_read_again_before_a_host_works_after_a_sleep():
    assert Pauses().awake > watcher.INTERVAL


def test_a_notice_that_no_sleep_follows_is_forgotten(watch, monkeypatch):
    monkeypatch.setattr(watcher, "NOTICE_EXPIRES", 0.05)
    told = Told()
    found = watch(AvailabilitySettings(idle_user=300), told, probes=User())
    assert told.next()[0] == ""
    found._on_sleep_notice(True)
    assert [told.next()[0], told.next()[0]] == [GOES_TO_SLEEP, ""]


def test_this_machine_has_not_slept_while_the_test_ran():
    before = watcher.time_asleep()
    assert before > -1.0
    assert abs(watcher.time_asleep() - before) < 1.0
