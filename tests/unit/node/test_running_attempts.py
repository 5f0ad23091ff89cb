"""What runs is stopped, what is cancelled never begins; and what is remembered has an end."""

import pytest

from fleet_worker.errors import Cancelled, InstanceUnavailable
from fleet_worker.node.running_attempts import REMEMBERED, RunningAttempts


@pytest.fixture
def now():
    return [1000.0]


@pytest.fixture
def running(now):
    return RunningAttempts(clock=lambda: now[0])


def begins(running, request_id, attempt=1):
    try:
        with running.attempt(request_id, attempt, "router"):
            return True
    except Cancelled:
        return False


def test_to_cancel_stops_what_runs_up_to_that_attempt(running):
    with (
        running.attempt("r", 1, "a") as first,
        running.attempt("r", 2, "a") as second,
        running.attempt("r", 3, "a") as third,
        running.attempt("other", 1, "a") as other,
    ):
        running.cancel("r", 2)
        assert [type(stop.error) for stop in (first, second)] == [Cancelled, Cancelled]
        assert third.error is other.error is None


def test_what_was_cancelled_never_begins_and_a_later_attempt_may(running):
    running.cancel("r", 2)
    assert [begins(running, "r", attempt) for attempt in (1, 2, 3)] == [False, False, True]


def test_an_older_cancel_that_comes_later_takes_nothing_back(running):
    running.cancel("r", 3)
    running.cancel("r", 1)
    assert not begins(running, "r", 3)


def test_of_very_many_cancels_the_oldest_are_forgotten(running):
    running.cancel("first", 1)
    running.cancel("again", 1)
    for number in range(REMEMBERED - 2):
        running.cancel(str(number), 1)
    running.cancel("again", 1)
    running.cancel("last", 1)
    assert begins(running, "first")
    assert not begins(running, "again")
    assert not begins(running, "last")


def test_all_is_stopped_or_all_of_one_router_and_nothing_twice(running):
    with running.attempt("r", 1, "a") as first, running.attempt("s", 1, "b") as second:
        assert running.routers == {"a", "b"}
        assert running.stop(lambda: InstanceUnavailable("gone"), reply_to="a") == 1
        assert (first.error.message, second.error) == ("gone", None)
        assert running.stop(Cancelled) == 1
        assert first.error.message == "gone"
        assert isinstance(second.error, Cancelled)
    assert running.routers == set()
    assert running.stop(Cancelled) == 0


def test_an_attempt_is_new_once(running):
    assert [running.is_new("r", 1), running.is_new("r", 1), running.is_new("r", 2)] == [True, False, True]


def test_of_very_many_attempts_the_oldest_are_forgotten(running):
    assert all(running.is_new(str(number), 1) for number in range(REMEMBERED + 1))
    assert not running.is_new("1", 1)
    assert running.is_new("0", 1)


def test_a_node_is_busy_as_long_as_at_least_one_attempt_runs(running, now):
    assert (len(running), running.busy_since) == (0, None)
    with running.attempt("r", 1, "a"):
        now[0] += 1
        with running.attempt("s", 1, "a"):
            assert (len(running), running.busy_since) == (2, 1000.0)
        assert (len(running), running.busy_since) == (1, 1000.0)
    assert (len(running), running.busy_since) == (0, None)
    with running.attempt("t", 1, "a"):
        assert running.busy_since == 1001.0
