"""What a node does with the notices of routers."""

from types import SimpleNamespace

import pytest

from fleet_worker.node.cancel_listener import CancelListener
from fleet_worker.protocol.request import ControlMessage


@pytest.fixture
def cancelled():
    return []


@pytest.fixture
def missed():
    return []


@pytest.fixture
def receive(cancelled, missed):
    listener = CancelListener("one@test", lambda *request: cancelled.append(request), missed.append)
    return lambda body: listener(SimpleNamespace(body=body))


def test_what_is_cancelled_at_this_node_or_at_all_is_cancelled_and_nothing_else(receive, cancelled, missed):
    receive(ControlMessage(node=None, cancelled=[("a", 1), ("b", 3)]).encode())
    receive(ControlMessage(node="two@test", cancelled=[("c", 1)]).encode())
    receive(ControlMessage(node="one@test", cancelled=[("d", 2)]).encode())
    assert cancelled == [("a", 1), ("b", 3), ("d", 2)]
    assert missed == []


def test_what_a_router_has_missed_is_published_again(receive, missed):
    receive(b'{"missed": "its queue"}')
    receive(b'{"node": "two@test", "missed": "another queue"}')
    receive(b'{"node": "one@test", "missed": "its queue, here"}')
    assert missed == ["its queue", "its queue, here"]


def test_a_bad_notice_is_dropped_without_a_quotation(receive, cancelled, caplog):
    receive(b'{"node": "one@test", "cancelled": [["secret", "many"]]}')
    assert "a notice of a router was dropped" in caplog.text
    assert "secret" not in caplog.text
    assert cancelled == []
