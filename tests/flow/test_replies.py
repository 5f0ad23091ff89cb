"""Replies on RabbitMQ: read together, acknowledged together. On Valkey: `tests/unit/broker/test_replies.py`."""

from contextlib import contextmanager

import pytest

from fleet_worker.broker import replies
from fleet_worker.broker.app import create_app, door_of
from fleet_worker.broker.connection import open_channel
from fleet_worker.broker.topology import reply_name
from fleet_worker.settings import Settings
from tests.mlx_clients import until

pytestmark = pytest.mark.parametrize("broker", ["rabbitmq"], indirect=True)

BODIES = [b'{"seq": %d}' % seq for seq in range(replies.MOST_AT_ONCE + 100)]
LARGE = b" " * 3 * replies.MOST_BYTES_AT_ONCE


@contextmanager
def router(broker, name, received):
    with create_app(Settings(broker_url=broker.url)) as app, app.connection_for_read() as connection:
        channel = open_channel(connection)
        yield replies.consume(connection, channel, name, lambda body: received.append(bytes(body))), door_of(app)


@contextmanager
def node(broker):
    with create_app(Settings(broker_url=broker.url)) as app, app.connection_for_write() as connection:
        sender = replies.sender_on(open_channel(connection))
        yield lambda name, *bodies: [sender.send(name, body) for body in bodies]


def read_all(receive_all, received, count):
    """Return the sizes of the batches in which so many messages came."""
    sizes = []
    while len(received) < count:
        before = len(received)
        receive_all(10.0)
        assert len(received) > before
        sizes.append(len(received) - before)
    return sizes


def test_what_waits_comes_in_its_order_in_few_batches_and_once(broker):
    name, received, again = reply_name("test", 60), [], []
    with router(broker, name, received) as (receive_all, _), node(broker) as push:
        push(name, *BODIES, LARGE, *BODIES)
        sizes = read_all(receive_all, received, 2 * len(BODIES) + 1)
    assert received == [*BODIES, LARGE, *BODIES]
    assert max(sizes) <= replies.MOST_AT_ONCE
    assert len(sizes) < len(received) / 4
    with router(broker, name, again) as (receive_all, _), node(broker) as push:
        push(name, b"{}")
        read_all(receive_all, again, 1)
    assert again == [b"{}"]  # all of the others were acknowledged


def test_what_no_node_has_sent_is_dropped_and_the_rest_received(broker):
    name, received = reply_name("test", 60), []
    with router(broker, name, received) as (receive_all, door), node(broker) as push:
        push(name, b"1", b"", b" " * (door.most_bytes + 1), b"[" * 200_000, b"2")
        read_all(receive_all, received, 2)
    assert received == [b"1", b"2"]
    assert sum(door.dropped.values()) == 3


def test_a_connection_is_closed_also_while_messages_come(broker):
    name, received = reply_name("test", 60), []
    with router(broker, name, received) as (receive_all, _), node(broker) as push:
        push(name, *BODIES)
        receive_all(10.0)
        receive_all(10.0)
        before = len(broker.connections())
        push(name, *(b" " * 1024 * 64 for _ in range(100)))
    until(lambda: len(broker.connections()) == before - 2)
