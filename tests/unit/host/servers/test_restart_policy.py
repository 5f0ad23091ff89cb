import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.host.servers.restart_policy import PACE, Pace, RestartPolicy

SECONDS = st.floats(0, 3000, allow_nan=False)


class Life:
    """A server on a clock of its own: what it does takes the seconds that it is told."""

    def __init__(self, pace=PACE):
        self.policy = RestartPolicy(pace)
        self.now = 1000.0
        self.starts = []

    def run(self, *, loads=0.0, serves=None):
        """Start it, let it load, serve unless it never does, and die. Return the pause before its next start."""
        self.starts.append(self.now)
        self.policy.started(self.now)
        self.now += loads
        if serves is not None:
            self.policy.served(self.now)
            self.now += serves
        pause = self.policy.died(self.now)
        self.now += pause
        return pause


def test_it_starts_again_at_once_then_after_growing_pauses_then_once_in_ten_minutes():
    life = Life()
    assert [life.run() for _ in range(7)] == [0, 1, 2, 4, 600, 600, 600]
    assert life.policy.quarantined


def test_pauses_have_a_limit():
    life = Life(Pace(longest=3.0, most_deaths=7))
    assert [life.run() for _ in range(6)] == [0, 1, 2, 3, 3, 3]


def test_the_pause_is_a_number_after_any_number_of_deaths():
    life = Life(Pace(first=0.0, most_deaths=1_000_000))
    assert {life.run() for _ in range(3000)} == {0.0}


def test_a_server_that_never_gets_ready_comes_into_quarantine_however_long_that_takes():
    """Each start takes fifteen minutes, so that never two deaths are within ten minutes of the wall."""
    life = Life()
    pauses = [life.run(loads=900) for _ in range(5)]
    assert pauses[-1] == 600
    assert life.policy.quarantined


def test_a_server_that_dies_every_nine_minutes_is_never_quarantined():
    life = Life()
    assert max(life.run(loads=60, serves=540) for _ in range(20)) <= 1
    assert not life.policy.quarantined


def test_a_server_that_serves_for_the_window_is_forgiven_also_in_quarantine():
    life = Life()
    for _ in range(5):
        life.run()
    assert life.run(serves=599) == 600
    assert life.run(serves=600) == 0
    assert not life.policy.quarantined


@given(st.lists(st.tuples(SECONDS, st.none() | SECONDS), max_size=60))
def test_no_server_starts_more_often_than_its_pace_allows(lives):
    """At most six starts in ten minutes of a time that does not count what it takes to start, whatever it does."""
    life = Life()
    loading = 0.0
    clock = []
    for loads, serves in lives:
        clock.append(life.now - loading)
        pause = life.run(loads=loads, serves=serves)
        loading += loads
        assert 0 <= pause <= 600
        assert pause == 600 or not life.policy.quarantined
    for first, sixth in zip(clock, clock[6:], strict=False):
        assert sixth - first > 590


@given(st.lists(st.none() | SECONDS, min_size=5, max_size=5))
def test_five_deaths_within_the_window_always_lead_to_quarantine(serves):
    life = Life()
    pauses = [life.run(serves=each and each / 3000 * 100) for each in serves]
    assert sum(pauses[:4]) < 10
    assert life.policy.quarantined


# --- Restarts that somebody asks for


def wishes(life, *, every, for_seconds):
    """Ask for a restart that often; return the times at which it was allowed."""
    end = life.now + for_seconds
    granted = []
    while life.now < end:
        if life.policy.wish_allowed_at <= life.now:
            granted.append(life.now)
            life.policy.wished(life.now)
            life.policy.stopped(life.now)
            life.policy.started(life.now)
            life.policy.served(life.now)
        life.now += every
    return granted


def test_a_server_that_is_always_at_fault_is_not_restarted_420_times_in_two_hours():
    granted = wishes(Life(), every=1.0, for_seconds=7200)
    assert len(granted) <= 17
    assert [after - before for before, after in itertools.pairwise(granted[:5])] == [30, 60, 120, 240]
    assert granted[-1] - granted[-2] == pytest.approx(600, abs=1)


@given(st.floats(0.5, 400))
def test_restarts_that_are_asked_for_keep_their_distance(every):
    granted = wishes(Life(), every=every, for_seconds=20_000)
    assert all(after - before >= 30 for before, after in itertools.pairwise(granted))
    assert len(granted) <= 6 + 20_000 / 600


def test_a_fault_after_a_good_while_is_met_at_once_again():
    life = Life()
    wishes(life, every=1.0, for_seconds=100)
    life.now += 1300
    assert life.policy.wish_allowed_at <= life.now
    life.policy.wished(life.now)
    assert life.policy.wish_allowed_at == life.now + 30


def test_a_restart_that_is_asked_for_is_no_death():
    life = Life()
    wishes(life, every=1.0, for_seconds=7200)
    assert not life.policy.quarantined
    assert life.run(serves=1) == 0


def test_an_operator_makes_it_forget_everything():
    life = Life()
    for _ in range(5):
        life.run()
    life.policy.wished(life.now)
    life.policy.forgive()
    assert not life.policy.quarantined
    assert life.policy.wish_allowed_at <= life.now
    assert life.run() == 0
