"""What a node does with the notices of routers."""

from types import SimpleNamespace

import pytest

from fleet_worker.node.remote_control import subscription_of
from fleet_worker.protocol.request import ControlMessage


@pytest.fixture
def cancelled():
    return []


@pytest.fixture
def missed():
    return []


@pytest.fixture
def receive(cancelled, missed):
    running = SimpleNamespace(cancel=lambda *request: cancelled.append(request))
    node = SimpleNamespace(name="one@test", running=running, publisher=SimpleNamespace(publish_again=missed.append))
    _, obey = subscription_of(node)
    return lambda body: obey(SimpleNamespace(body=body))


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
