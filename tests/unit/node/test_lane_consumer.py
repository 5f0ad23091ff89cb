"""What is wanted may change at any moment, also while it is being done."""

import itertools
import sys
from contextlib import contextmanager
from types import SimpleNamespace

from celery import Celery
from kombu import Connection

from fleet_worker.broker.topology import lane
from fleet_worker.node import lane_consumer as module
from fleet_worker.node.lane_consumer import LaneConsumer

FIRST, SECOND = lane("chat", "first"), lane("chat", "second")


class Consumer:
    """As much of Celery's as an intake needs. Its event loop turns when a test says so."""

    def __init__(self, connection):
        self.joined = set()
        self.connection = connection
        self.channel_errors = connection.channel_errors
        self.task_consumer = SimpleNamespace(consuming_from=self.joined.__contains__)
        self.add_task_queue = self.joined.add
        self.cancel_task_queue = self.joined.discard
        self.call_soon = lambda *_: None


def new_intake(connection):
    app = Celery(broker="memory://")
    app.amqp.queues.select([])
    intake = LaneConsumer(app, "redis")
    intake._consumer = Consumer(connection)
    return intake, intake._consumer.joined


@contextmanager
def before_line(number, act):
    """Another thread acts before that many lines of an intake have run within the block; yields whether it has."""
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
            intake, joined = new_intake(connection)
            intake.follow([FIRST])
            with before_line(number, lambda intake=intake: intake.follow([SECOND])) as acted:
                intake._apply()
            if not acted:
                break
            assert joined == {SECOND} or not intake.settled(0)
            intake._apply()
            assert joined == {SECOND}
            assert intake.settled(0)
    assert number > 20
