"""Registry events are published together, at once, and without anybody waiting for it."""

import threading
import time
from collections import deque
from contextlib import closing, suppress

import pytest
from kombu import Connection, Consumer

from fleet_worker.broker.topology import digest_queue, registry_queue
from fleet_worker.protocol.registry_event import Announcement, RegistryEvent
from fleet_worker.registry import publisher as module
from fleet_worker.registry.publisher import RegistryPublisher
from tests.mlx_clients import took_less_than, until

WITHIN = 5.0
SECRET = "hunter2"


def connection():
    """kombu's in-memory transport: a broker inside of this process."""
    return Connection("memory://", transport_options={"polling_interval": 0.001})


class Host:
    """What there is to publish, and a broker that may be away, or not answer."""

    def __init__(self):
        self.rounds = []
        self.told = threading.Condition()
        self.connects = 0
        self.away = False
        self.answers = threading.Event()
        self.answers.set()
        self.events = []
        self.broken = self.broken_once = None

    def connect(self):
        self.connects += 1
        assert self.answers.wait(WITHIN)
        if self.away:
            raise ConnectionRefusedError(SECRET)
        return connection()

    def announcements(self, kinds):
        with self.told:
            self.rounds.append(kinds)
            self.told.notify_all()
        for kind in sorted(kinds):
            yield f"offering_{kind}", Announcement(v=1, host=kind, interval=1.0, events=self.events)
        once, self.broken_once = self.broken_once, None
        if error := once or self.broken:
            raise error

    def told_of(self, rounds):
        """Wait for that many rounds, and return them."""
        with self.told:
            assert self.told.wait_for(lambda: len(self.rounds) >= rounds, WITHIN)
        return self.rounds


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def publisher(host, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)
    publisher = RegistryPublisher(host.connect, "redis", host.announcements)
    yield publisher
    host.answers.set()
    publisher.close(WITHIN)
    assert not publisher._thread.is_alive()


@pytest.fixture
def heard():
    """Wait for that many messages, and return them."""
    messages = deque()
    with connection() as listening, listening.channel() as channel:
        queue = registry_queue("redis")(channel)
        queue.declare()
        queue.purge()  # of what another test left in this process
        with Consumer(channel, [queue], on_message=messages.append, no_ack=True):

            def wait(count):
                ends = time.monotonic() + WITHIN
                while len(messages) < count and time.monotonic() < ends:
                    with suppress(TimeoutError):
                        listening.drain_events(timeout=0.05)
                assert len(messages) >= count
                return [messages.popleft() for _ in range(len(messages))]

            yield wait


def hosts(messages):
    return [Announcement.decode(message.body).host for message in messages]


def assert_no_more(host, rounds):
    """Some pauses later, there was no other round."""
    time.sleep(0.05)
    assert host.rounds == rounds


def test_a_message_travels_as_a_registry_event(publisher, host, heard):
    host.events = [RegistryEvent.of("offering_available", offering={}, runtime={}, capacity={}, health={})]
    publisher.publish("available")
    (message,) = heard(1)
    assert Announcement.decode(message.body).events == host.events
    assert message.delivery_info["exchange"] == "llm.registry"
    assert message.delivery_info["routing_key"] == "llm.registry.offering_available"
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    facts = {key: message.properties.get(key) for key in ("type", "app_id", "delivery_mode")}
    assert facts == {"type": "llm.registry.event", "app_id": "fleet-worker-mlx", "delivery_mode": 1}
    assert publisher.failures == 0


def test_wanted_kinds_are_published_in_one_round_and_no_more(publisher, host, heard):
    publisher.publish("a", "b")
    assert hosts(heard(2)) == ["a", "b"]
    assert_no_more(host, [{"a", "b"}])


def test_it_keeps_its_connection(publisher, host, heard):
    for number in range(1, 6):
        publisher.publish("a")
        host.told_of(number)
    assert hosts(heard(5)) == ["a"] * 5
    assert host.connects == 1


def test_kinds_that_are_wanted_during_a_round_share_the_next_one(publisher, host, heard):
    host.answers.clear()
    publisher.publish("a")
    host.told_of(1)
    for _ in range(100):
        publisher.publish("a")
        publisher.publish("b", "c")
    host.answers.set()
    assert sorted(hosts(heard(4))) == ["a", "a", "b", "c"]
    assert host.rounds == [{"a"}, {"a", "b", "c"}]


def test_kinds_that_are_wanted_soon_after_a_round_share_the_next_one(publisher, host, heard, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.5)
    publisher.publish("a")
    heard(1)
    for kind in "bcd":
        publisher.publish(kind)
        time.sleep(0.02)
    assert hosts(heard(3)) == ["b", "c", "d"]
    assert len(host.rounds) == 2


def test_to_publish_never_takes_time(publisher, host):
    host.answers.clear()
    publisher.publish("a")
    host.told_of(1)
    with took_less_than(0.5):
        for _ in range(1000):
            publisher.publish("a")


def test_rounds_that_fail_are_counted_and_logged_once(publisher, host, heard, caplog):
    host.away = True
    for number in range(1, 6):
        publisher.publish("a")
        host.told_of(2 * number)  # the second time with a new connection
    until(lambda: publisher.failures == 5)
    assert len(caplog.records) == 1
    assert "cannot be published and are dropped: the broker is away (ConnectionRefusedError)" in caplog.text
    host.away = False
    publisher.publish("b")
    assert hosts(heard(2)) == ["a", "b"]
    until(lambda: len(caplog.records) == 2)
    assert caplog.records[1].getMessage() == "registry events are published again"
    assert publisher.failures == 5
    assert SECRET not in caplog.text


def test_a_second_outage_is_logged_too(publisher, host, heard, caplog):
    for number in range(1, 5):
        host.away = number % 2 == 1
        publisher._publisher.drop()
        publisher.publish("a")
        until(lambda number=number: len(caplog.records) == number)
    assert ["again" in record.getMessage() for record in caplog.records] == [False, True, False, True]


def test_a_connection_that_was_lost_costs_no_round(publisher, host, heard):
    publisher.publish("a")
    heard(1)
    host.broken_once = ConnectionResetError()
    publisher.publish("b")
    host.told_of(3)
    assert (host.connects, publisher.failures) == (2, 0)


def test_a_round_that_failed_twice_is_given_up_and_its_connection_too(publisher, host, heard):
    """The broker may have been lost in the middle: the next round begins with a new connection."""
    host.broken = ConnectionResetError()
    publisher.publish("a")
    heard(2)
    until(lambda: publisher.failures == 1)
    assert_no_more(host, [{"a"}, {"a"}])
    host.broken = None
    publisher.publish("b")
    assert hosts(heard(2)) == ["a", "b"]
    assert (host.connects, publisher.failures) == (3, 1)


def test_a_value_that_cannot_be_published_is_a_failure_and_no_more(publisher, host, heard, caplog):
    unfit = {"metadata": {"a": object()}}
    host.events = [RegistryEvent.of("offering_available", offering={}, runtime={}, capacity={}, health={}, **unfit)]
    publisher.publish("a")
    until(lambda: publisher.failures == 1)
    assert "object" not in caplog.text
    host.events = []
    publisher.publish("b")
    assert hosts(heard(2)) == ["a", "b"]


def test_what_is_wanted_at_the_end_is_published_first(host, heard, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 60)
    publisher = RegistryPublisher(host.connect, "redis", host.announcements)
    publisher.publish("a")
    host.told_of(1)
    publisher.publish("b")
    with took_less_than(2):
        publisher.close(WITHIN)
    assert hosts(heard(2)) == ["a", "b"]
    assert not publisher._thread.is_alive()


def test_its_end_does_not_wait_for_a_broker_that_does_not_answer(publisher, host):
    host.answers.clear()
    publisher.publish("a")
    host.told_of(1)
    started = time.monotonic()
    publisher.close(0.1)
    assert 0.09 < time.monotonic() - started < 1


def test_its_end_closes_its_connection(host, heard):
    opened = []
    publisher = RegistryPublisher(lambda: opened.append(connection()) or opened[0], "redis", host.announcements)
    with closing(publisher):
        publisher.publish("a")
        heard(1)
        assert opened[0].connected
    assert not opened[0].connected


def test_what_the_broker_did_not_take_is_part_of_the_next_round(publisher, host):
    host.away = True
    publisher.publish("models")
    until(lambda: publisher.failures == 1)
    host.away = False
    publisher.publish("readiness")
    until(lambda: publisher.published_at is not None)
    assert host.rounds[-1] == {"models", "readiness"}
    publisher.publish("readiness")
    until(lambda: host.rounds[-1] == {"readiness"})


# --- Digests of prompt caches


def test_a_digest_goes_to_an_exchange_of_its_own_on_the_same_connection(publisher, host, heard):
    with connection() as listening, listening.channel() as channel:
        digests = digest_queue("redis")(channel)
        digests.declare()
        digests.purge()
        publisher.publish("available")
        heard(1)
        publisher.publish_digest(b"{}")
        assert digests.get().body == b"{}"
    assert host.connects == 1


def test_a_digest_that_fails_fails_no_event_and_is_no_round(publisher, host, heard):
    host.away = True
    with pytest.raises(ConnectionRefusedError):
        publisher.publish_digest(b"{}")
    assert publisher.failures == 0
    host.away = False
    publisher.publish("available")
    heard(1)
    assert host.rounds == [{"available"}]


def test_after_its_end_no_digest_opens_the_connection_again(host):
    publisher = RegistryPublisher(host.connect, "redis", host.announcements)
    publisher.close(WITHIN)
    publisher.publish_digest(b"{}")
    assert host.connects == 0
