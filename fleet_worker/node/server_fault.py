"""Decides whether an MLX server has to be restarted: it is there, but does not work, and will not work again.

A canary of the node's own operation decides, as for `readiness`, but with more patience, since a restart ends all that
the server does. There is a fault if

- the server is silent although it was asked for tokens, or does not even answer `/health`, for longer than it may be
  while it loads a model and reads what it was sent (`mlx.activity`), and a canary brings no answer either;
- CANARIES of them in a row failed while `/health` answers, and the server has worked before;
- the server itself says that its generation thread has died.

No fault is a server that takes no connections: `fleet-worker up` sees by itself that its process has ended. Nor is one
that says that it is busy, or that refuses what it was asked for, since a restart would not help.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from fleet_worker.errors import (
    ConnectionFailure,
    FleetError,
    InstanceUnavailable,
    MalformedOutput,
    Overloaded,
    ProviderError,
    RequestTimeout,
)
from fleet_worker.mlx.client import MLXClient
from fleet_worker.node.readiness import Readiness
from fleet_worker.node.running_attempts import RunningAttempts

log = logging.getLogger(__name__)

CANARIES = 3
"""That have to fail in a row."""
UNREADY_ANSWERS = 3
"""In a row, of a server whose `/health` is unready only when its generation thread has died."""
ASK_AGAIN_AFTER = 5.0
"""Seconds between two canaries to a server that is silent."""


class ServerFault:
    """What is known of one server. In the thread of the health monitor, except for `text`, `request_failed` and
    `forget`. `changed` is called when `text` has changed."""

    def __init__(
        self,
        mlx: MLXClient,
        readiness: Readiness,
        running: RunningAttempts,
        *,
        stall_after: float,
        prefill_speed: Callable[[], float | None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._mlx = mlx
        self._readiness = readiness
        self._running = running
        self._stall_after = stall_after
        self._prefill_speed = prefill_speed
        self._changed = changed
        self._next_canary = 0.0
        self.text = ""
        """Why the server has to be restarted; empty if it need not."""
        self._since = 0.0
        """When something was last held against it."""
        self._has_worked = False
        self._failed = 0
        """Canaries in a row."""
        self._unready = 0
        """Answers of `/health` in a row."""

    def forget(self) -> None:
        """It is another server process from now on."""
        self._has_worked, self._failed, self._unready, self._since = False, 0, 0, time.monotonic()
        self._set("")

    # --- What is observed

    def content_received(self, at: float) -> None:
        """The server sent content at this time."""
        if at > self._since:
            self._has_worked, self._failed = True, 0
            self._set("")

    def health_answered(self, ready: bool) -> None:
        self._unready = 0 if ready else self._unready + 1
        if self._unready >= UNREADY_ANSWERS and self._mlx.profile.unready_is_dead:
            self._report("the MLX server says that it cannot work any more")

    def request_failed(self, error: FleetError) -> None:
        """From any thread."""
        if _thread_died(error):
            self._report(error.message)

    def canary_ended(self, failure: FleetError | None, silence: str, *, was_patient: bool) -> None:
        """`silence` is what `silence()` was before the canary. It `was_patient` if it had time for all that a healthy
        server may do before its first token."""
        if failure is None:
            self.content_received(time.monotonic())
        elif _thread_died(failure):
            self._report(failure.message)
        elif silence and self._is_no_answer(failure):
            told = "had no answer in time" if isinstance(failure, RequestTimeout) else f"failed: {failure.message}"
            self._report(f"{silence}, and a canary {told}")
        elif isinstance(failure, RequestTimeout) and not was_patient:
            pass
        elif self._blames(failure):
            self._count(failure)
        else:
            self._failed = 0

    # --- What follows

    def silence(self) -> str:
        """Return how long the server has been silent, in words, if that is longer than a healthy one may be."""
        now, busy_since = time.monotonic(), self._running.busy_since
        if self._readiness.paused:
            return ""
        if busy_since is not None:
            silent = now - max(busy_since, self._mlx.last_content, self._mlx.activity.last_progress)
            if silent > self._stall_after and not self._may_be_silent(silent):
                return f"no token for more than {self._stall_after:g} s while work is in progress"
        silent = self._readiness.silence
        if self._readiness.began_late and silent > self._stall_after and not self._may_be_silent(silent):
            return f"the MLX server has not answered anything for more than {self._stall_after:g} s"
        return ""

    def canary_is_due(self) -> bool:
        """Return whether a canary has to decide about a silence now."""
        now = time.monotonic()
        if self.text or now < self._next_canary or not self.silence():
            return False
        self._next_canary = now + ASK_AGAIN_AFTER
        return True

    def _may_be_silent(self, seconds: float) -> bool:
        return self._mlx.activity.may_be_silent(seconds, self._prefill_speed())

    def _count(self, failure: FleetError) -> None:
        """One that has never worked is set up wrongly, or loads: only that it never answers is held against it."""
        self._since = time.monotonic()
        self._failed += self._has_worked or isinstance(failure, RequestTimeout)
        if self._failed >= CANARIES:
            self._report(f"{self._failed} canaries in a row failed, the last: {failure.message}")

    def _is_no_answer(self, failure: FleetError) -> bool:
        """Return False if the server told that it is busy, refused what it was asked for, or takes no connections: a
        frozen one takes none either, once its backlog is full."""
        if isinstance(failure, InstanceUnavailable) and "status" not in failure.metadata:
            return self._readiness.began_late and self._readiness.silence > 0
        is_answer = isinstance(failure, Overloaded) or type(failure) is ProviderError
        return isinstance(failure, ProviderError) and not is_answer

    def _blames(self, failure: FleetError) -> bool:
        """Return whether a restart may help."""
        if type(failure) is ProviderError:
            return not self._mlx.profile.fails_when_busy
        answered = isinstance(failure, InstanceUnavailable) and "status" in failure.metadata
        return answered or isinstance(failure, RequestTimeout | ConnectionFailure | MalformedOutput)

    def _report(self, text: str) -> None:
        self._since = time.monotonic()
        if not self.text and not self._readiness.paused:
            log.warning("the MLX server has to be restarted: %s", text)
            self._set(text)

    def _set(self, text: str) -> None:
        if text != self.text:
            self.text = text
            self._changed()


def _thread_died(error: FleetError) -> bool:
    return isinstance(error, InstanceUnavailable) and error.metadata.get("instance_died") is True
