"""What nobody waits for any more is collected for the nodes."""

from types import SimpleNamespace

from fleet_worker.protocol.control import ControlMessage
from fleet_worker.router import cancel_publisher
from fleet_worker.router.attempts import CancelOrphan
from fleet_worker.router.cancel_publisher import CancelPublisher


def test_what_comes_together_is_published_together(monkeypatch):
    monkeypatch.setattr(cancel_publisher, "MAX_IN_ONE_MESSAGE", 2)
    later, messages = [], []
    cancels = CancelPublisher(
        SimpleNamespace(soon=later.append), lambda _, body: messages.append(ControlMessage.decode(body))
    )
    for request_id, attempt in [("a", 1), ("b", 2), ("b", 1), ("c", 1)]:
        cancels.cancel(request_id, CancelOrphan("n", attempt))
    cancels.ask_again("replies", "n")
    assert len(later) == 1
    later.pop()()
    assert messages == [
        ControlMessage(node="n", missed="replies"),
        ControlMessage(node="n", cancelled=[("a", 1), ("b", 2)]),
        ControlMessage(node="n", cancelled=[("c", 1)]),
    ]
    cancels.cancel("d", CancelOrphan(None, 1))
    assert len(later) == 1
