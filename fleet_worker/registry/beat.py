"""When a registry node publishes: Celery's beat, spread over time and quiet in the log."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from celery.beat import Scheduler
from celery.schedules import schedule

from fleet_worker.protocol import clock

log = logging.getLogger(__name__)


class Jittered(schedule):  # type: ignore[misc]
    """Every `seconds`, plus or minus a fifth, so that a thousand hosts that were started together do not publish
    together. A correction of the host's clock changes nothing: set back by an hour, beat would be silent for an hour.
    """

    def __init__(self, seconds: float, *, nowfun: Callable[[], datetime] | None = None, **kwargs: Any) -> None:
        self._seconds = seconds
        first = timedelta(seconds=seconds * random.uniform(0.1, 1.0))  # noqa: S311 - spreads load
        super().__init__(first, nowfun=nowfun or _now, **kwargs)

    def is_due(self, last_run_at: Any) -> Any:
        answer = super().is_due(last_run_at)
        if answer.is_due:
            self.run_every = timedelta(seconds=self._seconds * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load
        return answer


def _now() -> datetime:
    return datetime.fromtimestamp(clock.now(), UTC)


class QuietScheduler(Scheduler):  # type: ignore[misc]
    """Logs once that the broker does not take its tasks, not at every beat, and keeps its schedule in memory."""

    failing = False

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        try:
            self.apply_async(entry, producer=producer, advance=False)
        except Exception as error:
            if not self.failing:
                log.warning("the beat of the registry node cannot reach the broker (%s)", type(error).__name__)
            self.failing = True
        else:
            self.failing = False
