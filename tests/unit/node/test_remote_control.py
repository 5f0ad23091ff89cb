"""What a node does with the notices of routers."""

from types import SimpleNamespace

import pytest

from fleet_worker.broker.door import Refused
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
    its, of_another, its_again = (f"llm.fleet.reply.{name}.60" for name in ("its", "another", "its.again"))
    receive(ControlMessage(missed=its).encode())
    receive(ControlMessage(node="two@test", missed=of_another).encode())
    receive(ControlMessage(node="one@test", missed=its_again).encode())
    assert missed == [its, its_again]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"5", b"null", b'"secret"', b"\xff", b'{"cancelled": 5}', b'{"cancelled": [["secret", "many"]]}'),
        *(b'{"cancelled": [["secret", 1, 1]]}', b'{"cancelled": [["secret", -1]]}', b'{"cancelled": [["", 1]]}'),
        *(b'{"cancelled": [["secret", 1e300]]}', b'{"cancelled": [["secret", %s]]}' % (b"9" * 4000)),
        b'{"cancelled": [["%s", 1]]}' % (b"secret" * 100),
        b'{"cancelled": [%s["secret", 1]]}' % (b'["secret", 1],' * 1000),
        *(b'{"missed": "%s"}' % name for name in (b"secret", b"llm.fleet.reply.x.nan", b"llm.fleet.reply.x.9999999")),
        b'{"node": "%s"}' % (b"secret" * 100),
        b"[" * 100_000,
    ],
)
def test_a_bad_notice_is_dropped_without_a_quotation(receive, cancelled, missed, body):
    with pytest.raises(Refused) as caught:
        receive(body)
    assert "secret" not in str(caught.value) + caught.value.detail
    assert cancelled == missed == []
