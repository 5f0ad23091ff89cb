"""Whether routers listen: asked rarely, remembered for a short time; no outage of the broker makes a router absent."""

import threading
import time

import pytest
from kombu import Connection

from fleet_worker.broker.presence import PRESENCE
from fleet_worker.errors import ReplyLost
from fleet_worker.node import router_presence as module
from fleet_worker.node.router_presence import CHECK_EVERY, GONE_AFTER, RouterPresence
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.settings import Settings
from tests.clients import took_less_than, until

ROUTER = "llm.fleet.reply.r.60"


class Broker:
    """Knows who listens. It may be slow or away. `absent` is what it says of the others."""

    def __init__(self):
        self.listening = {ROUTER}
        self.absent = "silent"
        self.questions = []
        self.error = None
        self.answers = threading.Event()
        self.answers.set()

    def ask(self, channel, transport, reply_queues):
        self.questions += reply_queues
        self.answers.wait(10)
        if error := self.error:
            raise error
        return {each: "here" if each in self.listening else self.absent for each in reply_queues}


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def running():
    return RunningAttempts()


@pytest.fixture
def presence(broker, running, monkeypatch):
    """As quick as a test wants to be."""
    monkeypatch.setattr(module, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(module, "ANSWER_WITHIN", 0.3)
    monkeypatch.setattr(module, "TRUSTED_FOR", 0.3)
    monkeypatch.setattr(module, "GONE_AFTER", 0.2)
    monkeypatch.setattr(module, "DOUBT_EVERY", 0.05)
    monkeypatch.setattr(module, "look_for", broker.ask)
    presence = RouterPresence(lambda: Connection("memory://"), "redis", running, abandoned_after=0.4)
    presence.start()
    until(lambda: presence._is_connected)
    yield presence
    broker.answers.set()
    presence.close(timeout=5)


def test_a_router_is_asked_about_once_for_many_tasks(presence, broker):
    assert all(presence.listens(ROUTER) for _ in range(100))
    assert broker.questions == [ROUTER]


def test_a_router_that_does_not_listen_is_known_and_may_be_back_a_moment_later(presence, broker):
    broker.listening.clear()
    assert [presence.listens(ROUTER) for _ in range(10)] == [False] * 10
    assert len(broker.questions) == 1
    broker.listening.add(ROUTER)
    until(lambda: presence.listens(ROUTER), 1.0)


def test_a_broker_that_does_not_answer_holds_up_nothing_for_long_and_everybody_listens(presence, broker):
    broker.listening.clear()
    broker.answers.clear()
    with took_less_than(1.0):
        assert presence.listens(ROUTER)


def test_without_a_connection_everybody_listens_at_once(presence, broker):
    broker.error = ConnectionError()
    with took_less_than(0.3):
        assert presence.listens(ROUTER)


def test_what_runs_for_a_router_that_is_gone_is_stopped_after_a_while_and_the_rest_goes_on(presence, broker, running):
    with running.attempt("a", 1, ROUTER) as kept, running.attempt("b", 1, "gone") as stopped:
        started = time.monotonic()
        until(lambda: stopped.error)
        assert time.monotonic() - started >= 0.4
        assert isinstance(stopped.error, ReplyLost)
        assert stopped.error.retryable
        assert kept.error is None


def test_a_router_that_is_back_in_time_is_not_abandoned(presence, broker, running):
    with running.attempt("a", 1, ROUTER) as kept:
        for _ in range(3):
            broker.listening.clear()
            time.sleep(0.25)
            broker.listening.add(ROUTER)
            time.sleep(0.15)
        assert kept.error is None


def test_patience_begins_anew_when_the_broker_was_silent(presence, broker, running):
    with running.attempt("a", 1, "gone") as stop:
        until(lambda: "gone" in presence._seen)
        broker.answers.clear()
        time.sleep(0.6)
        broker.answers.set()
        time.sleep(0.2)
        assert stop.error is None
        until(lambda: stop.error)


def test_after_an_outage_patience_begins_anew_and_everybody_counts_as_listening(presence, broker, running):
    broker.listening.clear()
    with running.attempt("a", 1, "gone") as stop:
        until(lambda: "gone" in presence._seen)
        broker.error = ConnectionError()
        until(lambda: not presence._is_connected)
        broker.error = None
        until(lambda: presence._is_connected)
        back = time.monotonic()
        assert presence.listens(ROUTER)
        until(lambda: not presence.listens(ROUTER))
        until(lambda: stop.error)
        assert time.monotonic() - back >= 0.35


def test_after_an_outage_work_is_not_stopped_before_everybody_had_the_time_to_come_back(
    presence, broker, running, monkeypatch
):
    """Also if patience is shorter than that."""
    monkeypatch.setattr(module, "TRUSTED_FOR", 1.0)
    broker.error = ConnectionError()
    with running.attempt("a", 1, "gone") as stop:
        until(lambda: not presence._is_connected)
        broker.error = None
        until(lambda: presence._is_connected)
        back = time.monotonic()
        until(lambda: stop.error)
        assert time.monotonic() - back >= 0.7


def test_a_router_that_is_not_connected_is_waited_for_and_then_its_request_begins_or_does_not(presence, broker):
    broker.listening.clear()
    broker.absent = "away"
    threading.Timer(0.1, broker.listening.add, [ROUTER]).start()
    assert presence.listens(ROUTER)
    with took_less_than(1.0):
        assert not presence.listens("gone")
    with took_less_than(0.01):
        assert not presence.listens("gone")


def test_what_runs_for_a_router_that_is_not_connected_any_more_is_stopped_at_once(presence, broker, running):
    """However patient the node is with those that are silent."""
    presence._abandoned_after = 60.0
    broker.absent = "away"
    with running.attempt("a", 1, ROUTER) as kept, running.attempt("b", 1, "gone") as stopped:
        until(lambda: stopped.error, 1.0)
        assert kept.error is None


def test_a_router_that_reconnects_loses_nothing(presence, broker, running):
    broker.absent = "away"
    with running.attempt("a", 1, ROUTER) as kept:
        until(lambda: ROUTER in presence._seen)
        for _ in range(3):
            broker.listening.clear()
            time.sleep(0.1)
            broker.listening.add(ROUTER)
            time.sleep(0.2)
        assert kept.error is None


def test_a_router_that_was_seen_after_an_outage_and_then_dies_is_not_trusted(presence, broker, running, monkeypatch):
    monkeypatch.setattr(module, "TRUSTED_FOR", 60.0)
    broker.absent, broker.error = "away", ConnectionError()
    with running.attempt("a", 1, ROUTER) as stopped, running.attempt("b", 1, "reconnecting") as kept:
        until(lambda: not presence._is_connected)
        broker.error = None
        until(lambda: "reconnecting" in presence._seen)
        broker.listening.clear()
        until(lambda: stopped.error, 2.0)
        assert kept.error is None


def test_the_broker_is_asked_about_a_second_apart_and_about_nobody_when_nothing_runs(presence, broker, running):
    with running.attempt("a", 1, ROUTER), running.attempt("b", 1, ROUTER):
        time.sleep(0.3)
    asked = len(broker.questions)
    assert asked <= 0.3 / 0.05 + 2
    time.sleep(0.2)
    assert len(broker.questions) <= asked + 1


def test_the_work_of_a_router_that_died_is_stopped_within_two_seconds_and_that_of_a_silent_one_in_half_a_minute():
    assert CHECK_EVERY + GONE_AFTER + 0.25 < 2.0
    assert PRESENCE + 2 * CHECK_EVERY + Settings().worker.abandoned_after <= 30
