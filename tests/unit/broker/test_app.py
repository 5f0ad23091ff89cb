"""The Celery application: how it sends tasks and events."""

import json

import pytest
from kombu import Connection

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import ANSWER_WITHIN


class BrokenProducer:
    """kombu's, on a connection that was just lost: with `retry` it would open that again."""

    def __init__(self):
        self.retries = []

    def publish(self, *_, retry, **__):
        self.retries.append(retry)
        raise ConnectionResetError


@pytest.fixture
def dispatcher():
    app = create_app(Settings(broker_url="redis://127.0.0.1:1/0"), is_node=True)
    with Connection("memory://") as connection:
        yield app.events.Dispatcher(connection, hostname="local@mini")


def test_an_event_never_opens_the_connection_that_the_consumer_reads_from(dispatcher):
    """Celery asks for that with the event that a worker is online; the node would be deaf for ever."""
    dispatcher.producer = producer = BrokenProducer()
    dispatcher.send("worker-online", retry=True)
    assert producer.retries == [False]


def test_an_event_that_was_not_sent_waits_for_the_next_connection(dispatcher):
    dispatcher.producer = BrokenProducer()
    dispatcher.send("worker-online", retry=True)
    assert [routing_key for _, routing_key in dispatcher._outbound_buffer] == ["worker.online"]


def test_events_are_sent_on_the_channel_that_is_open_already(dispatcher):
    assert dispatcher.producer.channel is dispatcher.connection.default_channel


def test_a_task_is_sent_as_compact_json_in_utf_8():
    """Escaped, these characters would take twice to three times as many bytes."""
    args = [{"text": "\u4f60\u597d \U0001f600 \u00e4", "big": 10**40}]
    with create_app(Settings()) as app:
        app.conf.broker_url = "memory://"
        with app.connection_for_write() as connection:
            queue = connection.SimpleQueue("lane")
            options = {"queue": queue.queue, "exchange_type": "direct", "connection": connection, "retry": False}
            app.send_task("fleet.chat", args=args, task_id="r-1", **options)
            message = queue.get(timeout=5)
    body = bytes(message.body)
    assert json.loads(body) == [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    assert body.startswith('[[{"text":"\u4f60\u597d \U0001f600 \u00e4"'.encode())
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.headers["task"] == "fleet.chat"


def test_a_read_that_brought_nothing_is_followed_by_the_next_one_at_once():
    """kombu sleeps for its polling interval between both, and a reply that comes meanwhile waits."""
    with create_app(Settings(broker_url="redis://127.0.0.1:1/0")).connection_for_read() as connection:
        assert connection.transport.polling_interval is None
        assert connection.transport.brpop_timeout < ANSWER_WITHIN  # or a channel could not wait for the end of a read
