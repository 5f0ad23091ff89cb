"""How long a request waits for a node, and what its caller is told when none takes it."""

import time
import uuid

import pytest

from fleet_worker import QueueTimeout, Router, Settings
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.flow.conftest import work
from tests.mlx_clients import took_less_than, until

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def model():
    return f"queued-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def mlx(model):
    with SimulatedMLX(models=[model], token_interval=0.002) as server:
        yield server


@pytest.fixture
def host(broker, mlx, model):
    instance = {"base_url": mlx.base_url, "models": {model: {}}}
    with running_host(broker.url, {"one": instance}, env={"FLEET_WORKER__CANARY_INTERVAL": "1"}) as processes:
        yield processes


def test_a_request_for_a_model_whose_instances_are_all_away_says_since_when(host, mlx, broker, model):
    with Router(Settings(broker_url=broker.url, router={"queue_timeout": 1.0})) as router:
        router.registry.wait_for(model, 10)
        mlx.kill()
        until(lambda: router.registry.offerings(model, ready=False), 10)
        went = time.monotonic()
        time.sleep(1)
        with took_less_than(4), pytest.raises(QueueTimeout, match="nobody has served chat of that model for") as caught:
            router.chat(model, HELLO, timeout=60)
        assert 2 <= caught.value.metadata["away_for"] <= time.monotonic() - went + 2
        with took_less_than(3), pytest.raises(QueueTimeout):
            list(router.stream_chat(model, HELLO, timeout=60, queue_timeout=0.3))
        mlx.restart()
        assert router.chat(model, HELLO, max_tokens=1, timeout=20, queue_timeout=20).node == "one@test"
        assert len(work(mlx)) == 1  # what has waited for too long was cancelled in its lane


@any_broker
@pytest.mark.rest
def test_a_stream_whose_only_server_is_dead_ends_with_why_before_its_deadline(host, mlx, broker, model):
    with Router(Settings(broker_url=broker.url, router={"absent_timeout": 2.0})) as router:
        router.registry.wait_for(model, 10)
        with mlx.held(at_token=3), router.stream_chat(model, HELLO, max_tokens=5, timeout=60) as stream:
            assert next(stream)
            mlx.kill()
            with took_less_than(30), pytest.raises(QueueTimeout, match=r"router\.absent_timeout") as caught:
                list(stream)
        assert "its only instance is unavailable" in caught.value.message
        assert [each["node"] for each in caught.value.metadata["attempts"]] == ["one@test", None]


@pytest.mark.rest
def test_a_lane_that_is_too_slow_is_left_and_its_work_never_starts(host, mlx, broker, model):
    with Router(Settings(broker_url=broker.url)) as router:
        router.registry.wait_for(model, 10)
        with mlx.held(at_token=1), router.stream_chat(model, HELLO, max_tokens=5, timeout=60) as running:
            next(running)
            with took_less_than(3), pytest.raises(QueueTimeout, match="busy") as caught:
                router.chat(model, HELLO, timeout=60, queue_timeout=0.5)
            assert caught.value.metadata["away_for"] == 0.0
            mlx.release()
            assert list(running)  # which has a node, and no limit to its wait
        assert router.chat(model, HELLO, max_tokens=1, timeout=20).node == "one@test"
        assert len(work(mlx)) == 2


@pytest.mark.rest
def test_what_nobody_waits_for_does_not_start_though_its_node_was_away_when_it_was_cancelled(broker, mlx, model):
    """The node that comes back has heard of no cancel, so it asks."""
    instance = {"base_url": mlx.base_url, "models": {model: {}}}
    with Router(Settings(broker_url=broker.url, router={"queue_timeout": 0.5})) as router:
        for _ in range(3):
            with pytest.raises(QueueTimeout, match="no host reports a node"):
                router.chat(model, HELLO, max_tokens=5, timeout=60)
        stream = router.stream_chat(model, HELLO, max_tokens=5, timeout=60, queue_timeout=60)
        with stream, running_host(broker.url, {"one": instance}):
            assert len([delta for delta in stream if delta.content]) == 5
            assert router.chat(model, HELLO, max_tokens=1, timeout=20, queue_timeout=20).node == "one@test"
            assert len(work(mlx)) == 2
