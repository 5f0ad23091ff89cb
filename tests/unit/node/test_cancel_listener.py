"""What a node hears of cancels, over kombu's in-memory transport."""

import pytest
from kombu import Connection

from fleet_worker.broker.topology import cancel_exchange
from fleet_worker.node.cancel_listener import CancelListener
from fleet_worker.protocol.control import ControlMessage
from tests.clients import until


@pytest.fixture
def cancelled():
    return []


@pytest.fixture
def missed():
    return []


@pytest.fixture
def say(cancelled, missed):
    """Publish this as a cancel."""
    control = CancelListener(
        lambda: Connection("memory://"), "redis", "one@test", lambda *request: cancelled.append(request), missed.append
    )
    control.start()
    with Connection("memory://") as connection:
        producer = connection.Producer(serializer="json")

        def say(body):
            producer.publish(body, exchange=cancel_exchange(), routing_key="", declare=[cancel_exchange()])

        def listens():
            say(ControlMessage(node="one@test", cancelled=[("begin", 1)]).model_dump(mode="json"))
            return cancelled

        until(listens)
        yield say
    control.close(timeout=5)


def test_what_is_cancelled_here_or_everywhere_is_heard_and_nothing_else(say, cancelled):
    say(ControlMessage(node=None, cancelled=[("a", 1), ("b", 3)]).model_dump(mode="json"))
    say(ControlMessage(node="two@test", cancelled=[("c", 1)]).model_dump(mode="json"))
    say(ControlMessage(node="one@test", cancelled=[("d", 2)]).model_dump(mode="json"))
    until(lambda: ("d", 2) in cancelled)
    assert [each for each in cancelled if each[0] != "begin"] == [("a", 1), ("b", 3), ("d", 2)]


def test_what_a_router_has_missed_is_published_again(say, missed):
    say({"missed": "its queue"})
    say({"node": "two@test", "missed": "another queue"})
    say({"node": "one@test", "missed": "its queue, here"})
    until(lambda: "its queue, here" in missed)
    assert missed == ["its queue", "its queue, here"]


def test_nonsense_is_dropped_and_the_next_one_is_heard(say, cancelled, caplog):
    say({"node": "one@test", "cancelled": [["secret", "many"]]})
    say(ControlMessage(node=None, cancelled=[("after", 1)]).model_dump(mode="json"))
    until(lambda: ("after", 1) in cancelled)
    assert "what a router said was dropped" in caplog.text
    assert "secret" not in caplog.text
