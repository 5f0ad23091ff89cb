"""What nobody waits for any more is collected for the nodes."""

import gc
import threading
import weakref
from types import SimpleNamespace

from fleet_worker.router.attempts import CancelOrphan
from fleet_worker.router.cancel_publisher import CancelPublisher


def test_a_stream_that_is_forgotten_while_another_one_is_cancelled_is_cancelled_too():
    later = SimpleNamespace(soon=lambda call: gc.collect())
    cancels = CancelPublisher(later, lambda *_: None)

    class Stream:
        def __init__(self):
            self.itself = self

    weakref.finalize(Stream(), cancels.cancel, "forgotten", CancelOrphan("n", 1))
    thread = threading.Thread(target=cancels.cancel, args=("cancelled", CancelOrphan("n", 2)), daemon=True)
    thread.start()
    thread.join(5)
    assert cancels._cancelled == {"n": {"forgotten": 1, "cancelled": 2}}
