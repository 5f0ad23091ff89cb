"""What nobody waits for any more is collected for the nodes."""

import gc
import sys
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


def test_a_stream_that_is_forgotten_while_others_are_published_is_published_with_them_or_after_them():
    later, messages = [], []

    class Interrupted(CancelPublisher):
        """The garbage collector runs where the collected requests are taken."""

        @property
        def _missed(self):
            if later and sys._getframe(1).f_code.co_name == "_publish":
                later.clear()
                self.cancel("forgotten", CancelOrphan("n", 1))
            return self._asked

        @_missed.setter
        def _missed(self, asked):
            self._asked = asked

    cancels = Interrupted(SimpleNamespace(soon=later.append), lambda _, body: messages.append(body))
    cancels.ask_again("replies", "n")
    later[0]()
    while later:
        later.pop()()
    assert any(b"forgotten" in message for message in messages)
