"""When a router tells all hosts that it wants digests of prompt caches."""

from types import SimpleNamespace

import pytest

from fleet_worker.broker.topology import ask_exchange
from fleet_worker.protocol.cache_digest import DigestsWanted
from fleet_worker.protocol.registry_event import RegistryEvent
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.view import Registry
from fleet_worker.router.digest_requests import DigestRequests
from tests.unit.registry.test_view import Clock, say


def became(status):
    return RegistryEvent.about(InstanceStatus(host="mini", name="local", status=status))


class Router:
    """What the requests need of a router: its connections, its broker, and a scheduler that runs when it is told to."""

    def __init__(self):
        self.clock = Clock()
        self.registry = Registry(clock=self.clock)
        self.replies = SimpleNamespace(connections=1, away_for=0.0)
        self.sent = []
        self.error = None
        self.due = None
        self.requests = DigestRequests(self.registry, self.replies, self, self, self.clock)
        self.requests.start()

    def broadcast(self, exchange, body, timeout):
        if self.error:
            raise self.error
        assert exchange == ask_exchange()
        self.sent.append(DigestsWanted.decode(body))

    def at(self, when, call):
        self.due = call

    def pass_seconds(self, seconds):
        """Return the requests that were sent meanwhile."""
        before = len(self.sent)
        for _ in range(seconds):
            self.clock.now += 1
            self.due()
        return self.sent[before:]

    def know(self, hosts):
        """Hear of so many hosts, and of some a second time a little later."""
        for _ in range(2):
            for number in range(hosts):
                say(self.registry, became("available"), host=f"mini-{number}", interval=10_000.0)
            self.clock.now += 1


@pytest.fixture
def router():
    return Router()


def test_it_asks_after_a_second_and_then_every_30(router):
    (first,) = router.pass_seconds(1)
    assert (first.at_once, first.seconds) == (True, 90.0)
    assert router.pass_seconds(29) == []
    (second,) = router.pass_seconds(1)
    assert not second.at_once


def test_it_asks_at_once_for_all_digests_when_it_has_connected_again(router):
    router.pass_seconds(1)
    router.replies.connections += 1
    (again,) = router.pass_seconds(1)
    assert again.at_once


@pytest.mark.parametrize(("before", "after", "asks"), [(100, 200, 1), (200, 100, 1), (100, 199, 0), (1, 50, 0)])
def test_it_asks_when_the_number_of_hosts_has_doubled_or_halved(router, before, after, asks):
    """Not below a hundred, where it makes no difference."""
    router.registry.hosts = before
    router.pass_seconds(2)
    router.registry.hosts = after
    assert [each.hosts for each in router.pass_seconds(5)] == [after] * asks


def test_the_hosts_are_those_of_the_registry(router):
    router.know(3)
    assert router.registry.hosts == 3
    (first,) = router.pass_seconds(1)
    assert first.hosts == 3


def test_a_host_that_comes_back_is_told_within_seconds(router):
    """Its registry node may be a new process."""
    router.know(2)
    router.pass_seconds(5)
    say(router.registry, became("unavailable"), host="mini-1", interval=10_000.0)
    assert router.pass_seconds(10) == []
    say(router.registry, became("available"), host="mini-1", interval=10_000.0)
    (again,) = router.pass_seconds(1)
    assert not again.at_once
    say(router.registry, became("unavailable"), host="mini-1", interval=10_000.0)
    say(router.registry, became("available"), host="mini-1", interval=10_000.0)
    assert router.pass_seconds(4) == []
    assert len(router.pass_seconds(1)) == 1


def test_it_waits_for_a_broker_that_is_away_and_tries_again_after_an_error(router):
    router.replies.away_for = 2.0
    assert router.pass_seconds(5) == []
    router.replies.away_for, router.error = 0.0, ConnectionResetError()
    assert router.pass_seconds(1) == []
    router.error = None
    assert len(router.pass_seconds(1)) == 1


def test_a_closed_session_leaves_no_subscription(router):
    router.requests.close()
    assert router.registry._subscribers == []
