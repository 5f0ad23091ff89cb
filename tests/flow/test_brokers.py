"""What the broker may do to us, and what we may do to it."""

import gc
import os
import socket
import threading
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from kombu import Consumer, Producer
from kombu.asynchronous import Hub

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import Publisher, hang_up, open_channel, receive
from fleet_worker.broker.topology import lane, lane_queue, priority, reply_name, reply_queue, transport_of
from fleet_worker.host.child_process import child, python
from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX, running_node
from tests.flow.conftest import CHAT, work
from tests.mlx_clients import until

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def paced(broker):
    """An instance whose answers take seconds. Its lanes are its own: a broker may deliver again what it lost."""
    model = f"paced-{uuid.uuid4().hex[:8]}"
    with (
        SimulatedMLX(models=[model], token_interval=0.02, tokens=1000) as mlx,
        running_node(broker.url, "paced@test", base_url=mlx.base_url, models={model: {}}),
    ):
        yield mlx


def test_a_broker_restart_under_a_running_stream_costs_no_token(paced, broker, router):
    with router.stream_chat(paced.models[0], HELLO, max_tokens=200, timeout=50) as stream:
        pieces = []
        for delta in stream:
            pieces.append(delta.content)
            if len(pieces) == 20:
                broker.stop()
                broker.start()
    assert "".join(pieces) == "".join(reply_tokens(HELLO, 200, tokens=1000))
    assert len(work(paced)) == 1
    # and the node lives on
    assert router.chat(paced.models[0], HELLO, max_tokens=1, timeout=50).node == "paced@test"
    assert len(work(paced)) == 2


@pytest.mark.both_brokers
def test_a_dropped_connection_runs_nothing_twice(paced, broker, router):
    with router.stream_chat(paced.models[0], HELLO, max_tokens=100, timeout=50) as stream:
        pieces = []
        for delta in stream:
            pieces.append(delta.content)
            if len(pieces) in (20, 60):
                broker.drop_connections()
    assert "".join(pieces) == "".join(reply_tokens(HELLO, 100, tokens=1000))
    assert router.chat(paced.models[0], HELLO, max_tokens=1, timeout=50).node == "paced@test"
    assert len(work(paced)) == 2


def test_former_connections_leave_nothing_in_the_event_loop(broker):
    """Or it would run the callbacks of all of them in each turn."""
    hub, app = Hub(), create_app(Settings(broker_url=broker.url))
    for _ in range(3):
        with app.connection_for_read() as connection:
            connection.transport.register_with_event_loop(connection.connection, hub)
    assert len(hub.on_tick) <= 1
    hub.close()


def test_nothing_keeps_a_connection_that_broke(broker):
    """Or each loss of the broker costs three open files."""
    with closing(create_app(Settings(broker_url=broker.url))) as app:
        connection = app.connection_for_read()
        channel = open_channel(connection)
        consumer = Consumer(channel, [reply_queue(reply_name("forgotten", 10.0))], on_message=print)
        consumer.consume()
        receive(connection, 0.2)
        broker.stop()
        broken = weakref.ref(channel)
        hang_up(connection)
        broker.start()
        del channel, consumer, connection
        gc.collect()
        assert broken() is None


@pytest.mark.both_brokers
def test_a_closed_router_leaves_no_connection_open(broker):
    before = open_files()
    assert from_eight_threads(Settings(broker_url=broker.url)) > before + 4
    until(lambda: open_files() <= before, 5)


def from_eight_threads(settings):
    """Send something from each at once; return how many files are open then."""
    together = threading.Barrier(8)

    def send(_):
        together.wait(10)
        with router.stream_chat("nobody", HELLO, timeout=10):
            pass

    with Router(settings) as router, ThreadPoolExecutor(8) as pool:
        router.registry.require_offered = lambda *_: None
        list(pool.map(send, range(8)))
        return open_files()


def open_files():
    gc.collect()  # kombu's poller of the reply queue is part of a cycle
    return len(os.listdir("/dev/fd"))


@pytest.mark.both_brokers
def test_what_is_given_back_is_taken_next(broker):
    """And not after all that has come since, or the router would take it for lost."""
    with closing(create_app(Settings(broker_url=broker.url))) as app, app.connection_for_write() as connection:
        channel, transport = connection.default_channel, transport_of(broker.url)
        queue = lane_queue(lane("chat", f"m-{uuid.uuid4().hex[:8]}"), transport)(channel)
        queue.declare()
        for sent in ("urgent", "first", "second"):
            level = priority("high" if sent == "urgent" else "normal", transport)
            Producer(channel, queue.exchange, queue.routing_key, serializer="json").publish(sent, priority=level)
        for given_back in ("urgent", "first"):
            queue.get().requeue()
            assert queue.get(no_ack=True).payload == given_back
        assert queue.get(no_ack=True).payload == "second"
        queue.delete()


def test_two_nodes_of_two_slots_hold_exactly_four_of_eight_tasks(broker):
    with SimulatedMLX(models=[CHAT]) as first, SimulatedMLX(models=[CHAT]) as second:
        slots = {"models": {CHAT: {}}, "limits": {"concurrency": 2}}
        with (
            running_node(broker.url, "one@test", base_url=first.base_url, **slots),
            running_node(broker.url, "two@test", base_url=second.base_url, **slots),
            Router(Settings(broker_url=broker.url)) as router,
            first.held(at_token=1),
            second.held(at_token=1),
            ThreadPoolExecutor(8) as pool,
        ):
            calls = [pool.submit(router.chat, CHAT, HELLO, timeout=30) for _ in range(8)]
            for mlx in (first, second):
                mlx.wait_for(lambda mlx: mlx.counters["running"] == 2, 20)
            for mlx in (first, second):
                with pytest.raises(TimeoutError):
                    mlx.wait_for(lambda mlx: mlx.counters["running"] > 2, 1)
            for mlx in (first, second):
                mlx.release()
            assert all(call.result(20).content for call in calls)


def test_what_a_node_still_owes_a_router_that_is_gone_expires(paced, broker):
    """The router dies without a word while its stream runs: the node goes on writing to its queue."""
    asking = (
        "import os; from fleet_worker import Router, Settings;"
        f"s = Router(Settings(broker_url='{broker.url}', router={{'reply_expires': 3}}))"
        f".stream_chat('{paced.models[0]}', {HELLO}, max_tokens=50, timeout=20); next(s); os._exit(0)"
    )
    with child("a router", python("-c", asking)) as router:
        assert router.wait(20) == 0
    paced.wait_for(lambda mlx: mlx.counters["disconnected"] or any(request.finished for request in work(mlx)), 20)
    assert broker.endless_reply_queues() == []


@pytest.mark.both_brokers
def test_a_lost_connection_is_never_opened_again_in_silence(broker):
    """Whoever publishes has to know, even if the broker is back before the next message: what it was sent before may
    be lost."""
    name = reply_name("test", 10)
    publisher = Publisher(create_app(Settings(broker_url=broker.url)).connection_for_write)
    with closing(publisher):
        for _ in range(2):
            publisher.publish(b"{}", routing_key=name, declare=reply_queue)
            broker.drop_connections()
            with pytest.raises(publisher.connection_errors):
                publisher.publish(b"{}", routing_key=name, declare=reply_queue)
            publisher.drop()
        publisher.publish(b"{}", routing_key=name, declare=reply_queue)


@pytest.mark.both_brokers
def test_no_socket_to_a_broker_waits_to_fill_a_packet(broker):
    """Nagle's algorithm costs 42 ms of the first token on a connection that is used again."""
    connection = create_app(Settings(broker_url=broker.url)).connection_for_write()
    with connection, connection.channel() as channel:
        if broker.name == "valkey":
            pooled = channel.pool.get_connection()
            nodelay = pooled._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            channel.pool.release(pooled)
        else:
            nodelay = connection.connection.transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert nodelay
