"""How lanes are read from Redis: with one command that waits long, and ends when the lanes change. On a Valkey of the
tests' own."""

import threading
import time
from contextlib import closing, contextmanager

import pytest
import redis
from kombu import Consumer, Producer

from fleet_worker.broker.app import create_app
from fleet_worker.broker.connection import check_alive, open_channel, receive
from fleet_worker.broker.redis_transport import WAKE_EXPIRES, Transport
from fleet_worker.broker.topology import cancel_queue, lane, lane_queue, wake_key
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker
from tests.mlx_clients import took_less_than, until

ONE, TWO = (lane_queue(lane("chat", name), "redis") for name in ("one", "two"))
AT_ONCE = Transport.brpop_timeout / 4


@pytest.fixture(scope="module")
def url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def valkey(url):
    with redis.Redis.from_url(url) as client:
        yield client
        client.config_set("maxmemory", 0)
        client.flushdb()


class Reader:
    def __init__(self, connection, channel):
        self._connection = connection
        self.taken = []
        self.channel = channel
        self.consumer = Consumer(channel, [], on_message=self._take)

    def _take(self, message):
        self.taken.append((message.delivery_info["routing_key"], bytes(message.body)))
        message.ack()

    def join(self, queue):
        self.consumer.add_queue(queue)
        self.consumer.consume()

    def waits(self, client):
        """Read until BRPOP has begun to wait."""
        receive(self._connection, 0.01)
        until(lambda: client.info("clients")["blocked_clients"] == 1, 2)

    def receive(self, seconds=2 * AT_ONCE):
        receive(self._connection, seconds)


def calls(client, command):
    """How often Valkey has run it to its end."""
    return client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


@contextmanager
def a_reader(url):
    with closing(create_app(Settings(broker_url=url))) as app, app.connection_for_read() as connection:
        yield Reader(connection, open_channel(connection))


@pytest.fixture
def reader(url, valkey):
    """Waits for messages of lane one."""
    with a_reader(url) as reader:
        reader.join(ONE)
        reader.waits(valkey)
        yield reader


@pytest.fixture
def send(url):
    with closing(create_app(Settings(broker_url=url))) as app, app.connection_for_write() as connection:
        producer = Producer(connection.channel(), auto_declare=False)
        json = {"content_type": "application/json", "content_encoding": "utf-8"}
        yield lambda queue, body: producer.publish(body, routing_key=queue.name, **json)


def test_a_lane_that_is_joined_is_served_at_once(reader, send):
    with took_less_than(AT_ONCE):
        send(TWO, b"2")
        reader.join(TWO)
        reader.receive()
    assert reader.taken == [(TWO.name, b"2")]


def test_a_lane_that_is_left_is_not_read_any_more(reader, send, valkey):
    reader.join(TWO)
    reader.waits(valkey)
    reader.consumer.cancel_by_queue(ONE.name)
    reader.receive(0.01)  # the end of the read that waited
    reader.waits(valkey)
    send(ONE, b"1")
    send(TWO, b"2")
    reader.receive()
    assert reader.taken == [(TWO.name, b"2")]
    assert valkey.llen(ONE.name) == 1


def test_what_came_before_the_lanes_changed_is_taken(reader, send):
    send(ONE, b"1")
    reader.join(TWO)
    send(TWO, b"2")
    reader.receive()
    reader.receive()
    assert reader.taken == [(ONE.name, b"1"), (TWO.name, b"2")]


def test_many_changes_at_once_end_one_read(reader, valkey):
    before = calls(valkey, "lpush")
    for number in range(5):
        reader.join(lane_queue(lane("chat", f"model-{number}"), "redis"))
    assert calls(valkey, "lpush") - before == 1


def test_what_a_read_did_not_need_for_its_end_expires(reader, send, valkey):
    send(ONE, b"1")
    reader.join(TWO)
    (left,) = valkey.scan_iter("*wake*", count=1_000)
    assert 0 < valkey.ttl(left) <= WAKE_EXPIRES


def test_a_channel_closes_without_waiting_for_messages(reader):
    with took_less_than(AT_ONCE):
        reader.channel.close()


def test_a_message_that_a_closing_channel_has_popped_is_handed_over(reader, send):
    send(ONE, b"1")
    reader.channel.close()
    assert reader.taken == [(ONE.name, b"1")]


def test_the_read_of_a_full_broker_ends_by_itself(url, send, valkey):
    with a_reader(url) as reader:
        reader.channel.brpop_timeout = 0.2
        reader.join(ONE)
        reader.join(TWO)
        reader.waits(valkey)
        valkey.config_set("maxmemory", 1)
        reader.consumer.cancel_by_queue(ONE.name)
        reader.receive(0.3)
        valkey.config_set("maxmemory", 0)
        send(ONE, b"1")
        send(TWO, b"2")
        reader.receive()
        assert reader.taken == [(TWO.name, b"2")]


@pytest.mark.rest
def test_a_reader_that_waits_for_nothing_asks_rarely(reader, valkey):
    before, began = calls(valkey, "brpop"), time.monotonic()
    while (took := time.monotonic() - began) < 1:
        reader.receive(0.05)
    assert calls(valkey, "brpop") - before <= 1 + took / Transport.brpop_timeout


@pytest.mark.rest
def test_a_silent_subscription_asks_the_broker_once_in_each_interval(url, valkey):
    with closing(create_app(Settings(broker_url=url))) as app, app.connection_for_read() as connection:
        connection.transport_options = {**connection.transport_options, "health_check_interval": 0.2}
        channel = open_channel(connection)
        Consumer(channel, [cancel_queue("redis")], on_message=lambda message: None, no_ack=True).consume()
        receive(connection, 0.1)
        before, began = calls(valkey, "ping"), time.monotonic()

        def has_asked(times):
            receive(connection, 0.05)
            check_alive(connection, channel)
            return calls(valkey, "ping") - before >= times

        until(lambda: has_asked(4), 20)
        assert time.monotonic() - began > 3 * 0.2


@pytest.mark.rest
def test_each_reader_ends_only_its_own_read(url, reader, valkey):
    assert wake_key() != wake_key()
    with a_reader(url) as other:
        other.join(ONE)
        receiving = threading.Thread(target=other.receive, args=(AT_ONCE,))
        receiving.start()
        until(lambda: valkey.info("clients")["blocked_clients"] == 2, 2)
        reader.join(TWO)
        reader.receive(0.01)
        until(lambda: valkey.info("clients")["blocked_clients"] >= 1, 2)
        receiving.join()
    assert other.taken == reader.taken == []
