"""What binds a node to the `fleet-worker up` that started it: a pipe that breaks, and a lock that it hands down.

However up ends, by SIGKILL too, the system closes the end of the pipe that only up holds, and its nodes notice.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fleet_worker.errors import InstanceUnavailable

log = logging.getLogger(__name__)

LIFELINE = "FLEET_LIFELINE"
"""The variable that tells a node which of its file descriptors is the end of the pipe to read from."""
LOCK = "FLEET_NODE_LOCK"
"""The variable that tells a node which of its file descriptors is the lock of its name."""


@contextmanager
def lifeline() -> Iterator[int]:
    """In the parent: yield the descriptor to hand to every child. The other end closes with the block, or the process.

    That one is inherited by no child, as Python's descriptors are, or it would stay open without the parent.
    """
    reader, writer = os.pipe()
    try:
        yield reader
    finally:
        os.close(writer)
        os.close(reader)


def bind(node_name: str, *, grace: float) -> None:
    """In the child: end when the parent has ended, warmly, and after `grace` seconds anyhow. Wait until the node of
    this name that was there before has ended; it has the same grace.

    Nothing happens in a process that has no such parent.

    Raises:
        InstanceUnavailable: that node did not end.
    """
    if descriptor := os.environ.get(LIFELINE):
        threading.Thread(target=_follow, args=(int(descriptor), grace), name="lifeline", daemon=True).start()
    if descriptor := os.environ.get(LOCK):
        _succeed(int(descriptor), node_name, grace + 5.0)


def _follow(descriptor: int, grace: float) -> None:
    os.read(descriptor, 1)  # nobody ever writes: it returns when the parent is gone
    log.warning("fleet-worker up is gone, and so this node ends")
    # To the main thread: macOS may hand a signal for the process to this one, and nothing would wake the other.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def _succeed(lock: int, node_name: str, timeout: float) -> None:
    """Hold the lock for the life of this process."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s waits until the one before it has ended", node_name)
        waiting = threading.Thread(target=fcntl.flock, args=(lock, fcntl.LOCK_EX), daemon=True)
        waiting.start()
        waiting.join(timeout)
        if waiting.is_alive():
            message = f"the {node_name} before this one did not end within {timeout:g} s"
            raise InstanceUnavailable(message) from None
