"""The process of a node as `fleet-worker up` sees it: it starts, ends, and starts again when its time has come."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.child_process import how_ended

log = logging.getLogger(__name__)

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a node that failed has to wait for its next start. All in seconds."""

    first: float = 1.0
    longest: float = 30.0
    forgotten_after: float = 60.0
    """A node that has lived for so long had no failure before."""

    def delay(self, failures: int) -> float:
        """None after one failure in a row, then `first`, doubled by each more; less by up to a fifth, at random."""
        if failures <= 1:
            return 0.0
        return min(self.longest, self.first * 2.0 ** min(failures - 2, 60)) * random.uniform(0.8, 1.0)  # noqa: S311


class NodeProcess:
    """One node of this host, whether its process runs or not. Nothing here waits: `due` says when to call `act`."""

    def __init__(self, instance: str, start: Callable[[str], subprocess.Popen[bytes]], backoff: Backoff) -> None:
        self.instance = instance
        self.name = instance
        """The node's name, once it has been started."""
        self.wanted = True
        """Whether it runs again after it has ended."""
        self.given_up = False
        """Its configuration is wrong: it waits for `reload`."""
        self._start = start
        self._backoff = backoff
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._failures = 0
        self._started_at = 0.0
        self._starts_at = 0.0
        self._killed_at = NEVER

    @property
    def due(self) -> float:
        """Monotonic seconds at which there is something to do, if its process does not end before."""
        if self._process:
            return self._killed_at
        return self._starts_at if self.wanted else NEVER

    @property
    def gone(self) -> bool:
        return not self._process and not self.wanted

    def act(self, name: str) -> None:
        """Do what is due: kill what did not end in time, or start it under this name."""
        if self._process:
            log.warning("%s did not end in time and is killed", self.name)
            self.kill()
            return
        self.name = name
        self._started_at = time.monotonic()
        try:
            self._process = self._start(name)
        except (OSError, ConfigurationError) as error:  # too many processes, a full disk
            self._fail(f"could not start ({error})")
        else:
            log.info("%s starts, pid %d", name, self._process.pid)

    def reap(self) -> None:
        """Notice that its process has ended, and decide when it starts again."""
        if not self._process or (code := self._process.poll()) is None:
            return
        self._kill_group()  # whatever it has left behind
        stopped = self._stopping
        self._process, self._stopping, self._killed_at = None, False, NEVER
        how = how_ended(code)
        if not self.wanted:
            log.info("%s %s", self.name, how)
        elif stopped or code in (exit_codes.AGAIN, -signal.SIGHUP):  # which was told to reload before it could listen
            self._starts_at = 0.0
            log.info("%s %s, starts again at once", self.name, how)
        elif code == exit_codes.CONFIGURATION:
            self.given_up, self._starts_at = True, NEVER
            log.error("%s %s: its configuration is wrong; starts again when that has been reloaded", self.name, how)
        else:
            self._fail(how)

    def _fail(self, how: str) -> None:
        now = time.monotonic()
        if now - self._started_at >= self._backoff.forgotten_after:
            self._failures = 0
        self._failures += 1
        delay = self._backoff.delay(self._failures)
        self._starts_at = now + delay
        log.warning("%s %s, starts again %s", self.name, how, f"in {delay:.1f} s" if delay else "at once")

    def reload(self) -> None:
        """Have it read the configuration again: a running one is told, another starts now."""
        self._start_at_once()
        if self._process and not self._stopping:
            log.info("%s is told to reload", self.name)
            self._process.send_signal(signal.SIGHUP)

    def replace(self, grace: float) -> None:
        """Start it anew, when it has ended."""
        self._start_at_once()
        self.stop(grace)

    def _start_at_once(self) -> None:
        self.given_up, self._failures, self._starts_at = False, 0, 0.0

    def stop(self, grace: float) -> None:
        """Ask it to end, and have it killed after so many seconds."""
        if self._process and not self._stopping:
            log.info("%s is told to end within %g s", self.name, grace)
            self._stopping, self._killed_at = True, time.monotonic() + grace
            self._process.send_signal(signal.SIGTERM)
            self._process.send_signal(signal.SIGCONT)  # a frozen process does not hear the other

    def kill(self) -> None:
        if self._process:
            self._killed_at = NEVER
            self._kill_group()

    def _kill_group(self) -> None:
        if self._process:
            with suppress(ProcessLookupError, PermissionError):  # it is empty, or macOS has not cleared it away yet
                os.killpg(self._process.pid, signal.SIGKILL)
