"""When a router tells all hosts that it wants digests of prompt caches, and what it does with what comes."""

import queue

import pytest
from kombu import Consumer

from fleet_worker.broker.app import create_app, door_of
from fleet_worker.broker.connection import receive
from fleet_worker.broker.door import Refused
from fleet_worker.broker.topology import ask_queue, digest_exchange
from fleet_worker.protocol.cache_digest import DigestMessage, DigestsWanted
from fleet_worker.protocol.registry_event import RegistryEvent
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.view import Registry
from fleet_worker.router import digest_consumer as module
from fleet_worker.router.digest_consumer import DigestConsumer, DigestRequests
from fleet_worker.router.first_digests import ANSWERED_WITHIN
from fleet_worker.router.submitter import publish
from fleet_worker.settings import Settings
from fleet_worker.testing import embedded_broker
from tests.unit.registry.test_view import Clock, say


class Router:
    """What it asks for, second by second."""

    def __init__(self):
        self.clock = Clock()
        self.hosts = 3
        self.requests = DigestRequests(lambda: self.hosts, self.clock)
        self.requests.connected(again=True)

    def wait(self, seconds):
        """Return the requests that are sent meanwhile."""
        sent = []
        for _ in range(seconds):
            self.clock.turn(1)
            sent.append(self.requests.next())
        return [each for each in sent if each]

    def hear(self, status):
        self.requests.hear(became(status))


def became(status):
    return RegistryEvent.about(InstanceStatus(host="mini", name="local", status=status))


@pytest.fixture
def router():
    return Router()


def test_a_new_router_asks_at_once():
    router = Router()
    router.requests.connected()
    assert router.requests.next() == DigestsWanted(v=1, hosts=3, seconds=90.0, at_once=True)


def test_it_asks_a_second_after_it_has_connected_again_and_then_every_30(router):
    assert router.requests.next() is None
    assert router.wait(1) == [DigestsWanted(v=1, hosts=3, seconds=90.0, at_once=True)]
    assert router.wait(29) == []
    assert router.wait(1) == [DigestsWanted(v=1, hosts=3, seconds=90.0)]


def test_it_asks_for_all_digests_again_when_it_has_connected_again(router):
    router.wait(1)
    router.requests.connected(again=True)
    assert [each.at_once for each in router.wait(5)] == [True]


@pytest.mark.parametrize(
    ("before", "after", "seconds"),
    [(100, 200, 1), (200, 100, 1), (1_000, 1_150, 5), (1_000, 1_050, None), (1, 99, None)],
)
def test_it_asks_earlier_when_the_number_of_hosts_changes_their_pace(router, before, after, seconds):
    router.hosts = before
    router.wait(1)
    router.hosts = after
    assert router.wait((seconds or 29) - 1) == []
    assert [each.hosts for each in router.wait(1)] == ([after] if seconds else [])


def test_a_host_that_comes_back_is_told_within_seconds(router):
    """Its registry node may be a new process."""
    router.wait(5)
    router.hear("unavailable")
    assert router.wait(10) == []
    router.hear("available")
    assert [each.at_once for each in router.wait(1)] == [False]
    router.hear("available")
    assert router.wait(4) == []
    assert len(router.wait(1)) == 1


def test_the_hosts_are_those_of_the_registry():
    clock = Clock()
    registry = Registry(clock=clock)
    for _ in range(2):
        for number in range(3):
            say(registry, became("available"), host=f"mini-{number}")
        clock.turn(1)
    assert registry.hosts == 3


# --- Its thread


@pytest.fixture(scope="module")
def app():
    with embedded_broker() as url, create_app(Settings(broker_url=url)) as app:
        yield app


@pytest.fixture
def start(app, monkeypatch):
    """Start a consumer with this function; it asks as soon as it is connected."""
    monkeypatch.setattr(module, "AGAIN_AFTER", 0.0)
    monkeypatch.setattr(module, "GAP", 0.01)
    started = []

    def start(function):
        registry = Registry()
        started.append((registry, DigestConsumer(app.connection_for_read, "redis", registry, function)))
        started[-1][1].start()

    with app.connection_for_read() as connection, connection.channel() as channel:
        asked = queue.SimpleQueue()
        hosts = Consumer(channel, [ask_queue("redis")], on_message=lambda each: asked.put(each.body), no_ack=True)
        with hosts:
            receive(connection, 0.01)

            def next_request():
                receive(connection, 5)
                return DigestsWanted.decode(asked.get_nowait())

            yield start, next_request
    for registry, consumer in started:
        consumer.close()
        assert registry._subscribers == []
        consumer._thread.close(5)


def test_no_digest_ends_the_connection(app, start):
    """Not one that is refused, and not one that its receiver fails with."""
    start, next_request = start
    digests = queue.SimpleQueue()

    def take(body):
        digests.put(body)
        if body != b"{}":
            raise Refused("it is no digest") if body == b"1" else ValueError("hunter2")

    start(take)
    assert next_request().at_once
    with app.connection_for_write() as connection:
        for body in (b"1", b"2", b"{}"):
            publish(connection.Producer(), digest_exchange(), body)
    assert [digests.get(timeout=5) for _ in range(3)] == [b"1", b"2", b"{}"]
    assert door_of(app).dropped == {"it is no digest": 1, "a digest could not be used": 1}


def test_after_a_lost_connection_it_asks_for_all_of_them_again(app, start):
    start, next_request = start
    with app.connection_for_write() as connection:
        client = connection.default_channel.client
        others = {each["id"] for each in client.client_list()}
        start(print)
        assert next_request().at_once
        for each in client.client_list():
            if each["id"] not in others:
                client.client_kill_filter(_id=each["id"])
        assert next_request().at_once


# --- A new router waits for it


@pytest.fixture
def told(app):
    """A consumer of a registry that knows two hosts, and a function with which one of these tells its digests."""
    registry, taken = Registry(), queue.SimpleQueue()
    for host in ("mini-1", "mini-2"):
        say(registry, became("available"), host=host)
    consumer = DigestConsumer(app.connection_for_read, "redis", registry, taken.put)

    def tell(host):
        with app.connection_for_write() as connection:
            publish(
                connection.Producer(), digest_exchange(), DigestMessage(v=1, host=host, interval=1, digests=[]).encode()
            )
        taken.get(timeout=5)

    with app.connection_for_read() as connection, connection.channel() as channel:
        asked = queue.SimpleQueue()
        with Consumer(channel, [ask_queue("redis")], on_message=lambda each: asked.put(each.body), no_ack=True):
            receive(connection, 0.01)
            consumer.start()
            receive(connection, 5)
            assert DigestsWanted.decode(asked.get_nowait()) == DigestsWanted(v=1, hosts=2, seconds=90.0, at_once=True)
            yield consumer, tell
    consumer.close()
    consumer._thread.close(5)


def test_the_first_round_is_over_when_all_hosts_have_told(told):
    consumer, tell = told
    consumer.first._due_at += 60
    for host in ("mini-1", "mini-1"):
        tell(host)
    assert not consumer.first.wait(0.1)
    tell("mini-2")
    assert consumer.first.wait(5)


def test_a_host_that_tells_nothing_is_not_waited_for_for_long(told):
    consumer, tell = told
    consumer.first._due_at -= ANSWERED_WITHIN - 0.2
    tell("mini-1")
    assert consumer.first.wait(5)


def test_nobody_waits_for_a_consumer_that_is_closed():
    consumer = DigestConsumer(lambda: None, "redis", Registry(), print)
    consumer.close()
    assert consumer.first.wait(5)
