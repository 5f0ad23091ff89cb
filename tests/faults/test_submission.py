"""A broker that is frozen, cut off or restarted while requests are submitted, and what waits in it meanwhile."""

import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from fleet_worker import BrokerUnavailable, Router, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import lane, lane_queue, transport_of
from fleet_worker.errors import Cancelled
from fleet_worker.registry.view import Registry
from fleet_worker.router.session import Session
from fleet_worker.simulator import SimulatedMLX, reply_tokens
from fleet_worker.testing import running_node
from tests.brokers import Valkey
from tests.envelopes import request_of
from tests.flow.conftest import work
from tests.mlx_clients import took_less_than, until

HELLO = [{"role": "user", "content": "Hello"}]


class Lane:
    """The lane of a model that nobody serves, and a session that sends into it."""

    def __init__(self, url):
        self.url = url
        self.router = Router(Settings(broker_url=url))
        self.session = Session(Settings(broker_url=url), Registry())
        self.model = f"m-{uuid.uuid4().hex[:8]}"
        self.name = lane("chat", self.model)

    def send(self, *, patience=5.0, timeout=60):
        """Return the id of the request."""
        request = request_of(self.router, "chat", self.model, messages=HELLO, timeout=timeout)
        request = request.addressed_to("llm.fleet.reply.test.1")
        self.session.submitter.submit(request, lane("chat", self.model), patience=patience)
        return request.request_id

    def gives_up(self, seconds, **options):
        """Within a second more."""
        with took_less_than(seconds + 1), pytest.raises(BrokerUnavailable) as caught:
            self.send(**options)
        assert caught.value.retryable
        assert f"within {seconds:g} s" in caught.value.message

    def copies(self):
        """Take out what waits; return the ids of the requests, once for each copy."""
        with create_app(Settings(broker_url=self.url)).connection_for_read() as connection:
            queue = lane_queue(self.name, transport_of(self.url))(connection.default_channel)
            return [message.headers["id"] for message in iter(lambda: queue.get(no_ack=True), None)]


@pytest.fixture
def lane_at():
    """Makes lanes at the broker of a URL."""
    with ExitStack() as stack:

        def make(url):
            lane = Lane(url)
            stack.callback(lane.session.close)
            return lane

        yield make


@pytest.fixture
def waiting(broker, lane_at):
    """A lane to which messages have been sent, so that connections are open."""
    lane = lane_at(broker.url)
    with ThreadPoolExecutor(4) as pool:
        sent = {call.result() for call in [pool.submit(lane.send) for _ in range(4)]}
    assert set(lane.copies()) == sent
    return lane


@contextmanager
def frozen(broker):
    broker.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        broker.signal(signal.SIGCONT)


def test_a_broker_that_is_frozen_for_a_moment_has_one_copy_then(broker, waiting):
    with ThreadPoolExecutor(4) as pool:
        with frozen(broker):
            calls = [pool.submit(waiting.send) for _ in range(4)]
            time.sleep(1)
            assert not any(call.done() for call in calls)
        sent = [call.result(20) for call in calls]
    assert sorted(waiting.copies()) == sorted(sent)


@pytest.mark.rest
def test_a_broker_that_stays_frozen_is_given_up(broker, waiting):
    """By more threads than there are connections, too."""
    with frozen(broker), ThreadPoolExecutor(24) as pool:
        for call in [pool.submit(waiting.gives_up, 2.5, patience=2.5) for _ in range(24)]:
            call.result(20)
        waiting.gives_up(0.5, timeout=0.5)


def test_a_router_that_is_closed_while_it_sends_waits_for_no_broker(broker, waiting):
    """By more threads than there are connections."""
    with frozen(broker), ThreadPoolExecutor(24) as pool:
        calls = [pool.submit(waiting.send, patience=3) for _ in range(24)]
        until(lambda: waiting.session.submitter._slots._value == 0)
        with took_less_than(1):
            waiting.session.close()
        assert {type(call.exception(10)) for call in calls} <= {Cancelled, BrokerUnavailable}


@pytest.mark.both_brokers
def test_a_connection_that_was_lost_costs_no_submission_and_makes_no_second_copy(broker, waiting):
    broker.drop_connections()
    with ThreadPoolExecutor(4) as pool:
        sent = [call.result(20) for call in [pool.submit(waiting.send) for _ in range(8)]]
    assert sorted(waiting.copies()) == sorted(sent)


def test_what_a_broker_refuses_fails_at_once(broker, lane_at):
    scheme, _, place = broker.url.partition("://")
    lane = lane_at(f"{scheme}://nobody:hush-hush@{place.rpartition('@')[2]}")
    with took_less_than(10), pytest.raises(BrokerUnavailable, match="refuses the user") as caught:
        lane.send(patience=30)
    assert not caught.value.retryable
    assert "hush" not in str(caught.value)


def test_an_answer_that_comes_too_late_is_not_that_of_another_lane(broker, waiting, lane_at):
    admission, empty = waiting.session.admission, lane_at(broker.url)
    waiting.send()
    assert admission.depth(waiting.name) == 1
    with frozen(broker), took_less_than(1.5):
        assert admission.depth(waiting.name, timeout=0.4) is None
    assert admission.depth(empty.name, timeout=5) == 0


@pytest.fixture
def lasting(broker, tmp_path):
    """A broker that keeps over a restart what it has."""
    if broker.name == "rabbitmq":
        yield broker
        return
    with Valkey(tmp_path) as persistent:
        yield persistent


def test_what_waits_survives_a_restart_and_what_comes_in_the_meantime_joins_it(lasting, lane_at):
    lane = lane_at(lasting.url)
    settings = Settings(broker_url=lasting.url, router={"connect_timeout": 40})
    with Router(settings) as router, ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        router.registry.require_offered = lambda *_: None
        options = {"max_tokens": 5, "timeout": 55}
        streams = [stack.enter_context(router.stream_chat(lane.model, HELLO, **options)) for _ in range(4)]
        lasting.stop()
        calls = [pool.submit(router.chat, lane.model, HELLO, **options) for _ in range(4)]
        lane.gives_up(1, patience=1)
        lasting.start()
        mlx = stack.enter_context(SimulatedMLX(models=[lane.model], tokens=1000))
        stack.enter_context(running_node(lasting.url, base_url=mlx.base_url, models={lane.model: {}}))
        answers = ["".join(delta.content or "" for delta in stream) for stream in streams]
        answers += [call.result(50).content for call in calls]
    assert answers == ["".join(reply_tokens(HELLO, 5, tokens=1000))] * 8
    assert len(work(mlx)) == 8
