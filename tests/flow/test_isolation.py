"""Another kombu consumer in a process that uses this package: kombu gives its messages back, as it does without us."""

import pytest
from kombu import Connection, Consumer, Queue

from fleet_worker import Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.node.worker import serve_with
from tests.brokers import Valkey

QUEUE = Queue("of-another", routing_key="of-another")


@pytest.fixture(scope="module")
def broker():
    with Valkey() as broker:
        yield broker


@pytest.fixture
def ours(broker):
    """An application of ours, which has been used."""
    settings = Settings(broker_url=broker.url)
    with create_app(settings, is_node=True) as app, Router(settings):
        serve_with(app, settings)
        with app.connection_for_write() as connection:
            connection.default_channel.queue_declare("ours")
        yield app


def close_channel(channel, broker):
    channel.close()


def lose_connection(channel, broker):
    """And clean up, as Celery does then."""
    broker.drop_connections()
    channel.connection.client.collect()


@pytest.mark.parametrize("lose", [close_channel, lose_connection])
@pytest.mark.parametrize("ack_emulation", [True, False])
def test_another_consumer_gets_back_what_it_has_not_acknowledged(broker, ours, lose, ack_emulation):
    options = {**ours.conf.broker_transport_options, "ack_emulation": ack_emulation}
    with Connection(broker.url, transport_options=options) as connection:
        connection.Producer().publish("a job", routing_key=QUEUE.name, declare=[QUEUE])
        channel, taken = connection.channel(), []
        Consumer(channel, [QUEUE], callbacks=[lambda body, message: taken.append(body)]).consume()
        connection.drain_events(timeout=5)
        assert taken == ["a job"]
        lose(channel, broker)
    with Connection(broker.url) as connection:
        message = connection.SimpleQueue(QUEUE).get(timeout=5)
        assert message.payload == "a job"
        message.ack()
