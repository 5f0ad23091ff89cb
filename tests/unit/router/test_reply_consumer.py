"""How many messages one read takes. What is read: `tests/unit/node/test_reply_publisher.py`."""

import queue
import time
from contextlib import contextmanager

import pytest

from fleet_worker.broker import replies
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import reply_name
from fleet_worker.protocol.reply import Accepted, Reply
from fleet_worker.registry.view import Registry
from fleet_worker.router import reply_consumer
from fleet_worker.router.reply_consumer import ReplyConsumer
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker

GAP = 0.4


@pytest.fixture
def reading(monkeypatch):
    """Yields a function that takes how many requests are in flight, and returns one that sends frames to their router,
    and one that returns when the next frame came, and in which read."""
    monkeypatch.setattr(reply_consumer, "GAP_PER_REQUEST", GAP / 2)
    monkeypatch.setattr(reply_consumer, "SHORTEST_GAP", GAP)
    monkeypatch.setattr(reply_consumer, "LONGEST_GAP", GAP)
    with embedded_broker() as url, create_app(Settings(broker_url=url)) as app:
        arrived, reads = queue.SimpleQueue(), []

        @contextmanager
        def counted(together):
            reads.append(None)
            with together():
                yield

        def start(in_flight):
            consumer = ReplyConsumer(
                app.connection_for_read,
                url,
                reply_name("test", 60),
                lambda node, frame: arrived.put((time.monotonic(), len(reads))),
                Registry(),
                in_flight=lambda: in_flight,
            )
            together = consumer.wakeups.together
            consumer.wakeups.together = lambda: counted(together)
            consumers.append(consumer)
            consumer.start(5)
            sender = replies.sender_on(app.connection_for_write().default_channel)

            def send():
                frame = Accepted(id="r", attempt=1, seq=0, instance="i", queue_wait=0.0)
                sender.send(consumer.name, Reply(v=2, node="n", frames=[frame]).encode())
                sender.confirm()

            return send, lambda: arrived.get(timeout=10)

        consumers = []
        yield start
        for consumer in consumers:
            consumer.close()


def test_with_many_requests_one_read_takes_what_came_in_the_gap_after_the_last(reading):
    send, read = reading(in_flight=10)
    send()
    first_at, first_read = read()
    for _ in range(3):
        send()
    rest = [read() for _ in range(3)]
    assert {number for _, number in rest} == {first_read + 1}
    assert rest[0][0] - first_at >= 0.9 * GAP


@pytest.mark.parametrize(("in_flight", "pause"), [(1, 0.0), (10, GAP)])
def test_a_lone_answer_and_what_comes_after_a_pause_are_read_at_once(reading, in_flight, pause):
    send, read = reading(in_flight)
    send()
    read()
    time.sleep(pause)
    began = time.monotonic()
    send()
    assert read()[0] - began < GAP / 2
