"""Processes that end when their parent has ended, by SIGKILL too: a pipe breaks, of which only the parent held one end.

`fleet-worker up` hands the pipe to its nodes, which then shut down in order. All other children are killed by an
`OrphanKiller`: a foreign program knows nothing of a pipe.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fleet_worker.errors import InstanceUnavailable

log = logging.getLogger(__name__)

PARENT_PIPE = "FLEET_PARENT_PIPE"
"""The variable that names the file descriptor of a node from which it reads the pipe."""
NODE_LOCK = "FLEET_NODE_LOCK"
"""The variable that names the file descriptor of the lock on a node's name."""


@contextmanager
def parent_pipe() -> Iterator[int]:
    """In the parent: yield the file descriptor for its nodes to read from. Nothing is ever written to the pipe.

    The other end closes with the block, or with the process. No child inherits it, as Python opens it with CLOEXEC.
    """
    reader, writer = os.pipe()
    try:
        yield reader
    finally:
        os.close(writer)
        os.close(reader)


def attach_to_parent(node_name: str, *, grace: float) -> None:
    """In a node: shut down when the parent has ended, and end by SIGKILL `grace` seconds later. Wait here, for about
    as long, until an earlier process of this node has ended.

    Does nothing in a process that `fleet-worker up` has not started.

    Raises:
        InstanceUnavailable: the earlier process did not end.
    """
    if descriptor := os.environ.get(PARENT_PIPE):
        threading.Thread(target=_end_with_parent, args=(int(descriptor), grace), name="parent", daemon=True).start()
    if descriptor := os.environ.get(NODE_LOCK):
        _hold(int(descriptor), node_name, grace + 5.0)


def is_supervised() -> bool:
    """In a node: return whether `fleet-worker up` has started this process, and starts it again when it ends."""
    return PARENT_PIPE in os.environ


def _end_with_parent(descriptor: int, grace: float) -> None:
    os.read(descriptor, 1)
    log.warning("fleet-worker up has ended, so this node shuts down")
    # To the main thread: macOS may deliver a signal for the process to this thread, which would not wake the main one.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def _hold(lock: int, node_name: str, timeout: float) -> None:
    """Hold the lock until this process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("%s waits until its earlier process has ended", node_name)
        waiting = threading.Thread(target=fcntl.flock, args=(lock, fcntl.LOCK_EX), daemon=True)
        waiting.start()
        waiting.join(timeout)
        if waiting.is_alive():
            message = f"the earlier process of {node_name} did not end within {timeout:g} s"
            raise InstanceUnavailable(message) from None


class OrphanKiller:
    """Kills a process group if this process ends before `close`.

    A shell does it, outside of our own process group. It is started before the child, so that only the time between
    the child's start and `watch` is not covered.
    """

    _SCRIPT = 'read -r group; read -r end; [ -z "$group" ] || kill -s KILL -- "-$group"'  # `read` fails at once at EOF

    def __init__(self) -> None:
        self._shell = subprocess.Popen(  # noqa: S603 - our own script
            ["/bin/sh", "-c", self._SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, group: int) -> None:
        if self._shell.stdin:
            with suppress(BrokenPipeError):  # somebody has killed the shell
                self._shell.stdin.write(b"%d\n" % group)
                self._shell.stdin.flush()

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        if self._shell.stdin:
            self._shell.stdin.close()
