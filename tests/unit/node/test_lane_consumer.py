"""What is wanted may change at any time, also while it is being applied."""

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
    """As much of Celery's consumer as a `LaneConsumer` needs. Its event loop turns when a test says so."""

    def __init__(self, connection):
        self.joined = set()
        self.connection = connection
        self.channel_errors = connection.channel_errors
        self.task_consumer = SimpleNamespace(consuming_from=self.joined.__contains__)
        self.add_task_queue = self.joined.add
        self.cancel_task_queue = self.joined.discard
        self.call_soon = lambda *_: None


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
