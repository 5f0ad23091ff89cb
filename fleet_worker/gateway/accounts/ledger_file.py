"""The file of a ledger: SQLite, with a row for each request. It holds no text of a request or an answer.

One gateway writes a file. A second one on the same host, with the same setting, writes `ledger-2.sqlite` beside it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.file_lock import Held, hold
from fleet_worker.settings import Settings

SCHEMA = 1
"""The version of the tables, in SQLite's `user_version`."""
MOST_GATEWAYS = 100
"""Gateways of one host with the same setting."""
LOCKED_WITHIN = 5.0
"""Seconds to wait for another program that has locked the file, as one that copies it."""
LONGEST_TEXT = 255
"""Characters of a text."""
LARGEST = 2**53
_TABLES = """
CREATE TABLE IF NOT EXISTS gateway (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    at REAL NOT NULL,
    request_id TEXT NOT NULL,
    key TEXT NOT NULL,
    tags TEXT NOT NULL,
    operation TEXT NOT NULL,
    model_asked TEXT,
    model TEXT,
    node TEXT,
    attempts INTEGER NOT NULL,
    resumed INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    queue_wait REAL,
    ttft REAL,
    duration REAL NOT NULL,
    status INTEGER NOT NULL,
    error TEXT,
    cache TEXT
);
CREATE INDEX IF NOT EXISTS requests_by_time ON requests (at);
CREATE INDEX IF NOT EXISTS requests_by_key ON requests (key, at);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request. Times are seconds."""

    at: float
    """When it arrived, in seconds since the epoch."""
    request_id: str
    key: str
    """The name of the caller's key."""
    tags: tuple[str, ...] = ()
    operation: str
    """As in `chat/completions`: the path without the version."""
    model_asked: str | None = None
    """As the client named it."""
    model: str | None = None
    """Of the fleet, that answered or was tried last."""
    node: str | None = None
    attempts: int = 0
    resumed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, that the server had in its cache."""
    queue_wait: float | None = None
    ttft: float | None = None
    """Until the first token."""
    duration: float
    status: int
    """Of HTTP; 499 if the client left before the answer began."""
    error: str | None = None
    """The code of the error."""
    cache: str | None = None
    """Whether the prompt met its cache: hit, miss, cold or moved. None without an answer, or if that is not known."""


COLUMNS = tuple(field.name for field in fields(Row))
_INSERT = f"INSERT INTO requests ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
_ADDED = {"cache"}
"""Columns that were not in the first version of the table, all of them texts that may be NULL."""


class LedgerFile:
    """An open file, for the one thread that writes it. Raises `sqlite3.Error`, `OSError` or `ConfigurationError` if it
    cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = _hold_first_free(path)
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(self.path, timeout=LOCKED_WITHIN, check_same_thread=False)
            try:
                self.gateway_id = _prepare(self._db)
                self._inode = os.stat(self.path).st_ino
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            self._lock.close()
            raise

    def write(self, rows: Sequence[Row]) -> None:
        """Write all of them, or none."""
        with self._db:
            self._db.executemany(_INSERT, map(_values, rows))

    def forget(self, before: float) -> None:
        """Delete the rows of requests that arrived before a time."""
        with self._db:
            self._db.execute("DELETE FROM requests WHERE at < ?", (before,))

    def tokens_since(self, at: float) -> dict[str, int]:
        """Return the tokens that each key has used, of prompts and answers, since a time."""
        return dict(
            self._db.execute(
                "SELECT key, sum(prompt_tokens + completion_tokens) FROM requests WHERE at >= ? GROUP BY key", (at,)
            )
        )

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to it: it may have been moved away."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self._db.close()
        self._lock.close()


def path_of(settings: Settings) -> Path:
    return settings.gateway.ledger or settings.state_dir / "ledger.sqlite"


def files_of(path: Path) -> list[Path]:
    """Return the ledgers of all gateways of this host with the same setting."""
    return [each for each in _candidates(path) if each.exists()]


def read_only(path: Path) -> sqlite3.Connection:
    """Open a ledger for reading. Raises `sqlite3.Error` if it is none."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=LOCKED_WITHIN)
    try:
        _check_version(db)
    except BaseException:
        db.close()
        raise
    return db


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    for number in range(2, MOST_GATEWAYS + 1):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _hold_first_free(path: Path) -> tuple[Path, IO[str]]:
    for each in _candidates(path):
        try:
            return each, hold(each.with_name(f"{each.name}.lock"))
        except Held:
            continue
    raise ConfigurationError(f"{MOST_GATEWAYS} gateways of this host write {path} and its neighbours already")


def _prepare(db: sqlite3.Connection) -> str:
    """Make the tables if they are not there, and return the id of the gateway."""
    _check_version(db)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    with db:
        db.executescript(_TABLES)
        _add_columns(db)
        db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("INSERT INTO gateway SELECT ? WHERE NOT EXISTS (SELECT 1 FROM gateway)", (uuid.uuid4().hex,))
    with closing(db.execute("SELECT id FROM gateway")) as found:
        return str(found.fetchone()[0])


def _add_columns(db: sqlite3.Connection) -> None:
    """Add the columns that a file of an older version lacks. That version still reads and writes the file."""
    there = {name for _, name, *_ in db.execute("PRAGMA table_info(requests)")}
    for name in _ADDED - there:
        db.execute(f"ALTER TABLE requests ADD COLUMN {name} TEXT")


def _check_version(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA:
        raise sqlite3.DatabaseError("a newer version of fleet-worker has written it")


def _values(row: Row) -> tuple[Any, ...]:
    return tuple(_storable(getattr(row, name)) for name in COLUMNS)


def _storable(value: Any) -> Any:
    """Return what SQLite can store: clients name models, and servers count tokens, as they like."""
    if isinstance(value, tuple):
        return json.dumps(value)
    if isinstance(value, str):
        return value[:LONGEST_TEXT].encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int):
        return min(max(value, -LARGEST), LARGEST)
    return value
