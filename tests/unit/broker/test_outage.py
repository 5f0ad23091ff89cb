"""One line for each failure, growing pauses, and no line that a broker is back which fails again at once."""

import logging

import pytest
from redis.exceptions import NoPermissionError

from fleet_worker.broker.outage import LOGGED_EVERY, REFUSED_BACK_OFF, STEADY_AFTER, STEADY_AFTER_REFUSAL, Outage
from tests.clock import Clock

AWAY, REFUSED = ConnectionResetError(), NoPermissionError("No permissions to access a channel")


@pytest.fixture
def clock():
    return Clock(100.0)


@pytest.fixture
def outage(clock):
    return Outage("replies: the broker", logging.getLogger("tests.outage"), clock=clock)


def test_a_broker_that_goes_and_comes_back_is_two_lines(outage, clock, caplog):
    pauses = []
    for _ in range(8):
        pauses.append(outage.failed(AWAY))
        clock.now += 1.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == 2.0
    outage.works()
    assert len(caplog.messages) == 1
    clock.now += STEADY_AFTER
    outage.works()
    assert caplog.messages == [
        "replies: the broker is away (ConnectionResetError); it is tried again",
        "replies: the broker is back after 8 s",
    ]
    assert outage.failed(AWAY) == pauses[0]


def test_a_connection_that_is_lost_again_and_again_is_tried_again_at_once_each_time(outage, clock, caplog):
    outage.failed(AWAY)
    for _ in range(9):
        outage.works()
        clock.now += 0.5
        assert outage.failed(AWAY) == 0.05
    assert len(caplog.messages) == 1
    assert outage.failed(AWAY) == 0.1


def test_what_is_refused_after_each_connection_is_one_line_and_pauses_grow(outage, clock, caplog):
    pauses = []
    for _ in range(9):
        outage.works()
        clock.now += 0.1
        pauses.append(outage.failed(REFUSED))
        clock.now += 0.1
    assert pauses == [*REFUSED_BACK_OFF, REFUSED_BACK_OFF[-1], REFUSED_BACK_OFF[-1]]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("replies: the broker does not allow its user channels of our names: ")
    outage.works()
    clock.now += STEADY_AFTER_REFUSAL
    outage.works()
    assert outage.failed(REFUSED) == pauses[0]


def test_a_broker_that_refuses_some_seconds_after_each_connection_is_never_back(outage, clock, caplog):
    for _ in range(5):
        outage.works()
        clock.now += STEADY_AFTER + 2
        outage.works()
        outage.failed(REFUSED)
    assert len(caplog.messages) == 1


def test_a_broker_that_stays_away_is_a_line_a_minute_whatever_the_error(outage, clock, caplog):
    for second in range(181):
        outage.failed(OSError() if second % 2 else AWAY)
        clock.now += 1.0
    assert caplog.messages == [
        "replies: the broker is away (ConnectionResetError); it is tried again",
        *(
            f"replies: the broker is away (ConnectionResetError), for {n} s now; it is tried again"
            for n in (60, 120, 180)
        ),
    ]


def test_another_reason_is_another_line_and_the_same_one_comes_every_minute(outage, clock, caplog):
    outage.failed(AWAY)
    outage.failed(REFUSED)
    assert len(caplog.messages) == 2
    clock.now += LOGGED_EVERY
    outage.failed(REFUSED)
    assert len(caplog.messages) == 3
    outage.failed(AWAY)
    assert len(caplog.messages) == 4


def test_a_quiet_one_logs_only_what_is_refused(clock, caplog):
    outage = Outage("routers: the broker", logging.getLogger("tests.outage"), is_quiet=lambda: True, clock=clock)
    outage.failed(AWAY)
    assert caplog.messages == []
    outage.failed(REFUSED)
    assert len(caplog.messages) == 1


def test_a_broker_that_never_failed_is_not_called_back(outage, clock, caplog):
    for _ in range(3):
        outage.works()
        clock.now += STEADY_AFTER
    assert caplog.messages == []
