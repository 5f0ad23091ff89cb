"""What is wanted may change at any time, also while it is being applied."""

import itertools
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from amqp.exceptions import AccessRefused
from celery import Celery
from kombu import Connection
from redis.exceptions import NoPermissionError

from fleet_worker.broker.topology import lane
from fleet_worker.node import lane_consumer as module
from fleet_worker.node.lane_consumer import LaneConsumer

FIRST, SECOND = lane("chat", "first"), lane("chat", "second")


class Consumer:
    """As much of Celery's consumer as a `LaneConsumer` needs. Its event loop turns when a test says so."""

    def __init__(self, connection):
        self.joined = set()
        self.connection = connection
        self.channel_errors = connection.channel_errors
        self.task_consumer = SimpleNamespace(consuming_from=self.joined.__contains__)
        self.add_task_queue = self.joined.add
        self.cancel_task_queue = self.joined.discard
        self.call_soon = lambda act, *args: self._turns.append(partial(act, *args))
        self._turns = []
        self.timer = SimpleNamespace(call_after=self._call_after)
        self.next_look = None

    def turn(self):
        while self._turns:
            self._turns.pop(0)()

    def _call_after(self, seconds, act):
        self.next_look = seconds
        return SimpleNamespace(cancel=lambda: None)


@pytest.fixture(autouse=True)
def broker(monkeypatch):
    """What the broker refuses: by lane, or with the key "replies"."""
    refused = {}

    def answer(name):
        if error := refused.get(name):
            raise error

    monkeypatch.setattr(module, "confirm_lane", lambda channel, queue: answer(queue.name))
    monkeypatch.setattr(module, "rehearse_replies", lambda channel, transport: answer("replies"))
    return refused


def new_lane_consumer(connection):
    app = Celery(broker="memory://")
    app.amqp.queues.select([])
    lane_consumer = LaneConsumer(app, "redis")
    lane_consumer._consumer = Consumer(connection)
    return lane_consumer, lane_consumer._consumer.joined


@contextmanager
def before_line(number, act):
    """Another thread acts before that many lines of a LaneConsumer have run in the block; yields whether it has."""
    lines, acted = itertools.count(1), []

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line" and next(lines) == number:
            act()
            acted.append(number)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield acted
    finally:
        sys.settrace(before)


def test_what_is_wanted_while_something_else_is_being_done_never_counts_as_done():
    with Connection("memory://") as connection:
        for number in itertools.count(1):
            lane_consumer, joined = new_lane_consumer(connection)
            lane_consumer.consume([FIRST])
            with before_line(number, lambda lane_consumer=lane_consumer: lane_consumer.consume([SECOND])) as acted:
                lane_consumer._apply()
            if not acted:
                break
            assert joined == {SECOND} or not lane_consumer.wait_until_settled(0)
            lane_consumer._apply()
            assert joined == {SECOND}
            assert lane_consumer.wait_until_settled(0)
    assert number > 20


@pytest.fixture
def consuming():
    """A consumer of two lanes."""
    with Connection("memory://") as connection:
        lane_consumer, joined = new_lane_consumer(connection)
        lane_consumer._consumer.channel_errors += (NoPermissionError, AccessRefused)
        lane_consumer.changes = []
        lane_consumer.changed = lambda: lane_consumer.changes.append(lane_consumer.lanes)
        lane_consumer.consume([FIRST, SECOND])
        yield lane_consumer, joined


NO_KEY = NoPermissionError("No permissions to access a key")


def test_nothing_counts_as_joined_before_the_broker_has_confirmed_it(consuming):
    lane_consumer, _ = consuming
    assert lane_consumer.lanes == frozenset()
    lane_consumer._apply()
    assert lane_consumer.lanes == {FIRST, SECOND}
    assert lane_consumer.changes == [{FIRST, SECOND}]


def test_a_lane_whose_consumer_somebody_cancelled_is_joined_again_within_a_second(consuming):
    lane_consumer, joined = consuming
    lane_consumer._apply()
    joined.discard(FIRST)
    assert lane_consumer._consumer.next_look <= 1.0
    lane_consumer._apply()
    assert joined == {FIRST, SECOND}


def test_a_lane_that_the_broker_cancelled_is_not_reported_until_it_is_joined_again(consuming):
    lane_consumer, joined = consuming
    lane_consumer._apply()
    lane_consumer._on_cancelled(FIRST, "tag")
    assert lane_consumer.lanes == {SECOND}
    assert lane_consumer._consumer.next_look == 0.0
    lane_consumer._apply()
    assert joined == lane_consumer.lanes == {FIRST, SECOND}
    assert lane_consumer.changes == [{FIRST, SECOND}, {SECOND}, {FIRST, SECOND}]


def test_a_lane_that_is_refused_harms_no_other_and_is_tried_after_growing_pauses(consuming, broker, caplog):
    lane_consumer, joined = consuming
    broker[FIRST] = NO_KEY
    pauses = []
    for _ in range(6):
        lane_consumer._apply()
        pauses.append(lane_consumer._consumer.next_look)
    assert joined == lane_consumer.lanes == {SECOND}
    assert lane_consumer.refusal.startswith("does not allow its user keys of our names")
    assert pauses == [0.5, 1.0, 2.0, 5.0, 5.0, 5.0]
    assert len(caplog.messages) == 1
    broker.clear()
    lane_consumer._apply()
    assert lane_consumer.lanes == {FIRST, SECOND}
    assert (lane_consumer.refusal, lane_consumer._consumer.next_look) == (None, 0.5)
    assert caplog.messages[1:] == [f"lane {FIRST} is joined now"]


def test_a_node_that_could_not_reply_joins_no_lane(consuming, broker, caplog):
    lane_consumer, joined = consuming
    said = "ACCESS_REFUSED - access to queue 'llm.fleet.cancel.%012x' in vhost '/' refused for user 'n'"
    for number in range(5):
        broker["replies"] = AccessRefused(said % number, (50, 20))
        lane_consumer._apply()
    assert joined == set()
    assert lane_consumer.refusal.startswith("does not allow its user Queue.bind of queue llm.fleet.cancel.*: ")
    assert len(caplog.messages) == 1


def test_replies_are_proved_once_for_a_connection(consuming, broker):
    lane_consumer, joined = consuming
    lane_consumer._apply()
    broker["replies"] = NO_KEY
    joined.clear()
    lane_consumer._apply()
    assert joined == {FIRST, SECOND}
    lane_consumer._step().stop(None, lane_consumer._consumer)
    joined.clear()
    lane_consumer._apply()
    assert joined == set()


def test_a_node_whose_reply_is_refused_leaves_all_lanes_until_the_broker_takes_replies(consuming, broker):
    """Else it would take requests, and nobody would get their answers."""
    lane_consumer, joined = consuming
    lane_consumer._apply()
    broker["replies"] = NO_KEY
    lane_consumer.reply_refused()
    lane_consumer._consumer.turn()
    lane_consumer._apply()
    assert joined == lane_consumer.lanes == set()
    assert lane_consumer.refusal
    broker.clear()
    lane_consumer._apply()
    assert joined == lane_consumer.lanes == {FIRST, SECOND}
