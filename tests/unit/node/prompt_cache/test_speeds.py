import pytest

from fleet_worker.node.prompt_cache.speeds import MOST, PeakSpeed


def measured(*speeds, alone=True):
    peak = PeakSpeed()
    for speed in speeds:
        peak.measured(speed * 2, 2.0, alone=alone)
    return peak.value


def test_nothing_is_known_before_something_was_measured():
    assert PeakSpeed().value is None


def test_the_highest_counts_at_once_and_falls_slowly():
    assert measured(100.0, 200.0) == 200.0
    assert measured(200.0, 100.0) == pytest.approx(190.0)
    assert measured(200.0, *[100.0] * 100) == pytest.approx(100.0, rel=0.01)


def test_a_request_that_shared_the_server_never_lowers_it():
    assert measured(100.0, 50.0, 10.0, alone=False) == 100.0
    assert measured(100.0, 150.0, alone=False) == 150.0


def test_a_clock_that_shows_hardly_any_time_makes_no_speed_of_light():
    peak = PeakSpeed()
    peak.measured(1_000, 1e-12, alone=True)
    assert peak.value == MOST
