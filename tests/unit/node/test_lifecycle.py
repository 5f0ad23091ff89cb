"""How a worker process ends; the node, and Celery, only do what a test says."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from celery.worker import state as celery_state

from fleet_worker.exit_codes import CONFIGURATION, RESTART
from fleet_worker.node import lifecycle as module
from fleet_worker.node.lifecycle import HANDED_OVER_WITHIN, Lifecycle, _collect_garbage_often
from tests.mlx_clients import took_less_than, until


class Node:
    """So many requests, none of which ends by itself. Each begins when the one before it has been handed over."""

    name = "one@test"

    def __init__(self, requests=0):
        self._requests = requests
        self.followed = []

    def reload(self, settings):
        self.followed.append(settings.version)
        return True

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
    life._on_shutdown(worker)
    return celery_state.should_stop


def test_what_begins_only_after_a_node_has_begun_to_hand_over_is_handed_over_too(worker):
    life = Lifecycle(worker, Node(requests=3), grace=0.0)
    with took_less_than(HANDED_OVER_WITHIN - 1):
        life._end(0, asked=True)
        assert exit_code(life, worker) == 0


ASKED = (0, {"asked": True})
RESTARTED = (RESTART, {})


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        ([ASKED, RESTARTED], 0),
        ([RESTARTED, ASKED], 0),
        ([RESTARTED, (CONFIGURATION, {})], RESTART),
        ([ASKED, (1, {"asked": True})], 1),
    ],
)
def test_who_asks_a_node_to_end_says_with_which_exit_code_whatever_its_own_reasons_are(worker, reasons, code):
    life = Lifecycle(worker, Node(requests=1), grace=0.1)
    for exit_with, by in reasons:
        life._end(exit_with, **by)
    assert exit_code(life, worker) == code


def test_a_node_that_is_to_restart_ends_so_that_up_starts_it_again(worker):
    life = Lifecycle(worker, Node(), grace=0.0)
    life.restart()
    assert exit_code(life, worker) == RESTART


def test_of_two_reloads_at_once_the_one_that_has_read_the_newer_configuration_is_the_last(worker, monkeypatch):
    versions, newer_followed = iter(("older", "newer")), threading.Event()

    class Settings:
        def __init__(self):
            self.version = next(versions)

        def serving(self):
            """The older one is slow."""
            if self.version == "older":
                newer_followed.wait(0.3)

    monkeypatch.setattr(module, "Settings", Settings)
    node = Node()
    life = Lifecycle(worker, node, grace=0)
    with ThreadPoolExecutor(2) as pool:
        for reload in [pool.submit(life._reload) for _ in range(2)]:
            reload.add_done_callback(lambda _: newer_followed.set())
    assert node.followed == ["older", "newer"]


def test_what_a_node_has_in_memory_when_it_is_ready_is_left_out_of_garbage_collections():
    """Else a full collection is due only after so many new objects that failed tasks take 60 MB."""
    try:
        _collect_garbage_often()
        assert gc.get_freeze_count() > 10_000
        assert gc.get_count()[2] <= 1
    finally:
        gc.unfreeze()
