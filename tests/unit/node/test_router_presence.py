"""Whether routers listen: asked rarely, remembered for a short time; no outage of the broker makes a router absent."""

import threading
from types import SimpleNamespace

import pytest
from kombu import Connection

from fleet_worker.broker.presence import PRESENCE
from fleet_worker.errors import ReplyLost
from fleet_worker.node import router_presence as module
from fleet_worker.node.router_presence import (
    ANSWER_WITHIN,
    CHECK_EVERY,
    DOUBT_EVERY,
    GONE_AFTER,
    SETTLED_AFTER,
    TRUSTED_FOR,
    RouterPresence,
)
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.settings import Settings
from tests.mlx_clients import until

ROUTER = "llm.fleet.reply.r.60"
ABANDONED_AFTER = 5.0
STEP = 0.05


class Broker:
    """Knows who listens. It may be slow or away. `absent` is what it says of the others."""

    def __init__(self):
        self.listening = {ROUTER}
        self.absent = "silent"
        self.questions = []
        self.error = None
        self.answers = threading.Event()
        self.answers.set()

    def ask(self, channel, transport, reply_queues, learn):
        self.questions += reply_queues
        self.answers.wait(10)
        if error := self.error:
            raise error
        return {each: "here" if each in self.listening else self.absent for each in reply_queues}


class Clock(threading.Condition):
    """The condition of a RouterPresence, and its clock, which only a test moves: by `wait`, or with a question."""

    def __init__(self, broker):
        super().__init__()
        self.now = 1000.0
        self.presence = None
        self._broker = broker
        self._sleeper = None
        """What the thread of the RouterPresence waits for, and until when."""
        self._events = []

    def later(self, seconds, event):
        self._events.append((self.now + seconds, event))

    def wait(self, seconds=None):
        """Let so many seconds pass, while the thread does in each of them what is due."""
        if threading.current_thread() is not threading.main_thread():
            return super().wait(seconds)
        ends = self.now + seconds
        until(self._is_idle)
        while self.now < ends:
            with self:
                self.now += STEP
                self.notify_all()
            for each in [each for each in self._events if each[0] <= self.now]:
                self._events.remove(each)
                each[1]()
            until(self._is_idle)
        return None

    def wait_until(self, condition, seconds=60.0):
        ends = self.now + seconds
        while not condition():
            assert self.now < ends
            self.wait(STEP)

    def wait_for(self, predicate, timeout=None):
        ends = self.now + timeout
        if threading.current_thread() is threading.main_thread():
            self.release()
            self.wait(0.0)
            while not predicate() and self.now < ends:
                self.wait(STEP)
            self.acquire()
        else:
            self._sleeper = predicate, ends
            super().wait_for(lambda: predicate() or self.now >= ends, 10)
            self._sleeper = None
        return predicate()

    def _is_idle(self):
        with self:
            if not self.presence._is_connected or not self._broker.answers.is_set():
                return True
            return self._sleeper and not self._sleeper[0]() and self.now < self._sleeper[1]


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def running():
    return RunningAttempts()


@pytest.fixture
def clock(broker, monkeypatch):
    clock = Clock(broker)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def presence(broker, running, clock, monkeypatch):
    monkeypatch.setattr(module, "look_for", broker.ask)
    presence = RouterPresence(lambda: Connection("memory://"), "redis", running, abandoned_after=ABANDONED_AFTER)
    presence._changed, clock.presence = clock, presence
    presence.start()
    until(lambda: presence._is_connected)
    yield presence
    broker.answers.set()
    presence.close(timeout=5)


def has_outage(presence, broker, clock):
    broker.error = ConnectionError()
    clock.wait_until(lambda: not presence._is_connected)
    broker.error = None
    until(lambda: presence._is_connected)


def test_a_router_is_asked_about_once_for_many_tasks(presence, broker):
    assert all(presence.listens(ROUTER) for _ in range(100))
    assert broker.questions == [ROUTER]


def test_a_router_that_does_not_listen_is_known_and_may_be_back_a_moment_later(presence, broker, clock):
    broker.listening.clear()
    assert [presence.listens(ROUTER) for _ in range(10)] == [False] * 10
    assert len(broker.questions) == 1
    broker.listening.add(ROUTER)
    clock.wait_until(lambda: presence.listens(ROUTER), CHECK_EVERY + STEP)


def test_a_broker_that_does_not_answer_holds_up_nothing_for_long_and_everybody_listens(presence, broker, clock):
    broker.listening.clear()
    broker.answers.clear()
    began = clock.now
    assert presence.listens(ROUTER)
    assert clock.now - began <= ANSWER_WITHIN + STEP


def test_without_a_connection_everybody_listens_at_once(presence, broker, clock):
    broker.error = ConnectionError()
    began = clock.now
    assert presence.listens(ROUTER)
    assert clock.now - began <= STEP


def test_what_runs_for_a_router_that_is_gone_is_stopped_after_a_while_and_the_rest_goes_on(presence, running, clock):
    with running.attempt("a", 1, ROUTER) as kept, running.attempt("b", 1, "gone") as stopped:
        clock.wait(ABANDONED_AFTER - STEP)
        assert stopped.error is None
        clock.wait(2 * CHECK_EVERY + 2 * STEP)
        assert isinstance(stopped.error, ReplyLost)
        assert stopped.error.retryable
        assert kept.error is None


def test_a_router_that_is_back_in_time_is_not_abandoned(presence, broker, running, clock):
    with running.attempt("a", 1, ROUTER) as kept:
        for _ in range(3):
            broker.listening.clear()
            clock.wait(ABANDONED_AFTER - CHECK_EVERY)
            broker.listening.add(ROUTER)
            clock.wait(2 * CHECK_EVERY)
        assert kept.error is None


def test_patience_begins_anew_when_the_broker_was_silent(presence, broker, running, clock):
    with running.attempt("a", 1, "gone") as stop:
        clock.wait_until(lambda: "gone" in presence._seen)
        broker.answers.clear()
        clock.wait(ABANDONED_AFTER + ANSWER_WITHIN)
        broker.answers.set()
        clock.wait(ABANDONED_AFTER - STEP)
        assert stop.error is None
        clock.wait(2 * CHECK_EVERY + 2 * STEP)
        assert stop.error


def test_after_an_outage_patience_begins_anew_and_everybody_counts_as_listening(presence, broker, running, clock):
    broker.listening.clear()
    with running.attempt("a", 1, "gone") as stop:
        clock.wait_until(lambda: "gone" in presence._seen)
        has_outage(presence, broker, clock)
        assert presence.listens(ROUTER)
        clock.wait(ABANDONED_AFTER - STEP)
        assert stop.error is None
        clock.wait_until(lambda: not presence.listens(ROUTER), TRUSTED_FOR)
        clock.wait_until(lambda: stop.error)


def test_after_an_outage_work_is_not_stopped_before_everybody_had_the_time_to_come_back(
    presence, broker, running, clock
):
    """Also if patience is shorter than that."""
    assert ABANDONED_AFTER < TRUSTED_FOR
    with running.attempt("a", 1, "gone") as stop:
        has_outage(presence, broker, clock)
        clock.wait(TRUSTED_FOR - STEP)
        assert stop.error is None
        clock.wait(2 * CHECK_EVERY)
        assert stop.error


def test_a_router_that_is_not_connected_is_waited_for_and_then_its_request_begins_or_does_not(presence, broker, clock):
    broker.listening.clear()
    broker.absent = "away"
    clock.later(0.3, lambda: broker.listening.add(ROUTER))
    assert presence.listens(ROUTER)
    began = clock.now
    assert not presence.listens("gone")
    assert clock.now - began <= GONE_AFTER + DOUBT_EVERY + STEP
    began = clock.now
    assert not presence.listens("gone")
    assert clock.now == began


def test_what_runs_for_a_router_that_is_not_connected_any_more_is_stopped_at_once(presence, broker, running, clock):
    """However patient the node is with those that are silent."""
    presence._abandoned_after = 60.0
    broker.absent = "away"
    with running.attempt("a", 1, ROUTER) as kept, running.attempt("b", 1, "gone") as stopped:
        clock.wait_until(lambda: stopped.error, 2.0)
        assert kept.error is None


def test_a_router_that_reconnects_loses_nothing(presence, broker, running, clock):
    broker.absent = "away"
    with running.attempt("a", 1, ROUTER) as kept:
        clock.wait_until(lambda: ROUTER in presence._seen)
        for _ in range(3):
            broker.listening.clear()
            clock.wait(0.3)
            broker.listening.add(ROUTER)
            clock.wait(2 * CHECK_EVERY)
        assert kept.error is None


def test_a_router_that_was_seen_after_an_outage_and_then_dies_is_not_trusted(presence, broker, running, clock):
    broker.absent = "away"
    with running.attempt("a", 1, ROUTER) as stopped, running.attempt("b", 1, "reconnecting") as kept:
        has_outage(presence, broker, clock)
        clock.wait(SETTLED_AFTER + CHECK_EVERY)
        broker.listening.clear()
        clock.wait_until(lambda: stopped.error, 2.0)
        assert kept.error is None


def test_a_router_that_loses_its_connection_a_moment_after_this_node_is_waited_for(presence, broker, running, clock):
    """A broker that closes all connections does so one by one."""
    broker.absent = "away"
    with running.attempt("a", 1, ROUTER) as kept:
        has_outage(presence, broker, clock)
        clock.wait_until(lambda: ROUTER in presence._seen)
        broker.listening.clear()
        clock.wait(4 * GONE_AFTER)
        broker.listening.add(ROUTER)
        clock.wait(TRUSTED_FOR)
        assert kept.error is None


def test_the_broker_is_asked_about_a_second_apart_and_about_nobody_when_nothing_runs(presence, broker, running, clock):
    with running.attempt("a", 1, ROUTER), running.attempt("b", 1, ROUTER):
        clock.wait(4 * CHECK_EVERY)
    asked = len(broker.questions)
    assert 3 <= asked <= 5
    clock.wait(4 * CHECK_EVERY)
    assert len(broker.questions) <= asked + 1


def test_the_work_of_a_router_that_died_is_stopped_within_two_seconds_and_that_of_a_silent_one_in_half_a_minute():
    assert CHECK_EVERY + GONE_AFTER + 0.25 < 2.0
    assert PRESENCE + 2 * CHECK_EVERY + Settings().worker.abandoned_after <= 30
