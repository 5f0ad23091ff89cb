"""Digests of prompt caches are published while a router wants them, on change, and not too often."""

import math
import queue
import time

import pytest

from fleet_worker.broker.door import Refused
from fleet_worker.protocol.cache_digest import LEASE, CacheDigest, DigestMessage, DigestsWanted
from fleet_worker.registry import digests as module
from fleet_worker.registry.digests import DigestPace, DigestPublisher
from tests.clock import Clock
from tests.mlx_clients import until

IDLE = [CacheDigest(node="local@mini", slots=4, running=0)]
OTHER = [CacheDigest(node="local@mini", slots=4, running=0, epoch=1)]
BUSY = [CacheDigest(node="local@mini", slots=4, running=1)]
NEVER = math.inf


@pytest.fixture
def clock():
    return Clock(1_000.0)


@pytest.fixture
def pace(clock):
    return DigestPace(clock, draw=lambda: 0.5)


def want(pace, hosts=3, seconds=90.0, at_once=False):
    pace.extend(DigestsWanted(v=1, hosts=hosts, seconds=seconds, at_once=at_once))


def publish_first(pace, clock, digests=IDLE, hosts=3):
    """A router wants digests, and has got the first."""
    want(pace, hosts)
    clock.now += pace.due_in(digests)
    pace.publishing(digests)


# --- The lease


def test_nothing_is_due_until_a_router_wants_it(pace, clock):
    pace.beat()
    assert pace.due_in(BUSY) == NEVER
    want(pace)
    assert pace.due_in(BUSY) < 1


def test_a_lease_ends_by_the_clock_of_the_host(pace, clock):
    publish_first(pace, clock)
    clock.now += 89
    assert pace.due_in(BUSY) == 0
    clock.now += 1
    assert pace.due_in(BUSY) == NEVER


def test_a_lease_is_as_long_as_the_longest_of_all_routers(pace, clock):
    want(pace, seconds=60)
    want(pace, seconds=10)
    clock.now += 59
    assert pace.is_wanted
    clock.now += 1
    assert not pace.is_wanted


def test_nobody_gets_a_lease_for_ever(pace, clock):
    want(pace, seconds=1e300)
    clock.now += LEASE
    assert not pace.is_wanted


# --- The pace


def test_a_change_is_due_at_once_and_then_not_for_a_second(pace, clock):
    publish_first(pace, clock)
    assert pace.due_in(IDLE) == NEVER
    clock.now += 10
    assert pace.due_in(OTHER) == 0
    pace.publishing(OTHER)
    clock.now += 0.25
    assert pace.due_in(IDLE) == 0.75


def test_what_runs_is_published_again_and_again(pace, clock):
    publish_first(pace, clock, BUSY)
    assert pace.due_in(BUSY) == 1
    clock.now += 1
    assert pace.due_in(BUSY) == 0


def test_a_beat_is_published_without_a_change_and_once(pace, clock):
    publish_first(pace, clock)
    pace.beat()
    assert pace.due_in(IDLE) == 1
    clock.now += 1
    pace.publishing(IDLE)
    clock.now += 1
    assert pace.due_in(IDLE) == NEVER


@pytest.mark.parametrize(("hosts", "interval"), [(0, 1), (200, 1), (400, 2), (1_000, 5)])
def test_all_hosts_together_publish_200_messages_a_second(pace, hosts, interval):
    want(pace, hosts)
    assert pace.interval == interval


def test_the_largest_number_of_hosts_that_was_said_counts_until_its_lease_is_over(pace, clock):
    want(pace, hosts=1_000)
    clock.now += 60
    want(pace, hosts=10)
    assert pace.interval == 5
    clock.now += 30
    assert pace.interval == 5
    want(pace, hosts=10)
    assert pace.interval == 1


def test_hosts_do_not_answer_together(clock):
    """Neither a first router nor one that has just connected."""
    first = DigestPace(clock, draw=lambda: 0.75)
    want(first, hosts=1_000)
    assert first.due_in(IDLE) == 3.75
    clock.now += 3.75
    first.publishing(IDLE)
    clock.now += 10
    want(first, hosts=1_000, at_once=True)
    assert first.due_in(IDLE) == 3.75


def test_a_router_that_has_had_digests_gets_none_for_asking_again(pace, clock):
    publish_first(pace, clock)
    clock.now += 30
    want(pace)
    assert pace.due_in(IDLE) == NEVER
    want(pace, at_once=True)
    assert pace.due_in(IDLE) < 1


def test_a_new_router_does_not_hurry_the_host(pace, clock):
    publish_first(pace, clock, hosts=1_000)
    want(pace, hosts=1_000, at_once=True)
    assert pace.due_in(IDLE) == 5


# --- The thread


class Host:
    """What its nodes told last, and a broker that may refuse."""

    def __init__(self):
        self.digests = IDLE
        self.error = None
        self.tries = 0
        self.published = queue.SimpleQueue()

    def publish(self, body):
        self.tries += 1
        if self.error:
            raise self.error
        self.published.put(DigestMessage.decode(body))

    def next(self):
        return self.published.get(timeout=5)


@pytest.fixture
def host():
    return Host()


@pytest.fixture
def publisher(host, monkeypatch):
    monkeypatch.setattr(module, "SHORTEST_INTERVAL", 0.01)
    publisher = DigestPublisher(host.publish, "mini", lambda: host.digests, DigestPace(draw=lambda: 0))
    publisher.start()
    yield publisher
    publisher.close(5)
    assert not publisher._thread.is_alive()


WANTED = DigestsWanted(v=1, hosts=1, seconds=90.0).encode()


def test_a_router_that_asks_hears_all_nodes_of_the_host(publisher, host):
    host.digests = [*IDLE, CacheDigest(node="embed@mini", slots=1, running=0)]
    publisher.receive(WANTED)
    message = host.next()
    assert (message.host, message.interval, message.digests) == ("mini", 0.01, host.digests)


def test_without_a_router_nothing_is_published(publisher, host):
    publisher.beat()
    publisher.changed()
    time.sleep(0.05)
    assert host.tries == 0


def test_a_change_is_published_without_another_question(publisher, host):
    publisher.receive(WANTED)
    assert host.next()
    host.digests = OTHER
    publisher.changed()
    assert host.next().digests == OTHER


@pytest.mark.parametrize("body", [b"5", b"[]", b'{"v": 2, "hosts": 1, "seconds": 1}', b'{"v": 1}', b"x" * 1000])
def test_what_is_no_question_is_refused_and_no_lease(publisher, host, body):
    with pytest.raises(Refused):
        publisher.receive(body)
    assert not publisher._pace.is_wanted
    assert host.tries == 0


def test_what_a_broker_did_not_take_is_published_when_it_does(publisher, host):
    host.error = ConnectionRefusedError("hunter2")
    publisher.receive(WANTED)
    until(lambda: host.tries, 5)
    host.error = None
    assert host.next().digests == IDLE


def test_a_host_of_more_nodes_than_a_message_may_have_publishes_the_first(publisher, host):
    host.digests = IDLE * 101
    publisher.receive(WANTED)
    assert len(host.next().digests) == 100


@pytest.mark.parametrize("at_once", [False, True])
def test_one_message_with_a_wrong_number_of_hosts_does_not_silence_a_host(pace, clock, at_once):
    publish_first(pace, clock, BUSY)
    want(pace, hosts=1_000_000, seconds=1e300, at_once=at_once)
    assert pace.due_in(BUSY) < 61
    clock.now += 60
    pace.publishing(BUSY)
    clock.now += 40
    want(pace)
    assert pace.due_in(BUSY) < 1


def test_routers_that_ask_again_and_again_delay_nothing(pace, clock):
    for _ in range(70):
        want(pace, hosts=1_000_000, at_once=True)
        clock.now += 1
    assert pace.due_in(IDLE) == 0
