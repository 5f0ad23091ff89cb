"""The Celery application of a node: how it sends events."""

import pytest
from kombu import Connection

from fleet_worker import Settings
from fleet_worker.broker.app import create_app


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
