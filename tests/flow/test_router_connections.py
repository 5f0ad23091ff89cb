"""The connections of a router to the broker: four when it is idle, and one more for each thread that submits."""

import itertools
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from fleet_worker import Router, Settings
from fleet_worker.router.submitter import IDLE_AFTER
from tests.mlx_clients import HELLO, until

THREADS = 6
IDLE = 4
"""On RabbitMQ there are fewer."""


@pytest.fixture
def connections(broker):
    """Those that were opened since the test began."""
    before = broker.connections()
    return lambda: broker.connections() - before


@pytest.fixture
def unchecked(connections, broker):
    """A router that has connected, and sends any number of requests that nobody serves."""
    with Router(Settings(broker_url=broker.url, router={"max_waiting": 1_000_000})) as router:
        router.registry.require_offered = lambda *_: None
        yield router


def submit(router, model):
    with router.stream_chat(model, HELLO, timeout=20):
        pass  # what is left at once is cancelled


@contextmanager
def counted(connections):
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


@pytest.mark.rest
def test_a_router_holds_four_connections_and_one_for_each_thread_that_submits(connections, unchecked):
    model = f"m-{uuid.uuid4().hex[:8]}"
    until(lambda: len(connections()) <= IDLE, 5)
    with counted(connections) as counts, ThreadPoolExecutor(THREADS) as pool:

        def submit_for_a_while(_):
            for number in itertools.count():
                submit(unchecked, model)
                if number >= 50 and len(counts) >= 4:
                    return

        list(pool.map(submit_for_a_while, range(THREADS)))
    most = max(min(pair) for pair in itertools.pairwise(counts))
    assert IDLE < most <= IDLE + THREADS + 1, "one is for the thread that publishes the cancels"
    until(lambda: len(connections()) <= IDLE, 2 * IDLE_AFTER + 3)
    submit(unchecked, model)


def test_no_connection_is_opened_for_each_request(connections, unchecked):
    model = f"m-{uuid.uuid4().hex[:8]}"
    submit(unchecked, model)
    until(lambda: len(connections()) <= IDLE + 1, 5)
    before = connections()
    for _ in range(50):
        submit(unchecked, model)
    assert len(connections() - before) <= 1, "cancels are published at the same time"
