"""What was seen of an instance, and what follows from it."""

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fleet_worker.errors import (
    BrokerUnavailable,
    Cancelled,
    ConfigurationError,
    ConnectionFailure,
    ContextLengthExceeded,
    Expired,
    InstanceUnavailable,
    InvalidOutput,
    InvalidRequest,
    MalformedOutput,
    ModelNotServed,
    Overloaded,
    PolicyError,
    ProviderError,
    RequestTimeout,
    StreamInterrupted,
    Unauthorized,
    UnsupportedParameter,
)
from fleet_worker.node.readiness import FAILURES, GIVE_UP_AFTER, Readiness

STALL_AFTER = 20.0
NUMBERS = itertools.count()


class Watched(Readiness):
    """An instance whose clock is turned by the test."""

    def __init__(self, now=1000.0):
        self.now = now
        super().__init__(stall_after=STALL_AFTER, clock=lambda: self.now)

    def after(self, seconds):
        self.now += seconds
        return self

    def token(self):
        """A token arrives, now."""
        self.content_received(self.now)

    @property
    def status(self):
        return self.state.status


@pytest.fixture
def watched():
    return Watched()


@pytest.fixture
def available(watched):
    watched.token()
    assert watched.state.ready
    return watched.after(1)


def failing(watched, *, times=FAILURES, error=None):
    """So many different requests fail."""
    for _ in range(times):
        watched.after(1).failed(error or ProviderError("it failed"), f"r{next(NUMBERS)}")


def sick(watched):
    """And no canary disproves it."""
    failing(watched)
    watched.confirm_doubt()


def silent(watched, began):
    """No token comes of work that runs since then, and none of a canary."""
    watched.busy_since(began)
    watched.confirm_doubt()


# --- The diagram


def test_it_begins_unproven_and_health_is_no_proof(watched):
    assert (watched.status, watched.state.ready) == ("starting", False)
    watched.health_answered(True)
    assert watched.status == "starting"
    assert watched.needs_canary


def test_a_token_is_a_proof(watched):
    watched.token()
    assert watched.state == watched.after(1).state
    assert (watched.status, watched.state.reason, watched.needs_canary) == ("available", "", False)


def test_a_canary_that_worked_is_a_proof(watched):
    watched.canary_ended(None)
    assert watched.status == "available"


def test_a_canary_that_failed_says_why(watched):
    watched.canary_ended(MalformedOutput("a vector is not finite"))
    assert (watched.status, watched.state.reason) == ("unavailable", "a canary failed: a vector is not finite")


def test_what_a_failed_canary_delivered_is_no_proof(watched):
    """A server may send a first token, or a broken vector, and fail then."""
    watched.token()
    watched.after(1).canary_ended(MalformedOutput("no end"))
    watched.content_received(watched.now - 0.5)
    assert watched.status == "unavailable"
    watched.after(1).token()
    assert watched.status == "available"


def test_a_late_answer_degrades_and_the_next_one_restores(available):
    available.health_late(available.now - 0.5)
    assert (available.status, available.state.reason) == ("degraded", "the MLX server answers late")
    assert not available.needs_canary
    available.health_answered(True)
    assert available.status == "available"


def test_a_token_restores_a_late_one_too(available):
    available.health_late(available.now - 0.5)
    available.after(1).token()
    assert available.status == "available"


def test_late_is_no_trouble_while_tokens_arrive(available):
    asked = available.now
    available.after(0.2).token()
    available.after(0.3).health_late(asked)
    assert available.status == "available"


def test_late_for_too_long_is_dead_and_an_answer_alone_does_not_revive_it(available):
    asked = available.now
    available.after(GIVE_UP_AFTER - 0.1).health_late(asked)
    assert available.status == "degraded"
    available.after(0.1).health_late(available.now)
    assert (available.status, available.state.reason) == ("unavailable", "the MLX server does not answer")
    assert not available.needs_canary  # it would not answer that either
    available.health_answered(True)
    assert available.status == "unavailable"
    assert available.needs_canary
    available.canary_ended(None)
    assert available.status == "available"


def test_an_answer_in_between_begins_the_count_of_late_ones_anew(available):
    for _ in range(20):
        available.after(GIVE_UP_AFTER * 0.9).health_late(available.now - 1)
        available.health_answered(True)
    assert available.status == "available"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda seen: seen.connection_refused(), "the MLX server does not accept connections"),
        (lambda seen: seen.health_answered(False), "the MLX server says that it is not ready"),
        (lambda seen: seen.failed(InstanceUnavailable("it is down"), "r"), "it is down"),
        (sick, "3 requests failed in a row, the last: it failed"),
    ],
)
def test_each_of_these_makes_it_unavailable_until_it_has_proved_itself(available, fault, reason):
    fault(available)
    assert (available.status, available.state.reason) == ("unavailable", reason)
    available.after(1).health_answered(True)
    assert available.status == "unavailable"
    available.token()
    assert available.status == "available"


def test_only_a_server_that_says_it_is_ready_is_sent_a_canary(watched):
    """To one that is known to be away it would only tell what is known, and the next one has to wait a minute."""
    assert not watched.needs_canary
    watched.connection_refused()
    assert not watched.needs_canary
    watched.after(1).health_answered(False)
    assert not watched.needs_canary
    watched.after(1).health_answered(True)
    assert watched.needs_canary
    watched.after(1).health_late(watched.now - 0.5)
    assert not watched.needs_canary


# --- Silence in the middle of work


def test_work_without_a_token_degrades_after_a_while(available):
    available.after(1).busy_since(began := available.now)
    available.after(STALL_AFTER).busy_since(began)
    assert available.status == "available"
    available.after(0.1).busy_since(began)
    assert (available.status, available.in_doubt(idle=False)) == ("available", True)
    available.confirm_doubt()
    assert (available.status, available.state.reason) == (
        "degraded",
        "no token for more than 20 s while work is in progress",
    )
    assert not available.state.ready


def test_a_stalled_one_has_to_prove_itself_when_its_work_is_over(available):
    began = available.now
    available.health_answered(True)
    silent(available.after(STALL_AFTER + 1), began)
    available.after(1).busy_since(None)
    available.health_answered(True)
    assert available.status == "degraded"
    assert available.needs_canary
    available.canary_ended(None)
    assert available.status == "available"


def test_a_token_ends_a_stall(available):
    began = available.now
    silent(available.after(STALL_AFTER + 1), began)
    available.after(1).token()
    available.busy_since(began)
    assert available.status == "available"


def test_silence_is_counted_from_the_last_token_and_idle_time_is_not(available):
    began = available.now
    available.after(STALL_AFTER - 1).token()
    available.after(STALL_AFTER - 1).busy_since(began)
    available.after(10 * STALL_AFTER).busy_since(None)
    available.busy_since(available.now)
    assert available.status == "available"


@pytest.mark.parametrize(
    "dead",
    [
        lambda seen: seen.connection_refused(),
        lambda seen: seen.health_answered(False),
        lambda seen: seen.health_late(seen.now - GIVE_UP_AFTER),
        lambda seen: seen.canary_ended(ProviderError("500")),
    ],
)
def test_dead_says_more_than_slow_and_slow_no_more_than_dead(available, dead):
    began = available.now
    silent(available.after(STALL_AFTER + 1), began)
    assert available.status == "degraded"
    dead(available)
    assert available.status == "unavailable"
    reason = available.state.reason
    silent(available.after(1), began)
    assert (available.status, available.state.reason) == ("unavailable", reason)


def test_a_late_one_that_is_then_refused_is_dead_and_no_longer_late(available):
    available.health_late(available.now - 0.5)
    available.after(1).connection_refused()
    assert available.status == "unavailable"
    available.after(1).token()
    assert available.status == "available"


def test_a_stalled_one_that_is_late_as_well_needs_its_proof_when_it_answers(available):
    began = available.now
    silent(available.after(STALL_AFTER + 1), began)
    available.health_late(available.now - 0.5)
    assert (available.status, available.needs_canary) == ("degraded", False)
    available.after(1).health_answered(True)
    assert (available.status, available.needs_canary) == ("degraded", True)


# --- Failures


@pytest.mark.parametrize(
    "error",
    [
        ProviderError("500"),
        ConnectionFailure("broke"),
        MalformedOutput("nonsense"),
        Overloaded("busy"),
        RequestTimeout("no content in time", retryable=True),
        Unauthorized("401"),
        ConfigurationError("redirected"),
    ],
)
def test_these_blame_the_server_if_nothing_else_happens(available, error):
    failing(available, times=FAILURES - 1, error=error)
    assert not available.in_doubt(idle=False)
    failing(available, times=1, error=error)
    assert (available.status, available.in_doubt(idle=False)) == ("available", True)
    available.confirm_doubt()
    assert (available.status, available.in_doubt(idle=False)) == ("unavailable", False)


def test_a_canary_decides_a_doubt(available):
    for _ in range(5):
        failing(available)
        assert available.in_doubt(idle=False)
        available.canary_ended(None)
        assert (available.status, available.in_doubt(idle=False)) == ("available", False)
    failing(available)
    available.canary_ended(ProviderError("500"))
    assert (available.status, available.state.reason) == ("unavailable", "a canary failed: 500")


def test_a_token_of_another_request_ends_a_doubt(available):
    failing(available)
    available.after(0.1).token()
    assert (available.status, available.in_doubt(idle=False)) == ("available", False)


def test_one_request_that_fails_again_and_again_is_a_reason_to_ask_an_idle_server_only(available):
    for _ in range(FAILURES):
        assert not available.in_doubt(idle=True)
        available.after(1).failed(ProviderError("500"), "the same")
    assert available.in_doubt(idle=True)
    assert not available.in_doubt(idle=False)
    failing(available, times=FAILURES - 1)
    assert available.in_doubt(idle=False)


def test_a_server_that_tells_a_request_that_it_is_not_ready_is_in_doubt(available):
    """It may tell so to that request only."""
    available.failed(InstanceUnavailable("503", status=503), "r")
    assert (available.status, available.in_doubt(idle=False)) == ("available", True)
    available.confirm_doubt()
    assert (available.status, available.state.reason) == ("unavailable", "503")


def test_what_is_not_in_doubt_cannot_be_confirmed(available):
    available.confirm_doubt()
    assert available.status == "available"
    failing(available)
    available.after(1).token()
    available.confirm_doubt()
    assert available.status == "available"


@pytest.mark.parametrize("worse", [lambda seen: seen.connection_refused(), lambda seen: seen.health_answered(False)])
def test_what_is_known_to_be_away_is_not_in_doubt(available, worse):
    failing(available)
    worse(available)
    assert (available.status, available.in_doubt(idle=False)) == ("unavailable", False)


# --- Silence of health and of all streams


def test_silence_begins_with_the_first_question_that_nobody_answers(available):
    assert available.silence == 0
    asked = available.now
    available.after(0.5).health_late(asked)
    available.after(0.5).health_late(available.now)
    assert available.silence == 1.0
    available.after(0.5).connection_refused()  # its backlog is full
    assert available.after(0.5).silence == 2.0


@pytest.mark.parametrize(
    "sign",
    [
        lambda seen: seen.token(),
        lambda seen: seen.health_answered(True),
        lambda seen: seen.health_answered(False),
        lambda seen: seen.canary_ended(None),
    ],
)
def test_any_sign_of_life_ends_the_silence(available, sign):
    available.health_late(available.now - 5)
    sign(available.after(1))
    assert available.silence == 0


@pytest.mark.parametrize(
    "error",
    [
        RequestTimeout("the deadline passed"),
        Expired("it waited too long"),
        InvalidRequest("wrong"),
        UnsupportedParameter("seed"),
        InvalidOutput("no JSON"),
        StreamInterrupted("it differs"),
        ContextLengthExceeded("too long"),
        ModelNotServed("another model"),
        PolicyError("not allowed"),
        Cancelled("gone"),
        BrokerUnavailable("away"),
    ],
)
def test_these_say_nothing_about_the_server(available, error):
    failing(available, times=3 * FAILURES, error=error)
    assert available.status == "available"


def test_a_refused_connection_needs_no_second_one(available):
    available.failed(InstanceUnavailable("it is down"), "r")
    assert available.status == "unavailable"


def test_a_success_in_between_begins_the_count_of_failures_anew(available):
    for _ in range(10):
        failing(available, times=FAILURES - 1)
        assert available.status == "available"
        available.after(1).token()
    failing(available, times=FAILURES - 1)
    available.canary_ended(None)
    failing(available, times=FAILURES - 1)
    assert available.status == "available"


def test_a_token_from_before_a_failure_does_not_begin_the_count_anew(available):
    """The monitor reports a token after the task has reported a failure that came later."""
    for _ in range(FAILURES):
        token = available.after(1).now
        failing(available.after(0.1), times=1)
        available.content_received(token)
    assert available.in_doubt(idle=False)


# --- What was seen late


@pytest.mark.parametrize(
    "fault",
    [
        lambda seen: seen.connection_refused(),
        lambda seen: seen.health_answered(False),
        lambda seen: seen.failed(InstanceUnavailable("it is down"), "r"),
        lambda seen: seen.canary_ended(ProviderError("500")),
        sick,
    ],
)
def test_a_token_from_before_a_fault_disproves_nothing(available, fault):
    token = available.now
    fault(available.after(10))
    available.content_received(token)
    assert available.status == "unavailable"


def test_a_token_between_two_faults_does_not_disprove_the_second(available):
    """It worked again and died, all between two checks of the monitor."""
    failing(available)
    token = available.after(5).now
    available.after(0.2).connection_refused()
    available.after(0.1).content_received(token)
    assert available.status == "unavailable"


def test_the_first_reason_stays_as_long_as_nothing_is_proved(available):
    available.connection_refused()
    available.after(1).health_answered(False)
    failing(available)
    assert available.state.reason == "the MLX server does not accept connections"


# --- Drained, and the end


def test_a_node_that_ends_takes_nothing_whatever_the_server_can_do(available):
    available.drain(ending=True)
    assert (available.status, available.state.reason) == ("drained", "the node is ending")
    available.after(1).token()
    available.canary_ended(None)
    available.health_answered(True)
    available.drain()
    available.undrain()
    assert (available.status, available.state.reason) == ("drained", "the node is ending")


def test_a_drained_node_takes_nothing_until_it_is_undrained_and_has_proved_itself(available):
    available.drain()
    available.after(1).token()
    assert (available.status, available.state.ready) == ("drained", False)
    available.health_answered(True)
    available.after(1).undrain()
    assert (available.status, available.needs_canary) == ("starting", True)
    available.after(1).token()
    assert available.status == "available"


def test_what_a_server_does_while_its_node_is_drained_counts_when_it_is_over(available):
    available.drain()
    available.connection_refused()
    assert available.status == "drained"
    available.undrain()
    assert available.status == "unavailable"


def test_undrain_asks_nothing_of_a_node_that_is_not_drained(available):
    available.undrain()
    assert available.status == "available"


# --- Paused by the host


def test_a_paused_one_takes_nothing_whatever_is_seen_of_its_server_and_needs_a_proof_afterwards(available):
    available.pause("away", "a user is at it")
    assert (available.status, available.state.reason, available.state.ready) == ("away", "a user is at it", False)
    available.after(1).connection_refused()
    available.after(1).token()
    available.canary_ended(None)
    available.health_answered(True)
    assert (available.status, available.needs_canary) == ("away", False)
    available.after(1).resume()
    assert (available.status, available.state.ready) == ("starting", False)
    assert available.state.reason == "not tried since it was paused: a user is at it"
    available.after(1).health_answered(True)
    assert available.needs_canary
    available.canary_ended(None)
    assert available.status == "available"


def test_the_last_pause_is_what_is_shown(available):
    available.pause("starting", "its MLX server is restarted: it has died")
    available.pause("away", "a user is at it")
    assert available.status == "away"
    available.resume()
    assert available.status == "starting"


@pytest.mark.parametrize(
    "fault",
    [
        lambda seen: seen.connection_refused(),
        lambda seen: seen.health_late(seen.now - GIVE_UP_AFTER),
        lambda seen: seen.canary_ended(ProviderError("500")),
        sick,
        failing,
    ],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_what_a_server_did_before_it_was_restarted_is_forgotten(available, fault, is_before):
    if is_before:
        fault(available)
    available.pause("starting", "its MLX server is restarted")
    if not is_before:
        fault(available)
    available.after(1).resume()
    assert (available.status, available.state.reason) == (
        "starting",
        "not tried since it was paused: its MLX server is restarted",
    )
    assert (available.needs_canary, available.in_doubt(idle=True), available.silence) == (False, False, 0)
    available.health_answered(True)
    assert available.needs_canary
    failing(available.after(1), times=FAILURES - 1)
    assert not available.in_doubt(idle=True)


def test_no_canary_is_sent_to_a_paused_one_for_a_doubt_either(available):
    failing(available)
    available.pause("away", "at night")
    assert not available.in_doubt(idle=True)


def test_a_token_of_the_server_before_it_was_restarted_proves_nothing(available):
    token = available.now
    available.pause("starting", "restarted")
    available.after(1).resume()
    available.content_received(token)
    assert available.status == "starting"


def test_a_drain_and_a_pause_each_end_by_their_own_counterpart(available):
    available.pause("away", "a user is at it")
    available.drain()
    assert available.status == "drained"
    available.undrain()
    assert (available.status, available.state.reason) == ("away", "a user is at it")
    available.drain()
    available.resume()
    assert available.status == "drained"
    available.after(1).undrain()
    assert (available.status, available.state.ready) == ("starting", False)
    available.after(1).token()
    available.drain()
    available.pause("away", "a user is at it")
    assert available.status == "drained"
    available.undrain()
    assert available.status == "away"
    available.after(1).resume()
    assert available.status == "starting"


def test_the_end_of_the_node_overrides_a_pause_for_good(available):
    available.pause("away", "a user is at it")
    available.drain(ending=True)
    assert available.state.reason == "the node is ending"
    available.resume()
    available.pause("away", "again")
    assert available.state.reason == "the node is ending"


def test_resume_asks_nothing_of_a_node_that_is_not_paused(available):
    available.resume()
    assert available.status == "available"


# --- Any order of all of it


class AnyOrder(RuleBasedStateMachine):
    """What must hold, whatever is seen in whatever order, even what is told late."""

    @initialize()
    def begin(self):
        self.watched = Watched()
        self.proof = self.fault = self.newest = 0.0
        self.doubted_at = 0.0
        self.late_since = None
        self.drained = self.ending = self.paused = False

    @property
    def kept(self):
        """By an order."""
        return self.drained or self.paused

    def later(self, seconds):
        self.watched.after(seconds)

    def blamed(self):
        self.fault = self.watched.now

    @rule(seconds=st.sampled_from([0.1, 0.5, 5.0, 30.0]))
    def time_passes(self, seconds):
        self.later(seconds)

    @rule(age=st.sampled_from([0.0, 0.05, 0.7, 6.0]))
    def token(self, age):
        """Told `age` seconds after it arrived."""
        self.later(0.01)
        at = self.watched.now - age
        self.watched.content_received(at)
        if at > self.newest:
            self.newest, self.late_since = at, None
            if at > self.fault:
                self.proof = self.watched.now
                assert self.watched.state.ready or self.kept

    @rule(error=st.sampled_from([None, ProviderError("500"), RequestTimeout("late")]))
    def canary(self, error):
        self.later(0.01)
        self.watched.canary_ended(error)
        if error:
            self.blamed()
            assert not self.watched.state.ready
        else:
            self.proof, self.late_since = self.watched.now, None
            assert self.watched.state.ready or self.kept

    @rule(ready=st.booleans())
    def answer(self, ready):
        self.later(0.01)
        before = self.watched.state
        self.watched.health_answered(ready)
        self.late_since = None
        if not ready:
            self.blamed()
        elif not before.ready:  # an answer is no proof, unless it was only late
            assert not self.watched.state.ready or before.reason == "the MLX server answers late"

    @rule()
    def refused(self):
        self.later(0.01)
        self.watched.connection_refused()
        self.blamed()
        self.late_since = None
        assert self.watched.status in ("unavailable", "starting") or self.kept

    @rule(patience=st.sampled_from([0.5, 2.0]))
    def late(self, patience):
        self.later(0.01)
        asked = self.watched.now
        self.later(patience)
        self.watched.health_late(asked)
        self.late_since = self.late_since or asked
        if self.watched.now - self.late_since >= GIVE_UP_AFTER:
            self.blamed()
        assert not self.watched.state.ready

    @rule(error=st.sampled_from([InstanceUnavailable("down"), ProviderError("500"), Expired("too late")]))
    def request_failed(self, error):
        self.later(0.01)
        before = self.watched.state
        self.watched.failed(error, f"r{next(NUMBERS)}")
        if isinstance(error, ProviderError):
            self.blamed()
        if isinstance(error, InstanceUnavailable):
            assert not self.watched.state.ready
        else:
            assert self.watched.state == before

    @precondition(lambda self: self.watched.in_doubt(idle=True))
    @rule()
    def no_canary_can_tell(self):
        self.later(0.01)
        self.watched.confirm_doubt()
        self.blamed()
        assert not self.watched.state.ready

    @rule(seconds=st.sampled_from([1.0, 19.0, 21.0]), working=st.booleans())
    def work(self, seconds, working):
        self.later(0.01)
        before = self.watched.state
        since = self.watched.now - seconds
        self.watched.busy_since(since if working else None)
        stalled = working and self.watched.now - max(since, self.newest) > STALL_AFTER
        if stalled:
            self.blamed()
            assert self.watched.in_doubt(idle=True) or not before.ready
        assert self.watched.state == before

    @rule(ending=st.booleans())
    def drain(self, ending):
        self.watched.drain(ending=ending)
        self.drained, self.ending = True, self.ending or ending

    @rule()
    def undrain(self):
        self.later(0.01)
        self.watched.undrain()
        if self.drained and not self.ending:
            self.drained = False
            self.blamed()

    @rule()
    def pause(self):
        self.watched.pause("away", "a user is at it")
        self.paused = True

    @rule()
    def resume(self):
        self.later(0.01)
        self.watched.resume()
        if self.paused:
            self.paused, self.late_since = False, None
            self.blamed()

    @invariant()
    def holds(self):
        state = self.watched.state
        assert state.ready == (state.status == "available") == (not state.reason)
        if state.ready:
            assert self.proof > self.doubted_at
            assert not self.kept
            assert not self.watched.needs_canary
        elif state.reason != "the MLX server answers late":
            self.doubted_at = self.watched.now


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=30)
