"""How old a request is by the clock of its router, which is as wrong as a test wants it to be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.node import router_clocks as module
from fleet_worker.node.router_clocks import RouterClocks
from tests.envelopes import decode, envelope

ROUTER = "llm.fleet.reply.mini-7.0123456789ab.120"


class Hosts:
    """A node and a router, whose clock is `ahead` of that of the node."""

    def __init__(self, ahead=0.0):
        self.time = 1e9
        self.ahead = ahead
        self.clocks = RouterClocks(lambda: self.time)

    def tell(self, delay=0.0):
        sent_at = self.time + self.ahead
        self.time += delay
        self.clocks.told(ROUTER, sent_at)

    def submit(self, timeout=30.0):
        return decode(envelope(timeout_seconds=timeout, expires_at=self.time + self.ahead + timeout))


@given(st.sampled_from([-3600.0, -90.0, 0.0, 90.0, 3600.0]), st.floats(0, 0.2), st.floats(0, 1000))
def test_a_request_is_as_old_as_its_router_says(ahead, delay, waited):
    hosts = Hosts(ahead)
    hosts.tell(delay)
    request = hosts.submit()
    hosts.time += waited
    assert hosts.clocks.age(request) == pytest.approx(max(0.0, waited - delay), abs=0.001)


def test_nothing_is_known_of_a_router_that_has_told_nothing():
    hosts = Hosts()
    assert hosts.clocks.age(hosts.submit()) is None
    assert hosts.clocks.is_to_ask(ROUTER)
    hosts.tell()
    assert not hosts.clocks.is_to_ask(ROUTER)


def test_a_time_that_came_late_makes_no_request_older_and_the_next_one_corrects_it():
    hosts = Hosts(ahead=90.0)
    hosts.tell(delay=30.0)  # the node was frozen
    old = hosts.submit()
    hosts.time += 10
    assert hosts.clocks.age(old) == 0.0
    assert hosts.clocks.age(hosts.submit()) == 0.0
    assert hosts.clocks.age(old) == pytest.approx(10.0)


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_router_that_was_suspended_tells_its_time_again(step):
    hosts = Hosts()
    hosts.tell()
    hosts.ahead += step
    hosts.tell()
    request = hosts.submit()
    hosts.time += 2
    assert hosts.clocks.age(request) == pytest.approx(2.0)


def test_only_so_many_routers_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 10)
    clocks = RouterClocks()
    for number in range(100):
        clocks.told(f"router {number}", 0.0)
    assert len(clocks._routers) == 10
    assert not clocks.is_to_ask("router 99")


def test_a_router_is_asked_again_now_and_then(monkeypatch):
    hosts = Hosts()
    hosts.tell()
    monkeypatch.setattr(module, "ASKED_AGAIN_AFTER", -1.0)
    assert hosts.clocks.is_to_ask(ROUTER)
    assert hosts.clocks.age(hosts.submit()) == 0.0
