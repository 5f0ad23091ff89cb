"""Messages that nobody should send, sent straight into a lane."""

import pytest

from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.topology import lane, lane_queue, transport_of
from tests.flow.conftest import CHAT, work

HELLO = [{"role": "user", "content": "Hello"}]
BODIES = [b"{}", b"5", b"[1]", b"[[], {}]", b"[5, {}, {}]", b'[[{"a": 1}], {}, {}]', b"[[], {}, {}]", b"\xff"]


@pytest.mark.parametrize("body", BODIES)
def test_a_message_that_is_no_request_ends_no_node(node, router, mlx, broker, body):
    seen = len(work(mlx))
    queue = lane_queue(lane("chat", CHAT), transport_of(broker.url))
    with create_app(Settings(broker_url=broker.url)).connection_for_write() as connection:
        connection.Producer().publish(
            body,
            exchange="",
            routing_key=queue.name,
            headers={"task": "fleet.chat", "id": "x"},
            content_type="application/json",
            content_encoding="utf-8",
            declare=[queue],
        )
    assert router.chat(CHAT, HELLO, max_tokens=1, timeout=20).finish_reason == "length"
    assert len(work(mlx)) == seen + 1
    assert not node.ended
