"""`fleet-worker up`: runs all nodes that the configuration of this host asks for, and restarts those that end.

One thread waits for signals and deadlines only. The nodes write to the output of `up` themselves, so that a supervisor
that is slow, stopped or killed neither blocks a node nor loses a line of its log.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.child_process import python
from fleet_worker.host.file_lock import Held, file_name, hold, holder, open_lock
from fleet_worker.host.node_process import NEVER, Backoff, NodeProcess
from fleet_worker.host.parent_pipe import NODE_LOCK, PARENT_PIPE, parent_pipe
from fleet_worker.host.unserved import unserved
from fleet_worker.host.variables import mistyped
from fleet_worker.settings import REGISTRY, Settings

log = logging.getLogger(__name__)

ALLOCATOR = {"MALLOC_ARENA_MAX": "1"}
"""For Linux: otherwise glibc keeps freed memory for each of the many threads of a node."""


def node_command(node_name: str) -> list[str]:
    # -P: do not import a celery.py from the current folder
    return python("-P", "-m", "celery", "-A", "fleet_worker", "worker", "-n", node_name, "--loglevel", "INFO")


def reload_running(settings: Settings) -> int | None:
    """Tell the `up` of this host to read its configuration again; return its process id, or None if none runs.

    It may run under another name, if `host` is what has changed.
    """
    others = [pid for path in settings.state_dir.glob("up-*.lock") if (pid := holder(path))]
    pid = holder(_lock_path(settings)) or (others[0] if len(others) == 1 else None)
    if pid:
        os.kill(pid, signal.SIGHUP)
    return pid


def _lock_path(settings: Settings) -> Path:
    return settings.state_dir / f"up-{settings.host}.lock"


class Supervisor:
    """The supervisor of one host.

    It restarts a node that ends, after a growing delay if the node keeps failing. A node that ends with exit code 78
    waits for another configuration; exit code 75 asks for a restart at once.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        command: Callable[[str], Sequence[str]] = node_command,
        backoff: Backoff = Backoff(),  # noqa: B008 - it is frozen
    ) -> None:
        self._settings = settings
        self._command = command
        self._backoff = backoff
        self._nodes: dict[str, NodeProcess] = {}
        self._exit_code: int | None = None
        """Set as soon as all nodes are being stopped."""
        self._stop_requested = False

    def run(self) -> int:
        """Run until a signal stops it, or no instance can be served; return the exit code. For the main thread only.

        SIGTERM (0) and SIGINT (130) stop all nodes, a second one kills them; SIGHUP reads the configuration again.
        78 means that no instance has opted in any more, or that all their nodes have ended with 78.

        Raises:
            ConfigurationError: no instance has opted in.
            Held: an `up` of this host runs already.
        """
        self._settings.serving()
        with _signals() as received, parent_pipe() as self._pipe:
            self._lock = hold(_lock_path(self._settings))
            try:
                log.info("fleet-worker up, pid %d, runs the nodes of %s", os.getpid(), self._settings.host)
                self._apply(self._settings)
                while self._nodes:
                    due = min(node.due for node in self._nodes.values())
                    for number in received(due - time.monotonic()):
                        self._handle_signal(number)
                    self._check_nodes()
                log.info("fleet-worker up ends: all of its nodes have ended")
            finally:
                self._lock.close()
        return self._exit_code or 0

    def _apply(self, settings: Settings) -> None:
        """Run a node for each instance that has opted in, and the registry node. Disturb none whose settings have not
        changed. Raises `ConfigurationError` if no instance has opted in.
        """
        for found in (*mistyped(settings), *unserved(settings)):
            log.warning("%s", found)
        instances = [*settings.serving(), REGISTRY]
        old, self._settings = self._settings, settings
        moved = (old.broker_url, old.host) != (settings.broker_url, settings.host)
        for instance in set(self._nodes).difference(instances):
            self._retire(self._nodes[instance])
        for instance in instances:
            node = self._nodes.setdefault(instance, NodeProcess(instance, self._start, self._backoff))
            node.wanted = True  # it may be one that is being removed
            if moved:
                node.replace(settings.worker.killed_after)
            elif node.given_up or _settings_of(instance, old) != _settings_of(instance, settings):
                node.reload()

    def _retire(self, node: NodeProcess) -> None:
        node.wanted = False
        node.stop(self._settings.worker.killed_after)

    def _start(self, node_name: str) -> subprocess.Popen[bytes]:
        """Start a process that leads its own group, and holds the lock on the node's name until it ends."""
        with open_lock(self._settings.state_dir / f"node-{file_name(node_name)}.lock") as lock:
            return subprocess.Popen(  # noqa: S603 - our own command line
                self._command(node_name),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                env={**ALLOCATOR, **os.environ, PARENT_PIPE: str(self._pipe), NODE_LOCK: str(lock.fileno())},
                pass_fds=(self._pipe, lock.fileno()),
                start_new_session=True,
            )

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGHUP and self._exit_code is None:
            self._reload()
        elif number in (signal.SIGTERM, signal.SIGINT):
            if self._stop_requested:
                log.warning("%s again: all nodes that still run are killed", signal.Signals(number).name)
                for node in self._nodes.values():
                    node.kill()
            self._stop_requested = True
            self._stop(0 if number == signal.SIGTERM else 128 + number)

    def _reload(self) -> None:
        """A wrong configuration changes nothing; one in which no instance has opted in stops all nodes."""
        try:
            settings = Settings()
            lock = self._lock if _lock_path(settings) == _lock_path(self._settings) else hold(_lock_path(settings))
        except (ConfigurationError, Held) as error:
            log.error("the configuration stays as it was: %s", error)
            return
        if lock is not self._lock:
            self._lock.close()
            self._lock = lock
        log.info("the configuration has been read again")
        try:
            self._apply(settings)
        except ConfigurationError as error:
            log.error("%s", error)
            self._stop(exit_codes.CONFIGURATION)

    def _stop(self, exit_code: int) -> None:
        """Stop all nodes at the same time."""
        if self._exit_code is None:
            self._exit_code = exit_code
            for node in self._nodes.values():
                self._retire(node)

    def _check_nodes(self) -> None:
        for node in list(self._nodes.values()):
            node.reap()
            if node.due <= time.monotonic():
                node.act(f"{node.instance}@{self._settings.host}")
        serving = [node for node in self._nodes.values() if node.instance != REGISTRY and not node.gone]
        if self._exit_code is None and all(node.given_up for node in serving):
            log.error("no instance can be served with this configuration")
            self._stop(exit_codes.CONFIGURATION)
        self._nodes = {instance: node for instance, node in self._nodes.items() if not node.gone}


def _settings_of(instance: str, settings: Settings) -> Any:
    """Return the part of the settings that a node reads; the registry node reads all instances."""
    common = settings.model_dump(exclude={"router", "instances"})
    return common, settings.instances if instance == REGISTRY else settings.instances.get(instance)


@contextmanager
def _signals() -> Iterator[Callable[[float], bytes]]:
    """Yield a function that waits at most that many seconds, and returns the numbers of the signals that arrived.

    They arrive through a file descriptor: the system may deliver a signal to any thread, and a signal just before the
    wait must end it. SIGCHLD ends it too: one or several children have ended.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handled = [signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM]  # SIGHUP under nohup too
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
        handled.append(signal.SIGINT)
    # Python writes a signal to the file descriptor only if the signal has a handler in Python.
    handlers = {number: signal.signal(number, lambda *_: None) for number in handled}

    def received(timeout: float) -> bytes:
        ready, _, _ = select.select([reader], [], [], None if timeout == NEVER else max(0.0, timeout))
        return reader.recv(4096) if ready else b""

    with reader, writer:
        try:
            yield received
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
