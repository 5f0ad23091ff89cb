import json
from types import SimpleNamespace

import pytest

from fleet_worker.protocol import clock
from fleet_worker.protocol.reply import Reply
from fleet_worker.protocol.request import ControlMessage
from fleet_worker.router import control_publisher
from fleet_worker.router.control_publisher import ControlPublisher
from fleet_worker.router.effects import AskAgain, CancelOrphan, Confirm, TellTime

NAME = "llm.fleet.reply.a.60"


class Published:
    """A publisher whose scheduler has time when a test says so, and what it has published."""

    def __init__(self):
        self.later, self.messages = [], []
        submitter = SimpleNamespace(broadcast=lambda _, body: self.messages.append(ControlMessage.decode(body)))
        self.publisher = ControlPublisher(NAME, submitter, SimpleNamespace(soon=self.later.append))
        self.tell = self.publisher.tell


@pytest.fixture
def published():
    return Published()


def test_what_nodes_are_told_at_the_same_time_is_published_together(published, monkeypatch):
    monkeypatch.setattr(control_publisher, "MOST_CANCELLED", 2)
    monkeypatch.setattr(clock, "now", lambda: 5.0)
    for request_id, attempt in [("a", 1), ("b", 2), ("b", 1), ("c", 1)]:
        published.tell(request_id, CancelOrphan("n", attempt))
    published.tell("d", AskAgain("n"))
    published.tell("e", Confirm("n", 2))
    published.tell("f", TellTime("m"))
    assert len(published.later) == 1
    published.later.pop()()
    time_of_router = {"router": NAME, "sent_at": 5.0}
    assert published.messages == [
        ControlMessage(node="n", cancelled=[("a", 1), ("b", 2)], confirmed=[("e", 2)], missed=NAME, **time_of_router),
        ControlMessage(node="n", cancelled=[("c", 1)], **time_of_router),
        ControlMessage(node="m", **time_of_router),
    ]
    published.tell("d", CancelOrphan(None, 1))
    assert len(published.later) == 1


def test_what_strangers_reply_to_invented_requests_is_cancelled_within_bounds(published):
    frames = [{"id": f"\u00e4\n{number}", "attempt": 1, "seq": 0, "kind": "alive"} for number in range(15_000)]
    reply = Reply.decode(json.dumps({"v": 2, "node": "n" * 255, "frames": frames}).encode())
    for frame in reply.frames:
        published.tell(frame.id, CancelOrphan(reply.node, frame.attempt))
    published.tell("r-0", Confirm("a", 1))
    published.later.pop()()
    assert sum(len(message.cancelled) for message in published.messages) == 10_000
    assert published.messages[-1].confirmed == [("r-0", 1)]
    published.tell("r-1", CancelOrphan(None, 1))
    published.later.pop()()
    assert published.messages[-1].cancelled == [("r-1", 1)]


def test_a_wrong_clock_is_logged_once_for_each_node(published, caplog):
    for node in ("m", "n", "m"):
        published.tell("a", TellTime(node))
    assert [record.args for record in caplog.records] == [("m",), ("n",)]
