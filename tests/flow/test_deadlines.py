"""A deadline is a deadline: expired work never starts, running work stops."""

import time

import pytest

from fleet_worker import Expired, InstanceUnavailable, RequestTimeout, Router, Settings
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.in_flight import InFlightRequest
from fleet_worker.router.route import Route
from fleet_worker.simulator import Fault, reply_tokens
from fleet_worker.testing import SimulatedMLX, running_node
from tests.brokers import any_broker
from tests.envelopes import request_of
from tests.flow.conftest import CHAT, work

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def slow(broker):
    """An instance of one slot whose tokens take 50 ms each."""
    with (
        SimulatedMLX(models=[CHAT], token_interval=0.05, tokens=1000) as mlx,
        running_node(broker.url, "slow@test", base_url=mlx.base_url, models={CHAT: {}}),
    ):
        yield mlx


@pytest.fixture
def connected(slow, router):
    """A router that has had an answer: what follows does not wait for its connections, on a busy machine either."""
    router.chat(CHAT, HELLO, max_tokens=1, timeout=20)
    return router


def test_work_that_expired_in_its_lane_never_reaches_the_server(slow, router, broker):
    with slow.held(at_token=3), router.stream_chat(CHAT, HELLO, max_tokens=10, timeout=20) as running:
        next(running)
        # A second router, which is gone when the only slot becomes free: nobody waits for this answer.
        with Router(Settings(broker_url=broker.url)) as other, pytest.raises(Expired):
            other.chat(CHAT, HELLO, timeout=0.5)
        slow.release()
        for _ in running:
            pass
    router.chat(CHAT, HELLO, max_tokens=1, timeout=20)
    assert len(work(slow)) == 2


@pytest.mark.parametrize("expired_for", [1.0, pytest.param(3600.0, marks=pytest.mark.rest)])
def test_what_has_expired_does_not_start_though_its_router_may_say_nothing(slow, caller, expired_for):
    request_id = caller.submit(CHAT, timeout=10.0, expires_at=time.time() - expired_for)
    assert caller.last(request_id).code == "expired"
    assert work(slow) == []


@any_broker
def test_running_work_is_stopped_at_its_deadline(slow, connected):
    started = time.monotonic()
    with pytest.raises(RequestTimeout):
        connected.chat(CHAT, HELLO, max_tokens=900, timeout=1)
    assert time.monotonic() - started < 5
    slow.wait_for(lambda mlx: mlx.counters["running"] == 0, 5)
    assert work(slow)[-1].generated < 100


@any_broker
def test_a_server_that_falls_silent_is_left_at_the_deadline_too(slow, connected):
    slow.fail(Fault("freeze", at_token=3))
    stream = connected.stream_chat(CHAT, HELLO, timeout=1)
    assert [next(stream).content for _ in range(3)] == reply_tokens(HELLO, 3, tokens=1000)
    with pytest.raises(RequestTimeout):
        next(stream)
    connected.chat(CHAT, HELLO, max_tokens=1, timeout=20)  # the slot is free again


@pytest.mark.rest
def test_work_for_a_dead_server_waits_for_it_until_its_deadline(slow, router):
    slow.kill()
    with pytest.raises((InstanceUnavailable, Expired)):  # three attempts in the moment before the node knows, or none
        router.chat(CHAT, HELLO, timeout=3)
    with pytest.raises(Expired):
        router.chat(CHAT, HELLO, timeout=1)
    slow.restart()
    assert router.chat(CHAT, HELLO, max_tokens=1, timeout=20).finish_reason == "length"


def test_a_malformed_envelope_is_answered_and_never_reaches_the_server(slow, router, broker):
    """A router of another make may send what ours would refuse; the worker checks everything again."""
    faults = {
        "protocol_version": 1,
        "operation": "sing",
        "provider": "openai",
        "model": 5,
        "params": {"messages": []},
        "timeout_seconds": -1,
        "schema_version": 1,
    }
    for field, value in faults.items():
        failure = _answer_to(router, {field: value})
        assert failure.code == "invalid_request", field
    assert _answer_to(router, {"model": "SIM.chat"}).code == "model_not_served"
    with Router(Settings(broker_url=broker.url, router={"max_attempts": 1})) as once:
        assert _answer_to(once, {"provider_instance": "other"}).code == "instance_unavailable"
    assert work(slow) == []


def _answer_to(router, changes):
    """Send an envelope around the router's own checks, and return the last frame of its reply."""
    request = request_of(router, "chat", CHAT, messages=HELLO, timeout=10)
    session = router._connected()
    request = request.addressed_to(session.replies.name)
    envelope = request.encode() | changes

    class Tampered(FleetRequest):
        def encode(self):
            return envelope

    tampered = Tampered.model_construct(**dict(request))
    in_flight = session._requests[request.request_id] = InFlightRequest(
        tampered, Route(request, None, session.nodes), session
    )
    buffer = in_flight.join(10)
    in_flight.submit()
    return buffer.get()
