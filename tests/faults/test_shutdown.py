"""A node obeys SIGTERM, whatever its broker does, and finishes what it has begun."""

import signal

import pytest

from fleet_worker import Router, Settings
from fleet_worker.simulator import SimulatedMLX, reply_tokens
from fleet_worker.testing import running_node
from tests.brokers import Valkey

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "sim-chat"


@pytest.fixture
def mlx():
    with SimulatedMLX(models=[CHAT], token_interval=0.02, tokens=1000) as server:
        yield server


def test_a_stopping_node_delivers_what_is_running(broker, router, mlx):
    with running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}) as node:
        stream = router.stream_chat(CHAT, HELLO, max_tokens=100, timeout=30)
        begun = next(stream).content
        node.signal(signal.SIGTERM)
        rest = "".join(delta.content for delta in stream)
        assert begun + rest == stream.response.content == "".join(reply_tokens(HELLO, 100, tokens=1000))
        assert node.wait(20) == 0


def test_a_node_without_a_broker_obeys(mlx):
    with Valkey() as broker, running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}) as node:
        broker.stop()
        node.wait_for("Trying again", 20)
        node.signal(signal.SIGTERM)
        assert node.wait(20) == 0
        broker.start()


def test_a_node_whose_broker_is_frozen_obeys_when_its_work_is_done(mlx):
    with (
        Valkey() as broker,
        running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}) as node,
        Router(Settings(broker_url=broker.url)) as router,
    ):
        next(router.stream_chat(CHAT, HELLO, max_tokens=100, timeout=30))
        broker.signal(signal.SIGSTOP)
        node.signal(signal.SIGTERM)
        assert node.wait(40) == 0
        assert work_of(mlx).finished
        broker.signal(signal.SIGCONT)


def work_of(mlx):
    return next(request for request in mlx.requests if request.method == "POST")
