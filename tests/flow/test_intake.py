"""A node keeps to its lanes, whatever RabbitMQ does to them. (On Redis a lane is but a name.)"""

import time
import uuid

import pytest
from kombu import Queue

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import direct_lane, lane
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host, running_node
from tests.mlx_clients import until

HELLO = [{"role": "user", "content": "Hello"}]

pytestmark = [pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True), pytest.mark.both_brokers]


@pytest.fixture
def mlx():
    with SimulatedMLX(models=[f"kept-{uuid.uuid4().hex[:8]}"], token_interval=0.02, tokens=1000) as mlx:
        yield mlx


@pytest.fixture
def channel(broker):
    with create_app(Settings(broker_url=broker.url)).connection_for_write() as connection:
        yield connection.channel()


@pytest.mark.rest
def test_a_lane_that_is_refused_harms_no_other_and_is_joined_when_it_can_be(broker, channel, mlx, router):
    """As after an update that declares lanes in another way."""
    (model,) = mlx.models
    others = {lane("chat", model), direct_lane("kept@test")}
    refused = lane("stream_chat", model)
    old = Queue(refused, durable=False)(channel)
    old.declare()
    with running_host(broker.url, {"kept": {"base_url": mlx.base_url, "models": {model: {}}}}) as host:
        (offered,) = router.registry.wait_for(model, 20)
        assert router.chat(model, HELLO, max_tokens=1, timeout=10).node == "kept@test"
        assert set(offered.instance.lanes) <= others
        host["kept"].wait_for(f"lane {refused} cannot be joined", 5)
        old.delete()
        host["kept"].wait_for(f"lane {refused} is joined now", 10)
        with router.stream_chat(model, HELLO, max_tokens=5, timeout=10) as stream:
            assert len(list(stream)) == 5
        until(lambda: set(router.registry.offerings(model)[0].instance.lanes) == {*others, refused})
        assert host["kept"].output.count("cannot be joined") == 1


@pytest.fixture
def impatient(broker):
    """It closes the channel of who does not acknowledge a message for two seconds, instead of 30 minutes."""
    broker.set_env("consumer_timeout", 2_000)
    broker.set_env("channel_tick_interval", 500)
    yield broker
    broker.set_env("consumer_timeout", 1_800_000)
    broker.set_env("channel_tick_interval", 60_000)


@pytest.mark.rest
def test_a_channel_that_the_broker_closes_costs_no_token_and_no_lane(impatient, mlx):
    (model,) = mlx.models
    with (
        running_node(impatient.url, "kept@test", base_url=mlx.base_url, models={model: {}}) as node,
        Router(Settings(broker_url=impatient.url)) as router,
    ):
        with router.stream_chat(model, HELLO, max_tokens=200, timeout=30) as stream:
            text = "".join(delta.content for delta in stream)
        assert text == "".join(reply_tokens(HELLO, 200, tokens=1000))
        node.wait_for("PreconditionFailed", 5)
        assert router.chat(model, HELLO, max_tokens=1, timeout=10).node == "kept@test"


def test_a_lane_that_was_deleted_is_joined_again_within_a_second_and_what_runs_goes_on(broker, mlx, router):
    """Without a new connection, which would let RabbitMQ deliver again what runs."""
    (model,) = mlx.models
    slots = {"models": {model: {}}, "limits": {"concurrency": 2}}
    with running_node(broker.url, "kept@test", base_url=mlx.base_url, **slots) as node, mlx.held(at_token=3):
        with router.stream_chat(model, HELLO, max_tokens=5, timeout=30) as stream:
            next(stream)
            before = len(node.lines)
            broker.delete_queue(lane("chat", model))
            deleted = time.monotonic()
            until(lambda: any("Started consuming" in line for line in list(node.lines)[before:]), 10)
            assert time.monotonic() - deleted < 1.0
            mlx.release()
            assert router.chat(model, HELLO, max_tokens=1, timeout=10).node == "kept@test"
            list(stream)
        assert len(stream.response.attempts) == 1
        assert not [line for line in list(node.lines)[before:] if "is away" in line or "a second time" in line]
