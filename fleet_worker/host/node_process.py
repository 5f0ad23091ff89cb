"""The process of a node of `fleet-worker up`, or of its gateway: when it starts, how it ends, when it starts again."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from fleet_worker import exit_codes
from fleet_worker.errors import ConfigurationError
from fleet_worker.host.child_process import how_ended, kill_group, terminate

log = logging.getLogger(__name__)

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delay before a node that failed is started again, in seconds."""

    first: float = 1.0
    longest: float = 30.0
    forgotten_after: float = 60.0
    """A node that has run this long starts with no failures again."""

    def delay(self, failures: int) -> float:
        """Return 0 after one failure in a row, then `first`, doubled by each more; up to a fifth less at random."""
        if failures <= 1:
            return 0.0
        return min(self.longest, self.first * 2.0 ** min(failures - 2, 60)) * random.uniform(0.8, 1.0)  # noqa: S311


class NodeProcess:
    """One node of this host, or its gateway, whether its process runs or not. No method waits: call `act` at the time
    `due`.
    """

    def __init__(self, instance: str, start: Callable[[str], subprocess.Popen[bytes]], backoff: Backoff) -> None:
        self.instance = instance
        self.name = instance
        """The name of the node, once it has been started."""
        self.wanted = True
        """True if it is started again after its end."""
        self.given_up = False
        """True if its configuration is wrong: it waits for `reload`."""
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
        """The time.monotonic() at which `act` has something to do, unless its process ends before."""
        if self._process:
            return self._killed_at
        return self._starts_at if self.wanted else NEVER

    @property
    def runs(self) -> bool:
        """True if there is a process of it, as far as `reap` has seen."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def gone(self) -> bool:
        """True if it has ended and is not wanted any more."""
        return not self._process and not self.wanted

    def act(self, name: str) -> None:
        """Kill its process if that has not ended in time, or start it under this name."""
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
        """If its process has ended, decide when it starts again."""
        if not self._process or (code := self._process.poll()) is None:
            return
        kill_group(self._process.pid)  # child processes that it has left running
        stopped = self._stopping
        self._process, self._stopping, self._killed_at = None, False, NEVER
        how = how_ended(code)
        if not self.wanted:
            log.info("%s %s", self.name, how)
        elif stopped or code in (exit_codes.RESTART, -signal.SIGHUP):  # it got SIGHUP before its handler was set
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
        """Make it read the configuration again: by SIGHUP if it runs, by a start if not."""
        self._start_at_once()
        if self._process and not self._stopping:
            log.info("%s is told to reload", self.name)
            self._process.send_signal(signal.SIGHUP)

    def replace(self, grace: float) -> None:
        """Stop it, and start it again after its end."""
        self._start_at_once()
        self.stop(grace)

    def _start_at_once(self) -> None:
        self.given_up, self._failures, self._starts_at = False, 0, 0.0

    def stop(self, grace: float) -> None:
        """Send SIGTERM; `act` kills it if it has not ended after `grace` seconds."""
        if self._process and not self._stopping:
            log.info("%s is told to end within %g s", self.name, grace)
            self._stopping, self._killed_at = True, time.monotonic() + grace
            terminate(self._process)

    def kill(self) -> None:
        if self._process:
            self._killed_at = NEVER
            kill_group(self._process.pid)
