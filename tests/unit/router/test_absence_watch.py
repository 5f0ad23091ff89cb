"""How long a request waits while nobody is there."""

import math
import time
from types import SimpleNamespace

import pytest

from fleet_worker.router.absence_watch import LOOK_AGAIN_AFTER, AbsenceWatch

LIMIT = 60.0


class Around:
    """What a watch sees. `replies` has a clock that stands still without a broker."""

    def __init__(self):
        self.is_there = False
        self.clock = self.back = 100.0
        self.asked = []

    def silence(self, since):
        return self.clock - max(since, self.back)

    def may_be_there(self, request, only, *, is_served):
        self.asked.append((request, only))
        return self.is_there


@pytest.fixture
def around():
    return Around()


def watch(around, limit=LIMIT):
    return AbsenceWatch(limit, SimpleNamespace(may_be_there=around.may_be_there), around)


def test_it_is_over_when_nobody_was_there_in_all_that_time(around):
    away = watch(around)
    assert not away.look("request", "local@mini")
    around.clock += LIMIT - 0.1
    assert not away.look("request", "local@mini")
    around.clock += 0.1
    assert away.look("request", "local@mini")
    assert around.asked == [("request", "local@mini")] * 3


def test_whoever_comes_back_takes_what_waits_and_then_it_begins_anew(around):
    away = watch(around)
    away.look("request", None)
    around.clock += LIMIT - 1
    around.is_there = True
    assert not away.look("request", None)
    around.is_there = False
    around.clock += 1
    assert not away.look("request", None)
    around.clock += LIMIT
    assert away.look("request", None)


def test_the_time_at_a_node_does_not_count(around):
    away = watch(around)
    away.look("request", None)
    around.clock += LIMIT - 1
    away.accepted()
    around.clock += 10 * LIMIT
    assert not away.look("request", None)


def test_a_broker_that_was_away_leaves_its_nodes_the_whole_time_to_come_back(around):
    away = watch(around)
    away.look("request", None)
    around.clock += LIMIT - 1
    around.back = around.clock
    around.clock += LIMIT - 1
    assert not away.look("request", None)
    around.clock += 1
    assert away.look("request", None)


def test_without_a_limit_nobody_is_asked(around):
    away = watch(around, math.inf)
    assert not away.look("request", None)
    assert around.asked == []


def test_the_next_look_is_when_it_may_be_over(around):
    away = watch(around)
    assert away.next_look() == math.inf
    away.look("request", None)
    around.clock += 50
    before, at, after = time.monotonic(), away.next_look(), time.monotonic()
    assert before + 10 <= at <= after + 10
    around.clock += 10
    before, at, after = time.monotonic(), away.next_look(), time.monotonic()
    assert before + LOOK_AGAIN_AFTER <= at <= after + LOOK_AGAIN_AFTER
    around.is_there = True
    away.look("request", None)
    assert away.next_look() == math.inf
