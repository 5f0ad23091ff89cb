"""The ledger: a row for each request, written by a thread of its own, in a batch a second.

    ledger = Ledger(path)         # a ledger that cannot be written is logged once, and tried again
    ledger.add(Row(...))          # never waits
    ledger.dropped                # rows that were not written, because the file could not be for long
    ledger.close()                # writes what is left

No gateway ends, and no request waits or fails, because of it.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from fleet_worker.errors import ConfigurationError
from fleet_worker.gateway.accounts.counts import BUDGETS, begin_of
from fleet_worker.gateway.accounts.ledger_file import LedgerFile, Row

log = logging.getLogger(__name__)

BATCH_EVERY = 1.0
"""Seconds for which rows gather."""
AGAIN_AFTER = 5.0
"""Seconds after which a file that could not be written is tried again."""
MOST_WAITING = 10_000
"""Rows that wait for the file. More are dropped."""
FORGET_EVERY = 3600.0
"""Seconds between two times that old rows are deleted."""
CLOSE_WITHIN = 10.0
"""Seconds to write what is left."""
FAULTS = (sqlite3.Error, OSError, ConfigurationError)


class Ledger:
    """The ledger of one gateway. Rows are deleted after `days`."""

    def __init__(self, path: Path, *, days: float = 400) -> None:
        self.path = path
        """As it was set; another gateway of this host may hold it, and this one writes a file beside it."""
        self._days = days
        self._rows: deque[Row] = deque()
        self._added = threading.Event()
        self._closed = threading.Event()
        self._file: LedgerFile | None = None
        self._failing = False
        self._forgot_at = -FORGET_EVERY
        self._used: Mapping[float, Mapping[str, int]] = {}
        self.gateway_id = uuid.uuid4().hex
        """The same after a restart, if the file can be read."""
        self.dropped = 0
        """Rows that were not written."""
        self._begin()
        self._thread = threading.Thread(target=self._run, name="fleet-ledger", daemon=True)
        self._thread.start()

    def add(self, row: Row) -> None:
        """Write a row soon. If too many wait already, it is dropped."""
        if len(self._rows) >= MOST_WAITING:
            self.dropped += 1
            return
        self._rows.append(row)
        if not self._added.is_set():
            self._added.set()

    def tokens_since(self, key: str, since: float) -> int:
        """Return the tokens that a key had used when the ledger was opened. `since` is the begin of that day or of that
        month, in seconds since the epoch; for any other time the answer is 0.
        """
        return self._used.get(since, {}).get(key, 0)

    def close(self) -> None:
        """Write what is left. Rows that cannot be written count as dropped."""
        self._closed.set()
        self._added.set()
        self._thread.join(CLOSE_WITHIN)

    def _begin(self) -> None:
        """Read what was used before. A file that cannot be opened is opened later."""
        try:
            self._file = LedgerFile(self.path)
            self.gateway_id, now = self._file.gateway_id, time.time()
            self._used = {at: self._file.tokens_since(at) for at in (begin_of(name, now) for name in BUDGETS)}
        except FAULTS as error:
            self._fail(error)

    def _run(self) -> None:
        while not self._closed.is_set():
            self._added.wait()
            self._closed.wait(BATCH_EVERY)
            self._write_all()
            if self._failing:
                self._closed.wait(AGAIN_AFTER)
        self._write_all()
        self.dropped += len(self._rows)
        if self._file:
            self._file.close()

    def _write_all(self) -> None:
        self._added.clear()
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        try:
            file = self._opened()
            file.write(rows)
            self._forget_old_rows(file)
        except FAULTS as error:
            self._rows.extendleft(reversed(rows))
            self._added.set()
            self._fail(error)
        else:
            if self._failing:
                log.info("the ledger %s is written again; %d rows are missing", file.path, self.dropped)
            self._failing = False

    def _opened(self) -> LedgerFile:
        if self._file and not self._file.is_there:
            self._file.close()
            self._file = None
        self._file = self._file or LedgerFile(self.path)
        return self._file

    def _forget_old_rows(self, file: LedgerFile) -> None:
        if time.monotonic() - self._forgot_at >= FORGET_EVERY:
            self._forgot_at = time.monotonic()
            file.forget(time.time() - 86_400 * self._days)

    def _fail(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            log.error("the ledger %s is not written: %s; requests go on", self.path, error)
        if self._file:
            with contextlib.suppress(*FAULTS):
                self._file.close()
            self._file = None
