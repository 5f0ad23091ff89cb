"""The ledger: what is written, and what happens if it cannot be."""

import logging
import os
import sqlite3
import stat
import time
from contextlib import closing

import pytest

from fleet_worker.gateway.accounts import ledger as module
from fleet_worker.gateway.accounts.counts import begin_of
from fleet_worker.gateway.accounts.ledger import Ledger
from fleet_worker.gateway.accounts.ledger_file import COLUMNS, LedgerFile, Row, files_of, read_only
from fleet_worker.gateway.accounts.usage import usage


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BATCH_EVERY", 0.01)
    monkeypatch.setattr(module, "AGAIN_AFTER", 0.05)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "ledger.sqlite"


def row(request_id="r1", **fields):
    default = {"at": time.time(), "key": "alice", "operation": "chat/completions", "duration": 1.0, "status": 200}
    return Row(**{**default, **fields}, request_id=request_id)


def rows(path, what="request_id"):
    with read_only(path) as db:
        found = db.execute(f"SELECT {what} FROM requests ORDER BY rowid").fetchall()
    db.close()
    return [each[0] for each in found] if "," not in what and what != "*" else found


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def test_each_field_of_a_row_is_written(path):
    given = row(
        tags=("a", "b"),
        model_asked="gpt-4o",
        model="qwen3-14b",
        node="local@mini-7",
        attempts=2,
        resumed=True,
        prompt_tokens=10,
        completion_tokens=20,
        cached_tokens=5,
        queue_wait=0.5,
        ttft=0.25,
        error="timeout",
        cache="hit",
    )
    ledger = Ledger(path)
    ledger.add(given)
    ledger.close()
    (found,) = rows(path, "*")
    expected = {name: getattr(given, name) for name in COLUMNS} | {"tags": '["a", "b"]', "resumed": 1}
    assert dict(zip(COLUMNS, found, strict=True)) == expected


def test_rows_are_written_soon_and_what_is_left_at_the_end(path):
    ledger = Ledger(path)
    ledger.add(row("first"))
    until(lambda: rows(path) == ["first"])
    for number in range(500):
        ledger.add(row(str(number)))
    ledger.close()
    assert rows(path) == ["first", *map(str, range(500))]
    assert ledger.dropped == 0


def test_it_is_readable_by_its_owner_only(path):
    Ledger(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_row_of_a_stranger_stops_the_others(path):
    ledger = Ledger(path)
    ledger.add(row("odd", model_asked="\udcff\0" * 1000, prompt_tokens=10**30, error="\ud800", ttft=float("nan")))
    ledger.add(row("even"))
    ledger.close()
    assert rows(path) == ["odd", "even"]
    assert rows(path, "length(model_asked), prompt_tokens")[0][1] == 2**53


def test_a_gateway_has_the_same_id_after_a_restart_and_another_has_another(path, tmp_path):
    ids = []
    for each in (path, path, tmp_path / "other.sqlite"):
        ledger = Ledger(each)
        ids.append(ledger.gateway_id)
        ledger.close()
    assert ids[0] == ids[1] != ids[2]


def test_each_gateway_of_a_host_has_a_file_of_its_own(path):
    first, second = Ledger(path), Ledger(path)
    first.add(row("first"))
    second.add(row("second"))
    first.close()
    second.close()
    assert [each.name for each in files_of(path)] == ["ledger.sqlite", "ledger-2.sqlite"]
    assert [rows(each) for each in files_of(path)] == [["first"], ["second"]]
    assert first.gateway_id != second.gateway_id


def test_a_ledger_tells_what_was_used_before_it_was_opened(path):
    now = time.time()
    month, day = begin_of("month", now), begin_of("day", now)
    before = Ledger(path)
    for at, tokens in ((month - 1, 1000), (month, 100), (day, 10), (now, 1)):
        before.add(row(at=at, prompt_tokens=tokens, completion_tokens=tokens))
    before.add(row(key="bob", prompt_tokens=7))
    before.close()
    ledger = Ledger(path)
    ledger.close()
    if month != day:
        assert (ledger.tokens_since("alice", month), ledger.tokens_since("alice", day)) == (222, 22)
    assert ledger.tokens_since("bob", day) == 7
    assert ledger.tokens_since("carol", day) == ledger.tokens_since("alice", day + 86_400) == 0


@pytest.fixture
def older(path):
    """A file of the first version, with a row."""
    ledger = Ledger(path)
    ledger.add(row("old", cached_tokens=5))
    ledger.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE requests DROP COLUMN cache")
    return path


def test_a_file_of_an_older_version_gets_the_columns_that_it_lacks(older):
    for name in ("new", "newer"):
        ledger = Ledger(older)
        ledger.add(row(name, cache="hit"))
        ledger.close()
        assert ledger.dropped == 0
    assert rows(older, "request_id, cache") == [("old", None), ("new", "hit"), ("newer", "hit")]


def test_an_older_version_writes_a_file_that_has_got_columns(older):
    Ledger(older).close()
    names = ("at", "request_id", "key", "tags", "operation", "attempts", "resumed", "prompt_tokens")
    names += ("completion_tokens", "cached_tokens", "duration", "status")
    with closing(sqlite3.connect(older)) as db, db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        values = (1.0, "then", "alice", "[]", "chat/completions", *[0] * 5, 1.0, 200)
        db.execute(f"INSERT INTO requests ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", values)
    assert rows(older) == ["old", "then"]


def test_usage_is_read_of_a_file_of_an_older_version(older):
    (used,) = usage([older], "key", 0)
    assert (used.name, used.cached_tokens) == ("alice", 5)


def test_old_rows_are_deleted(path):
    before = Ledger(path)
    before.add(row("old", at=time.time() - 10 * 86_400))
    before.add(row("new", at=time.time() - 8 * 86_400))
    before.close()
    assert rows(path) == ["old", "new"]
    ledger = Ledger(path, days=9)
    ledger.add(row("now"))
    ledger.close()
    assert rows(path) == ["new", "now"]


def unwritable(path):
    """A folder is where the file should be."""
    path.mkdir(parents=True)


def broken(path):
    path.parent.mkdir(parents=True)
    path.write_text("this is no database, but a text that is long enough to have a header of SQLite" * 20, "utf-8")


def newer(path):
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def no_folder(path):
    path.parent.write_text("", "utf-8")


@pytest.mark.parametrize(
    "fault", [unwritable, broken, *(pytest.param(each, marks=pytest.mark.rest) for each in (newer, no_folder))]
)
def test_a_ledger_that_cannot_be_written_is_told_once_and_rows_wait(path, caplog, fault):
    caplog.set_level(logging.INFO)
    fault(path)
    ledger = Ledger(path)
    ledger.add(row("first"))
    time.sleep(0.1)
    assert len(caplog.records) == 1
    assert "requests go on" in caplog.records[0].getMessage()
    if path.is_dir():
        path.rmdir()
    elif path.parent.is_dir():
        path.unlink()
    else:
        path.parent.unlink()
    until(lambda: len(caplog.records) == 2)
    assert "written again; 0 rows are missing" in caplog.records[1].getMessage()
    ledger.add(row("second"))
    ledger.close()
    assert rows(path) == ["first", "second"]


def test_what_is_too_much_to_wait_is_dropped_and_counted(path, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 10)
    unwritable(path)
    ledger = Ledger(path)
    for number in range(25):
        ledger.add(row(str(number)))
    assert ledger.dropped == 15
    ledger.close()
    assert ledger.dropped == 25


def test_a_full_disk_loses_nothing_that_fits_into_memory(path, caplog):
    ledger = Ledger(path)
    ledger.add(row("first"))
    until(lambda: rows(path) == ["first"])
    ledger._file._db.execute("PRAGMA max_page_count = 1")  # SQLite then answers as it does if the disk is full
    for number in range(2000):
        ledger.add(row(str(number), model="m" * 255))
    until(lambda: caplog.records)
    assert "is full" in caplog.records[0].getMessage()
    ledger.close()
    assert len(rows(path)) == 2001  # the limit was one of that connection
    assert ledger.dropped == 0


def test_a_file_that_was_moved_away_is_followed_by_another(path):
    ledger = Ledger(path)
    ledger.add(row("first"))
    until(lambda: rows(path) == ["first"])
    moved = path.with_name("moved.sqlite")
    os.rename(path, moved)
    for suffix in ("-wal", "-shm"):
        if (beside := path.with_name(path.name + suffix)).exists():
            os.rename(beside, moved.with_name(moved.name + suffix))
    ledger.add(row("second"))
    ledger.close()
    assert (rows(moved), rows(path)) == (["first"], ["second"])


def test_another_program_may_read_and_copy_it_meanwhile(path):
    ledger = Ledger(path)
    reader = sqlite3.connect(path)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM requests").fetchall()
    ledger.add(row("first"))
    until(lambda: rows(path) == ["first"])
    reader.close()
    ledger.close()


def test_two_writers_of_one_file_are_refused_one_by_one(path):
    """The lock ends with its holder, and a file is not given away twice."""
    held = LedgerFile(path)
    other = LedgerFile(path)
    assert (held.path.name, other.path.name) == ("ledger.sqlite", "ledger-2.sqlite")
    held.close()
    again = LedgerFile(path)
    assert again.path == path
    other.close()
    again.close()


def test_adding_a_row_never_waits(path):
    ledger = Ledger(path)
    given = row()
    began = time.monotonic()
    for _ in range(5000):
        ledger.add(given)
    assert time.monotonic() - began < 0.5
    ledger.close()
    assert len(rows(path)) == 5000
