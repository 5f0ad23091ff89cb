"""What the health monitor asks of one MLX server, how often, and what it makes of the answers."""

import math
import threading
import time
from types import SimpleNamespace

import pytest

from fleet_worker.errors import (
    ConfigurationError,
    ConnectionFailure,
    InstanceUnavailable,
    InvalidRequest,
    MalformedOutput,
    ModelNotServed,
    Overloaded,
    ProviderError,
    RequestTimeout,
    Unauthorized,
)
from fleet_worker.mlx.health import Health
from fleet_worker.mlx.profiles import PROFILES
from fleet_worker.node import health_monitor as module
from fleet_worker.node import server_fault
from fleet_worker.node.health_monitor import CANARY_DEADLINE, DOUBT_DEADLINE, LAST_CHANCE, SILENT_FOR, HealthMonitor
from fleet_worker.node.readiness import FAILURES, Readiness
from fleet_worker.settings import WorkerSettings

WITHIN = 5.0
OFFERING = object()
DOWN = InstanceUnavailable("nothing listens there")


class Server:
    """What a client of a server would see; answers are set by the test."""

    def __init__(self, now):
        self.now = now
        self.asked = threading.Condition()
        self.checks = self.lists = 0
        self.ready = True
        self.patience = set()
        self.failing_below = math.inf
        self.failing = self.failing_once = self.canary_fails = self.list_fails = None
        self.canaries = []
        self.canary_begins, self.canary_ends = threading.Event(), threading.Event()
        self.canary_ends.set()
        self.last_content = 0.0
        self.activity = Activity()
        self.profile = PROFILES["mlx_lm"]
        self.unreachable = threading.Event()

    def health(self, timeout):
        with self.asked:
            self.checks += 1
            self.asked.notify_all()
        self.patience.add(timeout)
        once, self.failing_once = self.failing_once, None
        if (error := once or self.failing) and timeout < self.failing_below:
            raise error
        return Health(ready=self.ready, server="mlx_lm")

    def canary(self, offering, deadline):
        self.canaries.append((offering, deadline))
        self.canary_begins.set()
        self.canary_ends.wait(WITHIN)
        if self.canary_fails:
            raise self.canary_fails
        self.last_content = self.now()

    def models(self):
        self.lists += 1
        if self.list_fails:
            raise self.list_fails
        return ["m"]


class Activity:
    """What its requests tell of it."""

    def __init__(self):
        self.last_progress = 0.0
        self.may_be_blocked = False
        self.longest_silence = 0.0
        self.loaded = {"m"}

    def may_be_silent(self, seconds, prefill_speed):
        return seconds < self.longest_silence

    def forget(self):
        self.loaded = set()


class Models:
    """The models of such a node, as far as a monitor knows them."""

    def __init__(self):
        self.offering = OFFERING
        self.lists = []
        self.lost = []
        self.forgotten = 0

    @property
    def available(self):
        return {"m": self.offering}

    def lacks(self, model):
        self.lost.append(model)

    def for_canary(self, loaded):
        return self.offering

    def follow_server(self, reported):
        self.lists.append(reported)

    def forget_missing(self):
        self.forgotten += 1


class Running:
    """The requests that run."""

    def __init__(self):
        self.busy_since = None
        self.stopped = []

    def stop(self, error):
        self.stopped.append(error())
        self.busy_since = None
        return 4


class Watched:
    """A monitor of such a server, with a clock that the test turns."""

    def __init__(self, **settings):
        self.now = 1000.0
        self.server = Server(now=lambda: self.now)
        self.readiness = Readiness(stall_after=20.0, clock=lambda: self.now)
        self.models, self.running = Models(), Running()
        self.changes = []
        self.faults = []
        self.restarts = []
        self.on_change = lambda: None
        self.settings = WorkerSettings(**{"probe_interval": 0.002, "stall_after": 20, **settings})

    def __enter__(self):
        self.monitor = HealthMonitor(
            self.server,
            self.readiness,
            self.models,
            self.running,
            self.settings,
            self._changed,
            lambda: self.restarts.append(self.now),
            fault_changed=lambda: self.faults.append(self.fault),
        )
        self.monitor.start()
        return self

    def __exit__(self, *_):
        self.monitor.close()
        self.server.canary_ends.set()
        self.monitor._thread.join(WITHIN)
        assert not self.monitor._thread.is_alive()

    def _changed(self):
        self.changes.append(self.status)
        self.on_change()

    @property
    def status(self):
        return self.readiness.state.status

    @property
    def fault(self):
        return self.monitor.fault.text

    @property
    def canaries(self):
        return len(self.server.canaries)

    def checked(self, seconds=0.0):
        """Let time pass, and at least one whole check."""
        self.now += seconds
        with self.server.asked:
            seen = self.server.checks
            assert self.server.asked.wait_for(lambda: self.server.checks >= seen + 4, WITHIN)
        return self


@pytest.fixture
def watched(monkeypatch):
    """Time stands still unless the test says otherwise."""
    watched = Watched()
    clock = SimpleNamespace(monotonic=lambda: watched.now, sleep=lambda seconds: None)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(server_fault, "time", clock)
    return watched


@pytest.fixture
def available(watched):
    with watched:
        watched.checked()
        assert (watched.status, watched.canaries) == ("available", 1)
        yield watched


# --- Canaries


def test_a_server_is_proved_by_one_canary_and_left_alone_then(watched):
    with watched:
        watched.checked()
        assert watched.status == watched.changes[-1] == "available"
        for _ in range(5):
            watched.checked(100)
    assert watched.server.canaries == [(OFFERING, 1000.0 + CANARY_DEADLINE)]


def test_there_is_one_canary_for_free_and_then_one_an_interval(watched):
    watched.server.canary_fails = ProviderError("500")
    with watched:
        assert watched.checked().canaries == 2
        assert watched.checked(59.9).canaries == 2
        assert watched.checked(0.1).canaries == 3
        assert watched.checked(59.9).canaries == 3
        watched.server.canary_fails = None
        assert watched.checked(0.1).canaries == 4
        assert watched.status == "available"


def test_a_fault_after_a_canary_that_worked_is_followed_by_one_at_once_and_by_a_second_one_a_minute_later(available):
    for canaries in (2, 3, 4):
        available.readiness.failed(DOWN, "r")
        assert available.checked().canaries == canaries
        assert available.status == "available"
    available.server.canary_fails = ProviderError("500")
    available.readiness.failed(DOWN, "r")
    assert available.checked(59).canaries == 5
    assert available.status == "unavailable"
    assert available.checked(60).canaries == 6


def test_a_server_that_is_away_is_sent_none_and_one_at_once_when_it_is_back(available):
    available.server.failing = DOWN
    for _ in range(5):
        available.checked(100)
        assert (available.canaries, available.status) == (1, "unavailable")
    available.server.failing = None
    assert available.checked().canaries == 2
    assert available.status == "available"


def test_a_server_that_is_not_ready_is_sent_none(available):
    available.server.ready = False
    assert available.checked(100).canaries == 1
    assert available.status == "unavailable"
    available.server.ready = True
    assert available.checked().canaries == 2


def test_a_server_that_works_for_somebody_is_sent_none(watched):
    watched.running.busy_since = watched.now
    with watched:
        assert watched.checked().canaries == 0
        watched.running.busy_since = None
        assert watched.checked().canaries == 1


def test_without_anything_to_ask_for_no_canary_is_spent(watched):
    watched.server.canary_fails = ProviderError("500")
    watched.models.offering = None
    with watched:
        assert watched.checked().canaries == 0
        watched.models.offering = OFFERING
        assert watched.checked().canaries == 2


def test_without_canaries_health_is_the_proof(watched):
    watched.settings = WorkerSettings(canary=False, probe_interval=0.002)
    with watched:
        assert watched.checked().status == "available"
        watched.server.failing = DOWN
        assert watched.checked().status == "unavailable"
        watched.server.failing, watched.server.ready = None, False
        assert watched.checked().status == "unavailable"
        watched.server.ready = True
        assert watched.checked().status == "available"
        watched.on_change = lambda: watched.readiness.failed(DOWN, "r")  # between a check and a canary
        watched.checked()
    assert watched.canaries == 0


# --- Health


def test_one_refused_connection_is_no_verdict(available):
    """A full backlog refuses for a short time."""
    del available.changes[:]
    available.server.failing_once = DOWN
    available.checked()
    assert set(available.changes) == {"available"}


@pytest.mark.parametrize("error", [DOWN, ConnectionFailure("it hung up")])
def test_two_are(available, error):
    available.server.failing = error
    assert available.checked().readiness.state.reason == "the MLX server does not accept connections"


def test_a_late_answer_is_not_asked_for_twice_and_degrades(available):
    available.server.failing = RequestTimeout("late")
    available.checked()
    checks, changes = available.server.checks, len(available.changes)
    available.checked(1)
    assert abs((available.server.checks - checks) - (len(available.changes) - changes)) <= 1
    assert available.status == "degraded"
    available.server.failing = None
    assert available.checked().status == "available"
    assert available.canaries == 1


def test_what_the_server_delivers_counts_as_proof(watched):
    watched.server.canary_fails = ProviderError("500")
    with watched:
        assert watched.checked(1).status == "unavailable"
        watched.server.last_content = watched.now + 0.5
        assert watched.checked(1).status == "available"


def test_silence_in_the_middle_of_work_degrades(available):
    available.running.busy_since = available.now
    available.server.canary_fails = RequestTimeout("late")
    assert available.checked(20).status == "available"
    assert available.checked(0.1).status == "degraded"
    available.server.last_content = available.now + 0.5
    assert available.checked(1).status == "available"


# --- Doubts


def fail(watched):
    for number in range(FAILURES):
        watched.readiness.failed(ProviderError("500"), f"r{number}")


def test_one_silent_request_is_not_taken_for_a_silent_server(available):
    available.running.busy_since = available.now
    assert available.checked(20.1).status == "available"
    assert available.canaries == 2


@pytest.mark.parametrize("busy", [True, False])
def test_requests_that_fail_beside_a_server_that_works_cost_a_canary_each_and_no_lane(available, busy):
    available.running.busy_since = available.now if busy else None
    del available.changes[:]
    for canaries in range(2, 12):
        fail(available)
        assert available.checked().canaries == canaries
    assert set(available.changes) == {"available"}


def test_a_server_that_fails_a_canary_too_is_left_at_once(available):
    available.running.busy_since = available.now
    available.server.canary_fails = ProviderError("500")
    fail(available)
    assert available.checked().status == "unavailable"
    assert available.canaries == 2  # it has work: the next one waits for its end


def test_a_canary_that_is_late_confirms_the_doubt(available):
    available.running.busy_since = available.now
    available.server.canary_fails = RequestTimeout("late")
    fail(available)
    assert available.checked().readiness.state.reason == "3 requests failed in a row, the last: 500"


def test_a_token_that_comes_while_a_canary_waits_ends_the_doubt(available):
    """mlx_lm.server serves a request with a seed alone."""
    available.running.busy_since = available.now
    available.server.canary_fails = RequestTimeout("late")
    available.server.canary_begins.clear()
    available.server.canary_ends.clear()
    del available.changes[:]
    available.now += 1
    fail(available)
    assert available.server.canary_begins.wait(WITHIN)
    available.server.last_content = available.now + 1
    available.server.canary_ends.set()
    available.checked()
    assert set(available.changes) == {"available"}


def test_a_server_that_is_too_busy_for_a_canary_is_asked_again_for_a_while(available):
    """vllm-mlx's Simple engine has one slot, and refuses."""
    available.running.busy_since = available.now
    available.server.canary_fails = Overloaded("busy")
    fail(available)
    assert available.checked(1).checked(1).status == "available"
    assert available.canaries > 3
    available.server.canary_fails = None
    assert available.checked().status == "available"
    available.server.canary_fails = Overloaded("busy")
    fail(available)
    available.checked()
    assert available.checked(DOUBT_DEADLINE).status == "unavailable"


def test_without_canaries_silence_is_a_verdict_and_health_a_proof(watched):
    watched.settings = WorkerSettings(canary=False, probe_interval=0.002)
    with watched:
        fail(watched.checked())
        assert watched.checked().status == "available"
        watched.running.busy_since = watched.now
        watched.checked(20.1)
        assert watched.changes[-1] == "degraded"
        watched.running.busy_since = None
        assert watched.checked().status == "available"
    assert watched.canaries == 0


@pytest.mark.parametrize(("answer", "lost"), [(None, []), (ProviderError("500"), []), (ModelNotServed("no"), ["m"])])
def test_a_model_is_lost_when_the_server_denies_it_to_a_canary_too(available, answer, lost):
    """What a server answers may quote a conversation."""
    available.server.canary_fails = answer
    available.monitor.check_model("m")
    available.checked()
    assert available.models.lost == lost
    assert (available.status, available.canaries) == ("available", 2)


# --- Frozen


@pytest.fixture
def silent(available):
    """It has work, and nothing comes any more."""
    available.now += 1
    available.running.busy_since = available.now
    available.server.last_content = available.now - 0.1
    available.server.failing = RequestTimeout("late")
    return available.checked()


def test_a_frozen_server_loses_its_work_to_others(silent):
    assert silent.running.stopped == []
    (error,) = silent.checked(SILENT_FOR).running.stopped
    assert isinstance(error, InstanceUnavailable)
    assert error.retryable
    assert "frozen" in error.message
    assert LAST_CHANCE in silent.server.patience
    assert silent.status == "degraded"
    assert len(silent.checked(60).running.stopped) == 1


def test_a_full_backlog_of_a_frozen_server_refuses(silent):
    silent.server.failing = DOWN
    silent.checked()
    assert len(silent.checked(SILENT_FOR).running.stopped) == 1


def test_a_slow_server_answers_with_more_time_and_keeps_its_work(silent):
    silent.server.failing_below = LAST_CHANCE
    assert silent.checked(60).running.stopped == []


def test_a_stream_that_moves_keeps_all(silent):
    for _ in range(5):
        silent.server.last_content = silent.now
        silent.checked(SILENT_FOR - 0.5)
    assert silent.running.stopped == []


def test_a_server_that_may_be_blocked_by_a_prompt_keeps_its_work(silent):
    silent.server.activity.may_be_blocked = True
    silent.server.activity.longest_silence = 120.0
    assert silent.checked(60).running.stopped == []
    silent.server.activity.may_be_blocked = False
    assert len(silent.checked().running.stopped) == 1


def test_a_frozen_server_without_work_is_asked_no_last_question(available):
    available.server.failing = RequestTimeout("late")
    available.checked(60)
    assert LAST_CHANCE not in available.server.patience
    assert available.running.stopped == []


# --- Faults, which a restart mends


def failing_canaries(watched, error, times):
    """An idle server fails so many of them in a row, and answers `/health`."""
    watched.server.canary_fails = error
    watched.readiness.failed(DOWN, "r")
    watched.checked()
    while watched.canaries < times + 1:
        watched.checked(60)
    return watched


FAULTS = [ProviderError("500"), ConnectionFailure("it broke"), MalformedOutput("nonsense"), RequestTimeout("late")]
NO_FAULTS = [
    Overloaded("busy"),
    Unauthorized("401"),
    ModelNotServed("no"),
    InvalidRequest("400"),
    ConfigurationError(""),
]


@pytest.mark.parametrize("error", FAULTS)
def test_three_canaries_that_fail_in_a_row_are_a_fault(available, error):
    failing_canaries(available, error, 2)
    assert available.fault == ""
    failing_canaries(available, error, 3)
    assert available.fault == f"3 canaries in a row failed, the last: {error.message}"


@pytest.mark.parametrize("error", NO_FAULTS)
def test_what_a_restart_does_not_mend_is_none(available, error):
    assert failing_canaries(available, error, 9).fault == ""


def test_three_that_are_not_in_a_row_are_none(available):
    for _ in range(4):
        failing_canaries(available, ProviderError("500"), available.canaries + 1)
        available.server.canary_fails = None
        assert available.checked(60).status == "available"
    assert available.fault == ""


def test_one_of_a_server_that_is_busy_in_between_begins_the_count_anew(available):
    failing_canaries(available, ProviderError("500"), 2)
    failing_canaries(available, Overloaded("busy"), 3)
    failing_canaries(available, ProviderError("500"), 5)
    assert available.fault == ""


def test_a_server_that_has_never_worked_is_set_up_wrongly_and_not_restarted_for_what_it_answers(watched):
    watched.server.canary_fails = ProviderError("500: it only embeds")
    with watched:
        for _ in range(9):
            watched.checked(60)
        assert (watched.status, watched.fault) == ("unavailable", "")
        assert watched.canaries >= 9


def test_but_for_answering_nothing_for_three_times_the_time_of_a_start(watched):
    watched.server.canary_fails = RequestTimeout("late")
    with watched:
        for _ in range(3):
            watched.checked(60)
        assert watched.fault.startswith("3 canaries in a row failed")


def test_an_error_of_a_server_with_one_slot_may_mean_that_it_is_busy(available):
    available.server.profile = PROFILES["vllm_mlx"]
    assert failing_canaries(available, ProviderError("500"), 9).fault == ""


def stalled(watched, *, excused=0.0):
    watched.server.activity.longest_silence = excused
    watched.running.busy_since = watched.now
    watched.server.canary_fails = RequestTimeout("late")
    return watched.checked(20.1)


def test_a_stall_that_a_canary_confirms_is_a_fault_and_leaves_no_doubt(available):
    assert stalled(available).fault == (
        "no token for more than 20 s while work is in progress, and a canary had no answer in time"
    )
    canaries = available.canaries
    assert available.checked(60).canaries == canaries
    assert available.faults == [available.fault]


def test_a_stall_of_a_server_that_may_load_or_read_is_none_until_that_takes_too_long(available):
    assert stalled(available, excused=200.0).fault == ""
    assert available.status == "degraded"
    assert available.checked(170).fault == ""
    assert available.checked(15).fault != ""


@pytest.mark.parametrize("answer", [None, Overloaded("busy")])
def test_a_stall_of_a_server_that_answers_a_canary_is_none(available, answer):
    stalled(available, excused=60.0)
    available.server.canary_fails = answer
    for _ in range(9):
        available.checked(20)
        available.running.busy_since = available.running.busy_since or available.now
    assert available.fault == ""


def test_a_token_ends_a_fault(available):
    stalled(available)
    available.server.last_content = available.now = available.now + 1
    assert available.checked().fault == ""
    assert available.faults[-1] == ""


def test_progress_with_a_prompt_is_no_silence(available):
    available.server.activity.last_progress = available.now + 15
    assert stalled(available).fault == ""
    available.server.activity.last_progress = available.now
    assert available.checked(19).fault == ""
    assert available.checked(2).fault != ""


@pytest.mark.parametrize("times", [1, 9])
def test_a_server_that_was_killed_and_is_refused_has_none(available, times):
    """Its process has ended, which others see."""
    available.running.busy_since = available.now
    available.server.failing = available.server.canary_fails = DOWN
    for _ in range(times):
        available.checked(30)
    assert available.fault == ""


def test_a_paused_one_has_none(available):
    available.readiness.pause("away", "a user is at it")
    assert stalled(available).fault == ""
    available.server.ready = False
    assert available.checked(60).fault == ""


def test_a_server_that_was_replaced_is_a_new_one_even_if_nobody_saw_the_old_one_end(available):
    stalled(available)
    available.running.busy_since = None
    available.server.canary_fails = None
    available.now += 1
    available.monitor.server_is_replaced()
    assert available.fault == ""
    available.checked(1)
    assert len(available.restarts) == 1


# --- The list of models


def test_models_are_asked_for_rarely_and_only_of_a_server_that_works(available):
    assert available.checked(299).server.lists == 0
    assert available.checked(1).server.lists == 1
    assert available.models.lists == [["m"]]
    assert available.checked(299).server.lists == 1
    available.server.ready = False
    assert available.checked(100).server.lists == 1
    available.server.ready = True
    assert available.checked().server.lists == 2


def test_a_server_that_came_back_may_have_other_models(available):
    available.checked()
    available.server.failing = DOWN
    available.checked()
    assert available.models.forgotten == 0
    available.server.failing = None
    available.checked()
    assert available.models.forgotten == 1
    assert available.server.lists == 1
    assert available.checked(10).server.lists == 1


def test_a_list_that_cannot_be_read_changes_nothing(available, caplog):
    available.server.list_fails = ProviderError("500 for the list")
    assert available.checked(300).server.lists == 1
    assert (available.models.lists, available.status) == ([], "available")
    assert "500 for the list" in caplog.text


# --- The thread


@pytest.mark.parametrize("broken", ["changed", "health"])
def test_what_goes_wrong_in_it_does_not_end_the_monitor(available, caplog, broken):
    if broken == "changed":
        available.on_change = lambda: int("a secret")
        available.checked()
        available.on_change = lambda: None
    else:
        available.server.failing = ValueError("a secret")
        available.checked()
        available.server.failing = DOWN
        assert available.checked().status == "unavailable"
        available.server.failing = None
    assert available.checked(100).status == "available"
    assert "failed (ValueError), the next one follows" in caplog.text
    assert "a secret" not in caplog.text


def test_it_can_be_told_to_check_now(watched):
    watched.settings = WorkerSettings(probe_interval=60)
    with watched:
        with watched.server.asked:
            assert watched.server.asked.wait_for(lambda: watched.server.checks == 1, WITHIN)
        started = time.monotonic()
        for checks in range(2, 5):
            watched.monitor.check_now()
            with watched.server.asked:
                assert watched.server.asked.wait_for(lambda checks=checks: watched.server.checks >= checks, WITHIN)
        assert time.monotonic() - started < 1


def test_however_many_requests_fail_the_server_is_not_asked_without_a_pause():
    watched = Watched(probe_interval=60)
    with watched:
        ends = time.monotonic() + 0.3
        while time.monotonic() < ends:
            watched.monitor.check_now()
            time.sleep(0.001)
    assert 3 <= watched.server.checks <= 0.3 / module.CHECKS_APART + 2


def test_its_end_does_not_wait_for_a_canary(watched):
    watched.server.canary_ends.clear()
    with watched:
        assert watched.server.canary_begins.wait(WITHIN)
        started = time.monotonic()
        watched.monitor.close()
        assert time.monotonic() - started < 1
    assert watched.server.checks == 1


def test_a_server_that_comes_back_was_restarted(available):
    available.server.failing = DOWN
    available.checked(1)
    assert available.restarts == []
    available.server.failing = None
    available.checked(1)
    assert available.restarts == [1002.0]
    available.checked(1)
    assert available.restarts == [1002.0]


def test_a_server_that_sends_content_while_it_takes_no_connection_was_not_restarted(available):
    """It has more clients than it accepts at a time."""
    available.server.failing = DOWN
    available.checked(1)
    available.now += 1
    available.server.last_content = available.now
    available.server.failing = None
    available.checked(1)
    assert available.models.forgotten == 1
    assert available.restarts == []


def test_a_server_that_was_only_late_was_not_restarted(available):
    available.server.failing = RequestTimeout("late")
    available.checked(1)
    available.server.failing = None
    available.checked(1)
    assert available.restarts == []
