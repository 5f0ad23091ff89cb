"""The connections of a router to the broker: three when it is idle, and one more for each thread that submits."""

import itertools
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fleet_worker.router.submitter import IDLE_AFTER
from tests.clients import HELLO, until

pytestmark = pytest.mark.both_brokers
THREADS = 6


@pytest.fixture
def connections(broker):
    """Those that were opened since the test began."""
    before = broker.connections()
    return lambda: broker.connections() - before


@pytest.fixture
def unchecked(connections, router):
    """A router that has connected, and sends also what nobody serves."""
    router.registry.require_offered = lambda *_: None
    return router


def submit(router, model):
    with router.stream_chat(model, HELLO, timeout=20):
        pass  # what is left at once is cancelled


@contextmanager
def most_of(connections):
    """Count all the time; yields the counts. A connection that is being closed is counted once, so look at pairs."""
    counts, ended = [], threading.Event()

    def count():
        while not ended.is_set():
            counts.append(len(connections()))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield counts
    finally:
        ended.set()
        thread.join()


def test_a_router_holds_three_connections_and_one_for_each_thread_that_submits(connections, unchecked):
    model = f"m-{uuid.uuid4().hex[:8]}"
    assert len(connections()) <= 3
    with most_of(connections) as counts, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda _: [submit(unchecked, model) for _ in range(150)], range(THREADS)))
    most = max(min(pair) for pair in itertools.pairwise(counts))
    assert 3 < most <= 3 + THREADS + 1, "one is for the thread that publishes the cancels"
    until(lambda: len(connections()) <= 3, 2 * IDLE_AFTER + 3)
    submit(unchecked, model)


def test_no_connection_is_opened_for_each_request(connections, unchecked):
    model = f"m-{uuid.uuid4().hex[:8]}"
    submit(unchecked, model)
    before = connections()
    for _ in range(50):
        submit(unchecked, model)
    assert len(connections() - before) <= 1, "cancels are published at the same time"
