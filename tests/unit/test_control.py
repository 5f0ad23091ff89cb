"""What a node hears of cancels, over kombu's in-memory transport."""

import pytest
from kombu import Connection

from fleet_worker.control import Control
from fleet_worker.lanes import cancel_exchange
from fleet_worker.messages import Cancellation
from tests.clients import until


@pytest.fixture
def cancelled():
    return []


@pytest.fixture
def say(cancelled):
    """Publish this as a cancel."""
    control = Control(lambda: Connection("memory://"), "redis", "one@test", lambda *request: cancelled.append(request))
    control.start()
    with Connection("memory://") as connection:
        producer = connection.Producer(serializer="json")

        def say(body):
            producer.publish(body, exchange=cancel_exchange(), routing_key="", declare=[cancel_exchange()])

        def listens():
            say(Cancellation(node="one@test", requests=[("begin", 1)]).model_dump(mode="json"))
            return cancelled

        until(listens)
        yield say
    control.close(timeout=5)


def test_what_is_cancelled_here_or_everywhere_is_heard_and_nothing_else(say, cancelled):
    say(Cancellation(node=None, requests=[("a", 1), ("b", 3)]).model_dump(mode="json"))
    say(Cancellation(node="two@test", requests=[("c", 1)]).model_dump(mode="json"))
    say(Cancellation(node="one@test", requests=[("d", 2)]).model_dump(mode="json"))
    until(lambda: ("d", 2) in cancelled)
    assert [each for each in cancelled if each[0] != "begin"] == [("a", 1), ("b", 3), ("d", 2)]


def test_nonsense_is_dropped_and_the_next_one_is_heard(say, cancelled, caplog):
    say({"node": "one@test", "requests": [["secret", "many"]]})
    say(Cancellation(node=None, requests=[("after", 1)]).model_dump(mode="json"))
    until(lambda: ("after", 1) in cancelled)
    assert "a cancel was dropped" in caplog.text
    assert "secret" not in caplog.text
