"""Both ends of a reply queue, on a Valkey of the tests' own. On RabbitMQ: `tests/flow/test_replies.py`."""

import base64
import json
import tracemalloc
from contextlib import contextmanager

import pytest
import redis

from fleet_worker.broker import replies
from fleet_worker.broker.app import create_app, door_of
from fleet_worker.broker.connection import open_channel
from fleet_worker.broker.door import EMPTY, FOREIGN, Refused
from fleet_worker.broker.topology import REPLY_PREFIX, reply_name
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker

OLD_ROUTER = f"{REPLY_PREFIX}host.0123456789ab.60"
"""A reply queue as version 0.1.0 names it."""
MB = 1024 * 1024


@pytest.fixture(scope="module")
def url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def valkey(url):
    with redis.Redis.from_url(url, single_connection_client=True) as client:
        client.execute_command("ACL", "SETUSER", "without", "on", ">x", "~*", "&*", "+@all", "-blmpop")
        yield client
        client.flushdb()


@contextmanager
def channel_of(url):
    with create_app(Settings(broker_url=url)) as app, app.connection_for_read() as connection:
        yield connection, open_channel(connection), door_of(app)


@pytest.fixture(params=["BLMPOP", "BRPOP"])
def router(request, url, valkey):
    """Calls `receive_all`, and returns what it has received; with BRPOP: as from a Redis that has no BLMPOP."""
    received, name = [], reply_name("test", 60)
    with channel_of(url if request.param == "BLMPOP" else url.replace("://", "://without:x@")) as opened:
        connection, channel, door = opened

        def receive(body):
            if body == b"refuse":
                raise Refused("it is no reply")
            received.append(bytes(body))

        receive_all = replies.consume(connection, channel, name, receive)

        def receive_once(timeout=10):
            received.clear()
            receive_all(timeout)
            return list(received)

        if request.param == "BRPOP":
            assert receive_once() == []  # BLMPOP was refused
        receive_once.name, receive_once.door = name, door
        yield receive_once


@pytest.fixture
def node(url):
    """Writes a reply, and returns how many wait then."""
    with channel_of(url) as (_, channel, _):
        sender = replies.sender_on(channel)

        def send(body, reply_to):
            sender.send(reply_to, body)
            return sender.confirm()

        yield send


def wrapped(body, **changes):
    properties = {"body_encoding": "base64", "delivery_tag": "x", "delivery_info": {}, "priority": 0}
    content = {"content-type": "application/json", "content-encoding": "utf-8", "headers": {}}
    return json.dumps({"body": base64.b64encode(body).decode(), **content, "properties": properties, **changes})


def test_all_that_waits_is_received_at_once_in_its_order(router, node):
    bodies = [b'{"seq": %d}' % seq for seq in range(150)]
    assert [node(body, router.name) for body in bodies] == list(range(1, 151))
    assert router() == bodies
    assert router(timeout=0.1) == []
    node(b"{}", router.name)
    assert router() == [b"{}"]


def test_no_more_than_so_many_are_received_at_once(router, node, monkeypatch):
    for seq in range(replies.MOST_AT_ONCE + 5):
        node(b"%d" % seq, router.name)
    first = router()
    assert replies.MOST_AT_ONCE <= len(first) <= replies.MOST_AT_ONCE + 1
    assert first + router() == [b"%d" % seq for seq in range(replies.MOST_AT_ONCE + 5)]


def test_a_reply_is_stored_as_it_is_and_expires(node, valkey):
    name = reply_name("test", 60)
    node(b'{"v": 2}', name)
    assert valkey.lrange(name, 0, -1) == [b'{"v": 2}']
    assert 0 < valkey.ttl(name) <= 60


def test_a_router_of_version_0_1_gets_it_wrapped(node, valkey):
    assert node(b'{"v": 2}', OLD_ROUTER) is None
    [item] = valkey.lrange(OLD_ROUTER, 0, -1)
    assert base64.b64decode(json.loads(item)["body"]) == b'{"v": 2}'
    assert 0 < valkey.ttl(OLD_ROUTER) <= 60


def test_a_node_of_version_0_1_wraps_it(router, valkey):
    valkey.lpush(router.name, wrapped(b'{"v": 2}'), b'{"v": 3}')
    assert router() == [b'{"v": 2}', b'{"v": 3}']


def test_what_no_node_has_sent_is_dropped_and_counted_and_the_rest_received(router, valkey):
    valkey.lpush(router.name, b"1", b"", b"refuse", wrapped(b"x", **{"content-encoding": "bz2"}), b" " * 60 * MB, b"2")
    assert router() == [b"1", b"2"]
    assert router.door.dropped == {EMPTY: 2, "it is no reply": 1, FOREIGN: 1}


def test_no_two_messages_are_in_memory(router, node):
    for _ in range(20):
        node(b" " * MB, router.name)
    sizes = []
    tracemalloc.start()
    try:
        sizes = [len(body) for body in router()[:1]]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sizes == [MB]
    assert peak < 20 * MB + 8 * MB  # the test itself keeps them
