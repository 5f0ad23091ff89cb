"""How a worker process ends; the node, and Celery, only do what a test says."""

import time
from types import SimpleNamespace

import pytest
from celery.worker import state as celery_state

from fleet_worker.life import HANDED_OVER_WITHIN, Life
from tests.clients import took_less_than, until


class Node:
    """So many requests, none of which ends by itself. Each begins when the one before it has been handed over."""

    name = "one@test"

    def __init__(self, requests):
        self._requests = requests

    def drain(self, *, ending):
        assert ending

    def hand_over(self):
        self._requests -= 1

    def wait_until_idle(self, timeout):
        time.sleep(timeout if self._requests else 0)
        return not self._requests

    def close(self):
        pass


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(celery_state, "should_stop", None)
    return SimpleNamespace()


def exit_code(life, worker):
    """What Celery is told to end with; and it ends."""
    until(lambda: celery_state.should_stop is not None, HANDED_OVER_WITHIN + 2)
    life._stopped(worker)
    return celery_state.should_stop


def test_what_begins_only_after_a_node_has_begun_to_hand_over_is_handed_over_too(worker):
    life = Life(worker, Node(requests=3), grace=0.0)
    with took_less_than(HANDED_OVER_WITHIN - 1):
        life._end(0)
        assert exit_code(life, worker) == 0
