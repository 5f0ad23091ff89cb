"""Lanes that fill: in which order a busy node takes what waits, and what is too much."""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest

from fleet_worker import FleetSaturated, Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import lane, lane_queue, transport_of
from fleet_worker.router.admission import ASK_EVERY_FAR, Admission
from fleet_worker.router.submitter import Submitter
from fleet_worker.testing import SimulatedMLX, running_node
from tests.envelopes import request_of
from tests.flow.conftest import work
from tests.mlx_clients import took_less_than, until

HELLO = [{"role": "user", "content": "Hello"}]
MODEL = "one-slot"
LANE = lane("stream_chat", MODEL)


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(models=[MODEL], token_interval=0.02, tokens=1000) as server:
        yield server


@pytest.fixture(scope="module")
def node(broker, mlx):
    with running_node(broker.url, "one@test", base_url=mlx.base_url, models={MODEL: {}}) as process:
        yield process


@pytest.fixture
def admission_of(broker):
    """What a router of its own would know of the lanes."""
    with ExitStack() as stack:
        app, transport = stack.enter_context(create_app(Settings(broker_url=broker.url))), transport_of(broker.url)
        submitter = stack.enter_context(closing(Submitter(app, transport)))
        yield lambda most: Admission(submitter.producer, transport, max_waiting=most)


@pytest.fixture(scope="module")
def unchecked(broker):
    """A router that asks nobody whether a model is served."""
    with Router(Settings(broker_url=broker.url)) as router:
        router.registry.require_offered = lambda *_: None
        yield router


@contextmanager
def busy(router, mlx):
    """The only slot is taken until the server releases this stream."""
    with mlx.held(at_token=10), router.stream_chat(MODEL, HELLO, max_tokens=50, timeout=30) as stream:
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 1, 20)
        yield stream


def test_what_is_more_urgent_is_taken_first(node, mlx, router):
    levels = ["low", "normal", "critical", "high", "normal", "low", "high", "critical"]
    before = len(work(mlx))
    with busy(router, mlx), ExitStack() as stack:
        streams = [
            stack.enter_context(
                router.stream_chat(MODEL, [{"role": "user", "content": level}], priority=level, max_tokens=1)
            )
            for level in levels
        ]
        mlx.release()
        for stream in streams:
            assert list(stream)
    taken = [request.body["messages"][0]["content"] for request in work(mlx)[before + 1 :]]
    assert taken == ["critical", "critical", "high", "high", "normal", "normal", "low", "low"]


def test_a_full_lane_takes_no_more_until_there_is_room(node, mlx, router, admission_of):
    """Nothing of what waits in it already is touched."""
    admission = admission_of(3)
    with busy(router, mlx), ExitStack() as stack:
        streams = []
        for _ in range(3):
            admission.admit(LANE)
            streams.append(stack.enter_context(router.stream_chat(MODEL, HELLO, max_tokens=10, timeout=30)))
        with took_less_than(1), pytest.raises(FleetSaturated) as caught:
            admission.admit(LANE)
        assert caught.value.metadata["retry_after"] > 0
        assert admission.depth(LANE) == 3
        mlx.release()
        for stream in streams:
            assert len([delta.content for delta in stream if delta.content]) == 10
            admission.accepted(LANE, stream.response.timings.queue_wait, "normal", 0.0)
    admission.admit(LANE)
    assert admission.depth(LANE) == 0


def test_a_router_refuses_what_is_too_much_before_it_is_sent(node, mlx, broker):
    with (
        Router(Settings(broker_url=broker.url, router={"max_waiting": 2})) as router,
        busy(router, mlx) as running,
        ExitStack() as stack,
    ):
        options = {"max_tokens": 1, "timeout": 30}
        waiting = [stack.enter_context(router.stream_chat(MODEL, HELLO, **options)) for _ in range(2)]
        with took_less_than(1), pytest.raises(FleetSaturated) as caught:
            router.stream_chat(MODEL, HELLO, **options).__enter__()
        assert caught.value.metadata["retry_after"] > 0
        mlx.release()
        for stream in [running, *waiting]:
            assert list(stream)
        assert list(router.stream_chat(MODEL, HELLO, **options))


@pytest.mark.rest
def test_a_message_that_vanished_is_missed_in_a_lane_that_is_never_empty(node, mlx, broker):
    patient = {"accept_timeout": 1.0}
    with (
        Router(Settings(broker_url=broker.url, router=patient)) as router,
        busy(router, mlx),
        ThreadPoolExecutor(4) as pool,
    ):
        lost = pool.submit(lambda: router.chat(MODEL, HELLO, max_tokens=1, timeout=20))
        with create_app(Settings(broker_url=broker.url)) as app, app.connection_for_read() as connection:
            waiting = lane_queue(lane("chat", MODEL), transport_of(broker.url))(connection.default_channel)
            until(lambda: waiting.get(no_ack=True))
        mlx.release()
        over = threading.Event()

        def crowd():
            while not over.is_set():
                router.chat(MODEL, HELLO, max_tokens=10, timeout=20)

        crowds = [pool.submit(crowd) for _ in range(3)]
        try:
            assert [attempt.error for attempt in lost.result(15).attempts] == ["node_lost", None]
        finally:
            over.set()
        assert [each.result(20) for each in crowds] == [None] * 3


def test_what_other_routers_send_counts_too(unchecked, admission_of):
    model = f"m-{uuid.uuid4().hex[:8]}"
    admission, name = admission_of(4), lane("chat", model)
    admission.admit(name)
    fill(unchecked, model, 4)
    time.sleep(ASK_EVERY_FAR)  # until it asks again
    with pytest.raises(FleetSaturated):
        admission.admit(name)


@pytest.mark.both_brokers
def test_a_lane_that_nobody_has_ever_used_is_empty(admission_of):
    admission, name = admission_of(1), lane("chat", f"m-{uuid.uuid4().hex[:8]}")
    assert admission.depth(name) == 0
    admission.admit(name)
    assert admission.depth(name) == 0


@pytest.mark.both_brokers
def test_room_is_expected_by_how_fast_the_lane_is_served(unchecked, broker, admission_of):
    """Messages are taken out at a pace of our own, as nodes would take them."""
    model = f"m-{uuid.uuid4().hex[:8]}"
    admission, name = admission_of(5), lane("chat", model)
    fill(unchecked, model, 6)
    admission.accepted(name, 12.0, "normal", 0.0)
    with pytest.raises(FleetSaturated) as caught:
        admission.admit(name)
    assert caught.value.metadata["retry_after"] == 4.0
    with create_app(Settings(broker_url=broker.url)) as app, app.connection_for_read() as connection:
        queue = lane_queue(name, transport_of(broker.url))(connection.default_channel)
        for _ in range(3):
            queue.get(no_ack=True)
    until(lambda: admits(admission, name))


@pytest.mark.both_brokers
def test_a_lost_connection_costs_one_answer(unchecked, broker, admission_of):
    model = f"m-{uuid.uuid4().hex[:8]}"
    admission, name = admission_of(2), lane("chat", model)
    fill(unchecked, model, 2)
    assert not admits(admission, name)
    broker.drop_connections()
    assert admission.depth(name) in (None, 2)
    assert admission.depth(name) == 2


def fill(router, model, number):
    for _ in range(number):
        request = request_of(router, "chat", model, messages=HELLO, timeout=60)
        request = request.addressed_to("llm.fleet.reply.test.1")
        router._connected().submitter.submit(request, lane("chat", model), patience=2.0)


def admits(admission, name):
    try:
        admission.admit(name)
    except FleetSaturated:
        return False
    return True
