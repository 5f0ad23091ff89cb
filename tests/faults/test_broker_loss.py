"""The broker is lost again and again in the middle of streams: restarted, killed, its connections dropped."""

import base64
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import redis

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.faults import place_of
from fleet_worker.broker.topology import cancel_exchange, reply_name
from fleet_worker.host.child_process import child, python
from fleet_worker.node import replay_buffer
from fleet_worker.node.reply_publisher import ReplyPublisher
from fleet_worker.protocol.reply import Delta
from fleet_worker.protocol.request import ControlMessage
from fleet_worker.registry.view import Registry
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, running_host, running_node, worker_toml
from tests.brokers import Valkey
from tests.flow.conftest import work
from tests.mlx_clients import until

STREAMS = 8


def restart(broker):
    broker.stop()
    broker.start()


def kill(broker):
    broker.kill()
    broker.start()


def drop(broker):
    broker.drop_connections()


LOSSES = {"valkey": [restart, drop, kill, drop] * 2, "rabbitmq": [drop, drop, kill, drop]}
"""RabbitMQ takes five seconds to start."""


@pytest.fixture
def mlx():
    model = f"steady-{uuid.uuid4().hex[:8]}"
    with SimulatedMLX(models=[model], token_interval=0.02, tokens=100_000) as mlx:
        yield mlx


@pytest.mark.rest
def test_streams_of_a_broker_that_is_lost_again_and_again_lose_and_repeat_no_token(broker, mlx, router):
    (model,), over = mlx.models, threading.Event()

    def stream(number):
        """Read until the losses are over, and then some more."""
        asked, pieces, more = [{"role": "user", "content": f"Hello {number}"}], [], 20
        with router.stream_chat(model, asked, max_tokens=5_000, timeout=100) as stream:
            while more:
                pieces.append(next(stream).content)
                more -= over.is_set()
        assert pieces == reply_tokens(asked, 5_000, tokens=100_000)[: len(pieces)]

    slots = {"models": {model: {}}, "limits": {"concurrency": STREAMS}}
    with running_node(broker.url, "steady@test", base_url=mlx.base_url, **slots), ThreadPoolExecutor(STREAMS) as pool:
        streams = [pool.submit(stream, number) for number in range(STREAMS)]
        mlx.wait_for(lambda mlx: mlx.counters["running"] == STREAMS, 20)
        for lose in LOSSES[broker.name]:
            time.sleep(0.5)
            lose(broker)
        over.set()
        for each in streams:
            each.result(60)
        assert len(work(mlx)) == STREAMS


@pytest.mark.rest
def test_a_node_takes_work_again_within_three_seconds_of_the_broker(mlx):
    """However long the broker was away."""
    (model,) = mlx.models
    asked = [{"role": "user", "content": "Hello"}]
    with (
        Valkey() as broker,
        running_node(broker.url, "steady@test", base_url=mlx.base_url, models={model: {}}),
    ):
        broker.stop()
        time.sleep(6.5)
        broker.start()
        with Router(Settings(broker_url=broker.url)) as router:
            assert router.chat(model, asked, max_tokens=1, timeout=3).node == "steady@test"


@pytest.mark.rest
def test_what_nobody_has_read_survives_any_number_of_losses(monkeypatch):
    monkeypatch.setattr(replay_buffer, "REPLAY_WINDOW", 1.5)
    frames = []
    name = reply_name("test", 60)
    with Valkey() as broker:
        app = create_app(Settings(broker_url=broker.url))
        inbox = ReplyConsumer(
            app.connection_for_read, broker.url, name, lambda node, frame: frames.append(frame), Registry()
        )
        sender = ReplyPublisher(app.connection_for_write, "n@h", max_pending=100)
        with closing(sender), sender.reply("r", 1, name) as answer:
            answer.accept(instance="i", queue_wait=0.0)
            answer.put([Delta(content="x")], 1)
            until(lambda: broker.has(name))
            broker.stop()
            time.sleep(2.0)
            broker.start()
            until(lambda: broker.has(name))
            restart(broker)
            until(lambda: broker.has(name))
            inbox.start(5)
            with closing(inbox):
                until(lambda: {frame.seq for frame in frames if frame.kind != "alive"} == {0, 1})


@pytest.mark.rest
def test_a_message_that_never_arrived_comes_again_and_nobody_notices(mlx):
    """Redis gives a message to whoever takes it, and forgets it."""
    (model,), asked = mlx.models, [{"role": "user", "content": "Hello"}]
    with (
        Valkey() as broker,
        running_node(broker.url, "steady@test", base_url=mlx.base_url, models={model: {}}),
        Router(Settings(broker_url=broker.url)) as router,
        redis.Redis.from_url(broker.url) as thief,
    ):
        with router.stream_chat(model, asked, max_tokens=300, timeout=30) as stream:
            pieces = [next(stream).content for _ in range(20)]
            for _ in range(3):
                assert thief.brpop([router._session.replies.name], timeout=5)
                pieces += [next(stream).content for _ in range(20)]
            pieces += [delta.content for delta in stream]
        assert pieces == reply_tokens(asked, 300, tokens=100_000)
        assert [attempt.error for attempt in stream.response.attempts] == [None]
        assert len(work(mlx)) == 1


def test_a_router_that_was_cut_off_asks_for_what_it_missed():
    with Valkey() as broker, Router(Settings(broker_url=broker.url)) as router:
        name = router._connected().replies.name
        with redis.Redis.from_url(broker.url) as client, client.pubsub() as notices:
            notices.psubscribe(f"*{cancel_exchange().name}*")
            notices.get_message(timeout=5)
            broker.drop_connections()
            heard = notices.get_message(timeout=10)
        assert ControlMessage.decode(base64.b64decode(json.loads(heard["data"])["body"])).missed == name


CLUMSY = """
import sys
import fleet_worker.celery
import kombu.transport.redis as redis
register, calls = redis.Transport.register_with_event_loop, []
def clumsy(*args):
    calls.append(args)
    if len(calls) == 2:
        raise AttributeError("'NoneType' object has no attribute 'fileno'")
    register(*args)
    print("registered", len(calls), flush=True)
redis.Transport.register_with_event_loop = clumsy
from celery.__main__ import main
sys.argv[:1] = "celery -A fleet_worker worker -n".split()
main()
"""


@pytest.mark.rest
@pytest.mark.parametrize("name", ["clumsy@test", "registry@test"])
def test_a_connection_that_breaks_while_it_is_set_up_does_not_end_a_node(name, mlx, tmp_path):
    """Celery and py-amqp then raise what they meet: the socket is None by now."""
    config = tmp_path / "worker.toml"
    config.write_text(worker_toml("clumsy", {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}}), "utf-8")
    with Valkey() as broker:
        environment = {"FLEET_CONFIG": str(config), "FLEET_STATE_DIR": str(tmp_path), "FLEET_BROKER_URL": broker.url}
        with child(name, python("-c", CLUMSY, name), environment) as node:
            node.wait_for("is ready", 30)
            deadline = time.monotonic() + 20
            while "registered 3" not in node.output and time.monotonic() < deadline:  # the second has failed
                broker.drop_connections()
                time.sleep(0.5)
            node.wait_for("registered 3", 15)
            assert not node.ended


@pytest.mark.rest
def test_the_log_of_a_host_tells_once_that_its_broker_is_away_and_once_that_it_is_back(mlx):
    with Valkey() as broker:
        instances = {"local": {"base_url": mlx.base_url, "models": {mlx.models[0]: {}}}}
        often = {"FLEET_REGISTRY__READINESS_INTERVAL": "1"}
        with running_host(broker.url, instances, env=often) as processes:
            processes["registry"].wait_for("is ready", 20)
            broker.stop()
            for process in processes.values():
                process.wait_for(f"the broker at {place_of(broker.url)} is away", 20)
            time.sleep(5)  # Celery tries every two seconds
            broker.start()
            for name, process in processes.items():
                process.wait_for(f"/{name}@test] the broker at {place_of(broker.url)} is back after ", 20)
                assert process.output.count(f"the broker at {place_of(broker.url)} is away") == 1
                for noise in ("Cannot connect", "PendingDeprecation", "Task registry.", " s now", "redis://"):
                    assert noise not in process.output.partition("connected to the broker")[2], noise
