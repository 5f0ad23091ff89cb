"""What Celery logs of its connection becomes a line when the broker goes, one a minute, and one when it is back."""

import logging

import pytest
from celery.worker.consumer.consumer import CONNECTION_ERROR, CONNECTION_RETRY

from fleet_worker.node.log_privacy import TOLD_EVERY, OutageFilter

URL = "redis://operator:**@broker:6379/0"


class Celery:
    """Its connection, as far as it is logged; every call returns what is in the log since the last one."""

    def __init__(self, caplog):
        self.now = 1000.0
        self._caplog = caplog
        self._log = logging.getLogger("tests.outage")
        self._log.filters = [OutageFilter(clock=lambda: self.now)]

    def connects(self):
        return self._logged(logging.INFO, "Connected to %s", URL)

    def loses_it(self):
        return self._logged(logging.WARNING, "%s (%r)", CONNECTION_RETRY, ConnectionResetError(URL))

    def fails(self, times=1, after=2.0):
        lines = []
        for _ in range(times):
            self.now += after
            lines += self._logged(logging.ERROR, CONNECTION_ERROR, URL, OSError(URL), "Trying again in 2.00 seconds...")
        return lines

    def _logged(self, level, message, *args):
        self._caplog.clear()
        self._log.log(level, message, *args)
        return [(record.levelname, record.getMessage()) for record in self._caplog.records]


@pytest.fixture
def celery(caplog):
    caplog.set_level(logging.DEBUG, "tests.outage")
    return Celery(caplog)


def test_a_broker_that_goes_and_comes_back_is_two_lines(celery):
    assert celery.connects() == [("INFO", "connected to the broker at broker:6379")]
    away = "the broker at broker:6379 is away (ConnectionResetError), and is tried again until it is back"
    assert celery.loses_it() == [("WARNING", away)]
    assert celery.fails(times=4) == []
    assert celery.connects() == [("WARNING", "the broker at broker:6379 is back after 8 s")]
    assert celery.loses_it() == [("WARNING", away)]


def test_a_broker_that_was_never_there_is_one_line_too(celery):
    away = "the broker at broker:6379 is away (OSError), and is tried again until it is back"
    assert celery.fails(times=5) == [("WARNING", away)]
    assert celery.connects() == [("WARNING", "the broker at broker:6379 is back after 8 s")]


def test_a_broker_that_stays_away_is_a_line_a_minute(celery):
    celery.connects()
    celery.loses_it()
    lines = celery.fails(times=90)
    away_for = [TOLD_EVERY, 2 * TOLD_EVERY, 3 * TOLD_EVERY]
    assert lines == [
        ("WARNING", f"the broker at broker:6379 is still away, for {seconds:g} s now (OSError)") for seconds in away_for
    ]


def test_what_else_is_logged_there_stays(celery):
    assert celery._logged(logging.INFO, "Started consuming from %s", "a lane") == [
        ("INFO", "Started consuming from a lane")
    ]
