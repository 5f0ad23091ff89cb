"""Tells `fleet-worker up` when this host may work, and why not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import datetime

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.availability.policy import Pauses, Policy
from fleet_worker.host.availability.probes import Probes
from fleet_worker.host.availability.readings import Reader, Readings, probes_of_this_host
from fleet_worker.host.availability.sleep_notice import SleepNotice

log = logging.getLogger(__name__)

Changed = Callable[[str, float], None]
"""Called with the reason why this host must not work, "" if it may, and the seconds that running requests have.
It is called in the thread of the watcher, and must not wait."""

UNKNOWN = "it is not known yet whether it may work"
GOES_TO_SLEEP = "it goes to sleep"
USER_INTERVAL = 1.0
"""Seconds between two checks while a user may return."""
INTERVAL = 5.0
"""Seconds between two checks of all else, and of the clocks."""
LEAST_SLEEP = 3.0
"""Seconds that the clocks of this machine must differ before it has slept."""
NOTICE_EXPIRES = 60.0
"""Seconds after a notice of sleep after which a machine that is awake does not sleep."""

CLOCK_WITH_SLEEP = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC_RAW)
"""A clock that goes on while the machine sleeps: CLOCK_BOOTTIME of Linux, CLOCK_MONOTONIC_RAW of macOS. See
clock_gettime(3) of each. time.monotonic() stands still on both.
"""


def time_asleep() -> float:
    """Return the seconds that this machine has slept since its start."""
    return time.clock_gettime(CLOCK_WITH_SLEEP) - time.monotonic()


class AvailabilityWatcher:
    """Watches the owner of this host from a thread of its own, if `settings` ask for anything."""

    def __init__(
        self,
        settings: AvailabilitySettings,
        *,
        changed: Changed,
        probes: Probes | None = None,
        pauses: Pauses = Pauses(),  # noqa: B008 - it is frozen
        asleep: Callable[[], float] = time_asleep,
    ) -> None:
        self.reason = UNKNOWN if settings.in_use else ""
        """Why this host must not work; "" if it may. Until the first check that is not known, and it must not."""
        self._settings = settings
        self._changed = changed
        self._policy = Policy(settings, pauses)
        self._reader = Reader(settings, probes or probes_of_this_host(), period=INTERVAL)
        self._asleep = asleep
        self._slept = asleep()
        self._goes_to_sleep_at: float | None = None
        self._drained = False
        self._stopped = False
        self._lock = threading.Lock()
        """Held while `changed` is called."""
        self._check_now = threading.Event()
        self._notice = SleepNotice(self._on_sleep_notice)
        self._thread = threading.Thread(target=self._run, name="availability", daemon=True)

    def start(self) -> None:
        """Check for the first time, in its thread; `changed` is called for what is found, also if that is ""."""
        if self._settings.in_use:
            self._notice.start()
            self._thread.start()

    def stop(self) -> None:
        """End the thread and all of its processes. `changed` is not called any more when this returns, which takes two
        seconds at most.
        """
        with self._lock:
            self._stopped = True
        self._check_now.set()
        self._notice.close()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def drained(self) -> None:
        """Tell it that no node runs anything: this machine may go to sleep, if it waits for that."""
        self._drained = bool(self.reason)
        if self.reason == GOES_TO_SLEEP:
            self._notice.allow()

    def _on_sleep_notice(self, asleep: bool) -> None:
        self._goes_to_sleep_at = time.monotonic() if asleep else None
        if not asleep:
            self._on_wake_up()
        self._check_now.set()

    def _run(self) -> None:
        while not self._stopped:
            self._check_now.clear()
            self._check()
            may_return = not self.reason and self._settings.idle_user is not None
            self._check_now.wait(USER_INTERVAL if may_return else INTERVAL)

    def _check(self) -> None:
        if self._asleep() - self._slept > LEAST_SLEEP:
            self._goes_to_sleep_at = None
            self._on_wake_up()
        self._slept = self._asleep()
        reason = self._reason()
        with self._lock:
            if reason == self.reason or self._stopped:
                return
            self.reason = reason
            self._drained = self._drained and bool(reason)
            log.info("this host %s", f"is away: {reason}" if reason else "works")
            self._changed(reason, 0.0 if reason == GOES_TO_SLEEP else self._settings.grace)
        if reason == GOES_TO_SLEEP and self._drained:
            self._notice.allow()

    def _reason(self) -> str:
        announced = self._goes_to_sleep_at
        if announced is not None and time.monotonic() - announced < NOTICE_EXPIRES:
            return GOES_TO_SLEEP
        local = _local_time()
        read = self._reader.read() if self._policy.is_open(local) else Readings()
        return self._policy.reason_to_be_away(time.monotonic(), local, read)

    def _on_wake_up(self) -> None:
        """Everything is read again before this host works: `Pauses.awake` is longer than INTERVAL."""
        log.info("this machine has been asleep")
        self._policy.woke_up(time.monotonic())


def _local_time() -> datetime:
    time.tzset()  # the machine may have travelled
    return datetime.now()
