"""What waits in the lanes of a real fleet, as the broker tells it."""

import time
import uuid
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import redis

from fleet_worker import Router, Settings
from fleet_worker.broker import queue_depth as lane_depths
from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import MOST_LANES, SUBMITTED_AT, Waiting, waiting
from fleet_worker.broker.topology import direct_lane, lane, lane_queue, transport_of
from fleet_worker.ops.snapshot import SnapshotCollector
from fleet_worker.settings import REGISTRY
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.flow.test_readiness import wait_until

pytestmark = pytest.mark.both_brokers

LEVELS = ("critical", "high", "normal", "low")


@pytest.fixture
def model():
    """Its lanes are those of one test only."""
    return f"m-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def app(broker):
    with create_app(Settings(broker_url=broker.url)) as app:
        yield app


@pytest.fixture
def ask(app, broker):
    """What waits, by lane."""
    return lambda *lanes: waiting(app, transport_of(broker.url), lanes, timeout=25)


@contextmanager
def submitted(router, model, *levels, content="Hello", max_tokens=1):
    """Requests that nobody reads the answers of yet."""
    with ExitStack() as stack:
        for level in levels:
            messages = [{"role": "user", "content": content}]
            stack.enter_context(router.stream_chat(model, messages, priority=level, timeout=20, max_tokens=max_tokens))
        yield


@pytest.fixture(scope="module")
def unchecked(broker):
    """A router that asks nobody whether a model is served."""
    with Router(Settings(broker_url=broker.url)) as router:
        router.registry.require_offered = lambda *_: None
        yield router


def test_what_waits_is_counted_whatever_its_priority(unchecked, ask, model):
    name = lane("stream_chat", model)
    with submitted(unchecked, model, *LEVELS, "normal"):
        assert ask(name)[name].depth == 5


def test_the_oldest_of_all_priorities_tells_its_age_where_the_broker_shows_it(unchecked, ask, model, broker):
    """A message of RabbitMQ is seen by nobody but who takes it out."""
    name = lane("stream_chat", model)
    started = time.monotonic()
    with submitted(unchecked, model, "low", "critical"):
        first = ask(name)[name].oldest_age
        if broker.name == "rabbitmq":
            assert first is None
            return
        assert 0 <= first <= time.monotonic() - started
        before = time.monotonic()
        with submitted(unchecked, model, "low", "critical"):
            time.sleep(0.3)
            elapsed = time.monotonic() - before
            assert first + elapsed <= ask(name)[name].oldest_age < first + elapsed + 1


def test_a_request_says_when_this_attempt_was_submitted(unchecked, app, broker, model):
    """Beside the headers of Celery, on both brokers."""
    with submitted(unchecked, model, "normal"), app.connection_for_read() as connection:
        queue = lane_queue(lane("stream_chat", model), transport_of(broker.url))(connection.default_channel)
        message = queue.get(no_ack=True)
    assert message.headers["task"] == "fleet.stream_chat"
    assert message.headers[SUBMITTED_AT] == pytest.approx(time.time(), abs=10)


def test_what_another_make_of_router_sends_has_no_age(app, broker, ask, model):
    name, transport = lane("chat", model), transport_of(broker.url)
    with app.connection_for_write() as connection:
        queue = lane_queue(name, transport)
        for headers in ({}, {SUBMITTED_AT: "a while ago"}, {"other": f'"{SUBMITTED_AT}": 1.0'}):
            producer = connection.Producer(serializer="json")
            producer.publish({}, routing_key=name, exchange=queue.exchange, declare=[queue], headers=headers)
    assert ask(name)[name].depth == 3
    assert ask(name)[name].oldest_age is None


@any_broker
def test_no_prompt_leaves_the_broker(unchecked, ask, model, broker):
    """On RabbitMQ a passive declaration brings numbers only."""
    name = lane("stream_chat", model)
    with redis.Redis.from_url(broker.url) as client, submitted(unchecked, model, *LEVELS, content="x" * 500_000):
        before = client.info("stats")["total_net_output_bytes"]
        assert ask(name)[name].depth == 4
        assert client.info("stats")["total_net_output_bytes"] - before < 100_000


def test_lanes_that_nobody_named_are_known_on_redis(unchecked, ask, model, broker):
    with submitted(unchecked, model, "normal"):
        held = ask().get(lane("stream_chat", model))
        assert (held and held.depth) == {"valkey": 1, "rabbitmq": None}[broker.name]


def test_a_lane_that_does_not_exist_is_empty_and_the_next_one_is_asked_all_the_same(unchecked, ask, model, broker):
    name = lane("stream_chat", model)
    with submitted(unchecked, model, "normal"):
        held = ask("llm.fleet.chat.a-never-used", name, "llm.fleet.zzz.never-used")
        consumers = {"valkey": None, "rabbitmq": 0}[broker.name]
        for missing in ("llm.fleet.chat.a-never-used", "llm.fleet.zzz.never-used"):
            assert held[missing] == Waiting(0, None, consumers)
        assert held[name].depth == 1


def test_no_more_lanes_are_looked_at_than_is_good_and_those_of_models_first(ask):
    of_models = [f"llm.fleet.chat.many-{number:04}" for number in range(MOST_LANES - 50)]
    of_nodes = [direct_lane(f"many-{number:04}@test") for number in range(100)]
    held = ask(*of_nodes, *of_models)
    assert len(held) == MOST_LANES
    assert held.keys() >= set(of_models)


def test_lanes_that_there_is_no_time_for_are_left_out(ask, broker, monkeypatch):
    """By a clock that jumps 10 seconds at each look: there is time for two."""
    clock = SimpleNamespace(monotonic=partial(next, count(0, 10)), time=time.time)
    monkeypatch.setattr(lane_depths, "time", clock)
    names = [f"llm.fleet.chat.many-{number:04}" for number in range(500)]
    assert len(ask(*names)) == {"valkey": 2 * lane_depths.BATCH, "rabbitmq": 2}[broker.name]


# --- With a host -----------------------------------------------------------------------------------------------------

QUICK = {"FLEET_WORKER__CANARY_INTERVAL": "1", "FLEET_REGISTRY__READINESS_INTERVAL": "1"}


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=["slow"], token_interval=0.05, tokens=1000) as server:
        yield server


@pytest.fixture(scope="module")
def host(broker, mlx):
    instances = {"one": {"base_url": mlx.base_url, "models": {"slow": {}}}}
    with running_host(broker.url, instances, env=QUICK) as processes:
        yield processes


@pytest.fixture
def camera(host, broker, router):
    with closing(SnapshotCollector(Settings(broker_url=broker.url), router.registry)) as camera:
        wait_until(lambda: any(each.ready for each in camera.take().instances))
        yield camera


@pytest.fixture
def another_camera(broker, router):
    with closing(SnapshotCollector(Settings(broker_url=broker.url), router.registry)) as camera:
        yield camera


def seen_lane(camera, name):
    return next(each for each in camera.take().lanes if each.lane == name)


def test_the_lane_of_a_busy_node_fills_and_empties(camera, router, mlx, broker):
    """One slot: what runs does not wait, and what waits is served."""
    name = lane("stream_chat", "slow")
    assert (seen_lane(camera, name).depth, seen_lane(camera, name).nodes) == (0, 1)
    with ExitStack() as running:
        running.enter_context(submitted(router, "slow", "normal", max_tokens=1000))
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 1, 10)
        with submitted(router, "slow", *LEVELS):
            busy = seen_lane(camera, name)
            assert (busy.depth, busy.nodes, busy.unserved) == (4, 1, False)
            assert (busy.oldest_age is None) == (broker.name == "rabbitmq")
            running.close()
            wait_until(lambda: seen_lane(camera, name).depth == 0, 20)
    assert seen_lane(camera, name).oldest_age is None


def test_a_lane_whose_only_node_has_left_it_is_seen_as_served_by_nobody(camera, another_camera, router, mlx):
    """Also by who comes later, and has never seen it served."""
    name = lane("stream_chat", "slow")
    mlx.kill()
    try:
        wait_until(lambda: not camera.take().instances[0].ready)
        with submitted(router, "slow", "normal", "low"):
            wait_until(lambda: seen_lane(another_camera, name).depth == 2)
            assert (seen_lane(another_camera, name).nodes, seen_lane(another_camera, name).unserved) == (0, True)
            seen = camera.take()
            assert (seen.instances[0].status, seen.instances[0].lanes) == ("unavailable", ())
            assert seen.models[0].ready is False
            mlx.restart()
            wait_until(lambda: not seen_lane(camera, name).unserved, 20)
    finally:
        if not mlx._thread.is_alive():
            mlx.restart()


def test_the_lanes_of_a_host_that_has_vanished_are_remembered(camera, router, monkeypatch):
    name = lane("stream_chat", "slow")
    assert seen_lane(camera, name)
    monkeypatch.setattr(router.registry, "_instances", {})
    assert camera.take().instances == []
    assert seen_lane(camera, name)


def test_the_beats_of_registry_nodes_are_no_requests(camera, ask, host):
    registry = direct_lane(f"{REGISTRY}@test")
    assert registry not in ask(registry)
    assert not any(REGISTRY in each.lane for each in camera.take().lanes)
