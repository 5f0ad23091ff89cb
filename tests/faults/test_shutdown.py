"""A node obeys SIGTERM, whatever its broker does, and finishes what it has begun, or hands it over."""

import signal

import pytest

from fleet_worker import Router, Settings
from fleet_worker.protocol.reply import ChatResponse
from fleet_worker.simulator import SimulatedMLX, reply_tokens
from fleet_worker.testing import running_node
from tests.brokers import Valkey
from tests.callers import Caller
from tests.mlx_clients import took_less_than

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = "sim-chat"


@pytest.fixture
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT], token_interval=0.02, tokens=1000) as server:
        yield server


def test_a_stopping_node_delivers_what_is_running(broker, router, mlx):
    with running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}) as node:
        stream = router.stream_chat(CHAT, HELLO, max_tokens=100, timeout=30)
        begun = next(stream).content
        node.signal(signal.SIGTERM)
        rest = "".join(delta.content for delta in stream)
        assert begun + rest == stream.response.content == "".join(reply_tokens(HELLO, 100, tokens=1000))
        assert node.wait(20) == 0


def test_what_has_not_ended_after_its_grace_is_handed_over(broker, mlx):
    grace = {"FLEET_WORKER__DRAIN_GRACE": "0.5"}
    with (
        running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}, env=grace) as node,
        Caller(broker) as caller,
    ):
        running = caller.begin(CHAT)
        with took_less_than(5.0):
            node.signal(signal.SIGTERM)
            assert node.wait(20) == 0
        failure = caller.last(running)
        assert (failure.code, failure.retryable) == ("instance_unavailable", True)
        assert failure.message == "the node is being drained"
        mlx.wait_for(lambda mlx: mlx.counters["running"] == 0, 1)


def test_a_cancel_is_heard_while_a_node_ends(broker, mlx):
    with running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}) as node, Caller(broker) as caller:
        running = caller.begin(CHAT)
        node.signal(signal.SIGTERM)
        node.wait_for("leaves lane", 5)
        with took_less_than(5.0):
            caller.cancel((running, 1))
            assert node.wait(20) == 0
        assert caller.last(running).code == "cancelled"


@pytest.mark.rest
def test_a_node_that_ends_under_load_forgets_nothing(broker, mlx):
    """Each request is tried once, and some are on their way to the node when it leaves."""
    slots = {"base_url": mlx.base_url, "models": {CHAT: {}}, "limits": {"concurrency": 2}}
    with Caller(broker) as caller, running_node(broker.url, "two@test", **slots):
        with running_node(broker.url, "one@test", **slots) as node:
            requests = [caller.submit(CHAT, max_tokens=2) for _ in range(50)]
            while "one@test" not in {caller.node(each) for each in requests}:
                caller.last(requests[-1])
                requests += [caller.submit(CHAT, max_tokens=2) for _ in range(50)]
            node.signal(signal.SIGTERM)
            requests += [caller.submit(CHAT, max_tokens=2) for _ in range(50)]
            assert node.wait(20) == 0
        assert {type(caller.last(each)) for each in requests} == {ChatResponse}
        assert {caller.node(each) for each in requests} == {"one@test", "two@test"}


@pytest.mark.rest
def test_a_node_without_a_broker_obeys(mlx):
    with Valkey() as broker, running_node(broker.url, base_url=mlx.base_url, models={CHAT: {}}) as node:
        broker.stop()
        node.wait_for("is tried again", 20)
        node.signal(signal.SIGTERM)
        assert node.wait(20) == 0


@pytest.mark.rest
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
