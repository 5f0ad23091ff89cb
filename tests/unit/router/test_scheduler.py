"""One thread does what is due."""

import queue
import time

import pytest

from fleet_worker.router.scheduler import Scheduler


@pytest.fixture
def scheduler():
    scheduler = Scheduler()
    scheduler.start()
    yield scheduler
    scheduler.close()


def test_everything_is_done_at_its_moment_and_in_that_order(scheduler):
    done = queue.SimpleQueue()
    now = time.monotonic()
    scheduler.at(now + 0.2, lambda: done.put(("later", time.monotonic())))
    scheduler.at(now + 0.1, lambda: done.put(("soon", time.monotonic())))
    scheduler.soon(lambda: done.put(("now", time.monotonic())))
    names, moments = zip(*[done.get(timeout=5) for _ in range(3)], strict=True)
    assert names == ("now", "soon", "later")
    assert moments[1] >= now + 0.1
    assert moments[2] >= now + 0.2


def test_what_fails_does_not_keep_the_rest_from_being_done(scheduler, caplog):
    done = queue.SimpleQueue()

    def fail():
        raise ValueError("a secret")

    scheduler.soon(fail)
    scheduler.soon(lambda: done.put("the rest"))
    assert done.get(timeout=5) == "the rest"
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_who_is_called_may_ask_to_be_called_again(scheduler):
    done = queue.SimpleQueue()
    scheduler.soon(lambda: scheduler.soon(lambda: done.put("again")))
    assert done.get(timeout=5) == "again"


def test_what_is_due_is_done_before_the_end_and_what_is_not_is_forgotten():
    scheduler, done = Scheduler(), []
    scheduler.start()
    scheduler.at(time.monotonic() + 60, lambda: done.append("later"))
    scheduler.soon(lambda: done.append("now"))
    scheduler.close()
    assert done == ["now"]


def test_what_becomes_due_just_before_the_end_is_done(monkeypatch):
    scheduler, done = Scheduler(), []
    look = scheduler._run_due

    def look_and_then_close():
        left = look()
        if not scheduler._closed:
            scheduler.soon(lambda: done.append("just before"))
            scheduler.close(timeout=0)
        return left

    monkeypatch.setattr(scheduler, "_run_due", look_and_then_close)
    scheduler._run()
    assert done == ["just before"]


def test_a_scheduler_that_was_never_started_ends_too():
    Scheduler().close()
