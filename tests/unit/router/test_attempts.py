"""The state machine of a request: what each frame, each silence and each failure leads to, in whatever order."""

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fleet_worker.broker.topology import reply_name
from fleet_worker.errors import (
    Cancelled,
    ConnectionFailure,
    Expired,
    FleetError,
    InstanceUnavailable,
    InvalidRequest,
    NodeLost,
    Overloaded,
    PoisonSuspected,
    ProviderError,
    ReplyLost,
    RequestTimeout,
    StreamInterrupted,
)
from fleet_worker.protocol.reply import (
    Accepted,
    Alive,
    ChatResponse,
    Delta,
    Deltas,
    EmbedResponse,
    Failure,
    Timings,
    Usage,
)
from fleet_worker.protocol.request import FleetRequest, Resume
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.router.attempts import ASK_AGAIN_EVERY, GAP_CLOSES_WITHIN, Attempts
from fleet_worker.router.deaths import Silence
from fleet_worker.router.effects import AskAgain, CancelOrphan, Confirm, Deliver, End, RetryAfter, TellTime

WORDS = [f" word{number}" for number in range(6)]
FACTS = {
    "node": "n",
    "instance": "i",
    "model": "m",
    "usage": Usage(),
    "timings": Timings(queue_wait=0.0, duration=1.0),
}


def request(operation="stream_chat", **params):
    body = {"input": ["a"]} if operation == "embed" else {"messages": [{"role": "user", "content": "Hello"}]}
    return FleetRequest.build(
        {
            "protocol_version": 2,
            "request_id": "r",
            "correlation_id": "r",
            "idempotency_key": "r",
            "attempt": 1,
            "operation": operation,
            "provider": "mlx",
            "provider_instance": "any",
            "model": "m",
            "params": {**body, **params},
            "reply_to": reply_name("test", 60),
            "message_context": {},
            "caller": {},
            "trace_context": {},
            "signed_token": None,
            "timeout_seconds": 60.0,
            "expires_at": 60.0,
            "priority": "normal",
        }
    )


def attempts_of(asked=None, **options):
    return Attempts(asked or request(), **{"deadline": 1000.0, "max_attempts": 3, **options})


def head(attempt, seq):
    return {"id": "r", "attempt": attempt, "seq": seq}


def accepted(attempt=1, **fields):
    return Accepted(**head(attempt, 0), **{"instance": "i", "queue_wait": 0.0, **fields})


def deltas(seq, *texts, attempt=1, tokens=None):
    pieces = [Delta(content=text) for text in texts]
    return Deltas(**head(attempt, seq), deltas=pieces, tokens=len(texts) if tokens is None else tokens)


def response(seq, attempt=1):
    return ChatResponse(**head(attempt, seq), **FACTS, finish_reason="stop")


def failure(seq, error, attempt=1):
    told = {"code": error.code, "message": error.message, "error_class": type(error).__name__}
    return Failure(**head(attempt, seq), **told, retryable=error.retryable, metadata=error.metadata)


def effects_of(attempts, *frames, node="a", now=0.0):
    """Take these frames; return all effects."""
    return [effect for frame in frames for effect in attempts.take(node, frame, now)]


def read(effects):
    """The frames that a reader gets by these effects."""
    return [effect.frame for effect in effects if isinstance(effect, Deliver | End)]


def fed(attempts, *frames, node="a"):
    """Take these frames; return what a reader gets of them."""
    return read(effects_of(attempts, *frames, node=node))


def cancelled(effects):
    return [effect for effect in effects if isinstance(effect, CancelOrphan)]


DOWN = InstanceUnavailable("down")


# --- One attempt


def test_an_answer_that_comes_at_once_is_the_whole_story():
    attempts = attempts_of(request("embed"))
    answer = EmbedResponse(**head(1, 1), **FACTS, data=["AACAPw=="], dimensions=1)
    assert effects_of(attempts, accepted(), answer) == [End(attempts.last)]
    assert attempts.state == "ended"
    assert [(each.attempt, each.node, each.error) for each in attempts.last.attempts] == [(1, "a", None)]


def test_frames_are_taken_once_each_and_in_order():
    attempts = attempts_of()
    frames = [accepted(), deltas(1, "a"), deltas(2, "b")]
    assert fed(attempts, *frames, *frames, frames[1]) == frames[1:]


def test_a_long_answer_is_held_in_few_pieces_and_continued_where_it_broke_off():
    attempts, words = attempts_of(), [f" word{number}" for number in range(2000)]
    frames = [deltas(seq, word, tokens=seq) for seq, word in enumerate(words, 1)]
    assert fed(attempts, accepted(), *frames) == frames
    assert attempts.delivered.deltas() == [Delta(content="".join(words))]
    attempts.fail(DOWN, 0.0)
    assert attempts.next_attempt().resume == Resume(content="".join(words), reasoning="", tokens=2000)


def test_a_frame_that_is_missing_is_asked_for_and_all_that_came_after_it_taken_when_it_comes_again():
    attempts, frames = attempts_of(), [accepted(), deltas(1, "a"), deltas(2, "b"), deltas(3, "c")]
    assert effects_of(attempts, frames[0], *frames[2:]) == [AskAgain("a")]
    assert effects_of(attempts, frames[3], *frames) == [Deliver(frame) for frame in frames[1:]]
    assert effects_of(attempts, deltas(5, "e")) == [AskAgain("a")], "that is another one"


def test_a_frame_that_does_not_come_again_is_a_loss_and_whoever_left_it_out_is_to_stop():
    attempts = attempts_of()
    assert fed(attempts, accepted(), deltas(2, "b")) == []
    assert attempts.take("a", deltas(3, "c"), ASK_AGAIN_EVERY - 0.1) == []
    assert attempts.take("a", deltas(3, "c"), GAP_CLOSES_WITHIN - 0.1) == [AskAgain("a")], "it may not have heard"
    assert attempts.state == "running"
    orphan, retry = attempts.take("a", deltas(4, "d"), GAP_CLOSES_WITHIN)
    assert orphan == CancelOrphan("a", 1)
    assert isinstance(retry, RetryAfter)
    assert attempts.state == "pausing"
    assert attempts.history[0].error == ReplyLost.code


def test_a_sign_of_life_shows_that_the_frames_before_it_are_lost():
    attempts = attempts_of()
    fed(attempts, accepted(), Alive(**head(1, 1)))
    assert attempts.state == "running"
    assert effects_of(attempts, Alive(**head(1, 2))) == [AskAgain("a")]
    attempts.take("a", Alive(**head(1, 2)), GAP_CLOSES_WITHIN)
    assert attempts.state == "pausing"


def test_who_accepted_first_has_it():
    attempts = attempts_of()
    fed(attempts, accepted(), node="a")
    assert not attempts.wants("b", accepted())
    assert fed(attempts, accepted(), deltas(1, "not this"), node="b") == []
    assert fed(attempts, deltas(1, "this"), node="a")
    assert attempts.node == "a"


def test_a_node_that_was_restarted_says_something_else():
    """RabbitMQ delivers what a killed node had to the next one of its name, which begins at the beginning."""
    attempts = attempts_of()
    fed(attempts, accepted(), deltas(1, "a"), deltas(2, " b"))
    later = accepted().model_copy(update={"queue_wait": 3.0})
    effects = effects_of(attempts, later, deltas(1, "a b"), deltas(2, " c"), deltas(3, " d"))
    assert read(effects) == []
    assert attempts.state == "pausing"
    assert attempts.history[0].error == NodeLost.code
    assert cancelled(effects) == [CancelOrphan("a", 1)]
    assert attempts.next_attempt().resume == Resume(content="a b", tokens=1)
    assert fed(attempts, accepted(2).model_copy(update={"queue_wait": 4.0}), deltas(1, " c", attempt=2))


# --- Another one


@pytest.mark.parametrize("error", [DOWN, Overloaded("busy"), ConnectionFailure("broke"), ReplyLost(retryable=True)])
def test_what_another_node_may_not_have_is_followed_by_another_attempt(error):
    attempts = attempts_of()
    (retry,) = effects_of(attempts, accepted(), failure(1, error))  # no cancel: the node itself has ended it
    assert isinstance(retry, RetryAfter)
    assert attempts.state == "pausing"
    assert attempts.failed == {"a"}
    again = attempts.next_attempt()
    assert (again.attempt, again.resume) == (2, None)
    assert attempts.state == "waiting"


def test_what_no_node_can_do_ends_it():
    attempts = attempts_of()
    (given,) = fed(attempts, accepted(), failure(1, InvalidRequest("wrong")))
    assert attempts.state == "ended"
    assert given.code == "invalid_request"
    assert given.metadata["attempts"] == [{"attempt": 1, "node": "a", "error": "invalid_request", "delivered": 0}]


def test_a_lost_node_is_told_to_stop_should_it_come_back():
    attempts = attempts_of()
    fed(attempts, accepted())
    orphan, retry = attempts.node_lost(0.0)
    assert orphan == CancelOrphan("a", 1)
    assert isinstance(retry, RetryAfter)
    assert attempts.failed == {"a"}


def test_a_message_that_is_nowhere_is_sent_again_and_nobody_is_to_blame():
    attempts = attempts_of()
    orphan, retry = attempts.message_lost(0.0)
    assert orphan == CancelOrphan(None, 1)
    assert isinstance(retry, RetryAfter)
    assert attempts.failed == set()
    for _ in range(2):
        attempts.next_attempt()
        effects = attempts.message_lost(0.0)
    assert read(effects)[0].code == NodeLost.code  # and no poison: no instance died


def test_the_attempts_are_counted():
    attempts = attempts_of(max_attempts=2)
    fed(attempts, accepted(), failure(1, DOWN))
    attempts.next_attempt()
    (given,) = fed(attempts, failure(0, DOWN, attempt=2))
    assert given.code == DOWN.code
    assert [each["attempt"] for each in given.metadata["attempts"]] == [1, 2]


def test_there_is_no_attempt_without_time_for_it():
    attempts = attempts_of(deadline=0.05)
    (given,) = fed(attempts, failure(0, DOWN))
    assert given.code == DOWN.code


def test_pauses_grow_and_differ():
    longest = []
    for attempt in range(1, 5):
        pauses = []
        for _ in range(20):
            attempts = attempts_of(request().model_copy(update={"attempt": attempt}), max_attempts=9)
            (retry,) = effects_of(attempts, failure(0, DOWN, attempt=attempt))
            pauses.append(retry.seconds)
        assert len(set(pauses)) > 10
        longest.append(min(pauses))
    assert longest == sorted(longest)
    assert 0.1 <= longest[0] < longest[-1] < 2


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks():
    attempts = attempts_of()
    assert effects_of(attempts, failure(0, Overloaded("busy", retry_after=7.0))) == [RetryAfter(7.0)]


@pytest.mark.parametrize("asked", [10**400, math.inf, 1e300], ids=["10**400", "inf", "1e300"])
def test_a_server_that_wants_to_be_left_alone_longer_than_the_request_lives_ends_it(asked):
    (ended,) = fed(attempts_of(), failure(0, Overloaded("busy", retry_after=asked)))
    assert (ended.code, ended.metadata["retry_after"]) == ("overloaded", 24 * 3600)


@pytest.mark.parametrize(
    "asked", [math.nan, -(10**400), -5.0, "soon", None, [9.0]], ids=["nan", "-10**400", "-5", "text", "null", "list"]
)
def test_a_pause_that_is_no_time_is_left_out(asked):
    (effect,) = effects_of(attempts_of(), failure(0, Overloaded("busy", retry_after=asked)))
    assert 0.0 < effect.seconds < 1.0
    (ended,) = fed(attempts_of(max_attempts=1), failure(0, Overloaded("busy", retry_after=asked)))
    assert ended.metadata["retry_after"] == 1.0


# --- Frames of another operation


def embedding(seq):
    return EmbedResponse(**head(1, seq), **FACTS, data=["AAAAAA=="], dimensions=1)


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("chat", [deltas(1, "a"), embedding(1)]),
        ("stream_chat", [embedding(1)]),
        ("embed", [deltas(1, "a"), response(1)]),
    ],
)
def test_a_frame_that_its_operation_does_not_have_is_no_answer(operation, wrong):
    good = embedding(1) if operation == "embed" else response(1)
    attempts = attempts_of(request(operation))
    assert fed(attempts, accepted(), *wrong) == []
    assert [frame.kind for frame in fed(attempts, good)] == [good.kind]


def test_a_request_that_is_handed_over_again_and_again_costs_no_attempt():
    """All nodes of a fleet are restarted, one after the other."""
    attempts = attempts_of(max_attempts=2)
    drained = InstanceUnavailable("the node is being drained", handed_over=True)
    for attempt in range(1, 8):
        assert isinstance(effects_of(attempts, failure(0, drained, attempt=attempt))[-1], RetryAfter)
        attempts.next_attempt()
    assert not attempts.is_last


def test_a_request_that_no_chosen_node_takes_costs_no_attempt():
    attempts = attempts_of(max_attempts=2)
    for attempt in range(1, 8):
        assert attempts.move() == [CancelOrphan(None, attempt), RetryAfter(0.0)]
        assert effects_of(attempts, accepted(attempt=attempt)) == []
        assert attempts.next_attempt().attempt == attempt + 1
    assert not attempts.is_last
    assert attempts.failed == set()
    assert {each.error for each in attempts.history} == {"moved"}
    assert not attempts.blamed


# --- A node whose clock is wrong

EXPIRED = Expired("the request waited 3600.0 s in its lane, longer than its timeout")


def test_a_node_that_drops_a_request_as_expired_before_its_deadline_costs_no_attempt():
    attempts = attempts_of(max_attempts=2)
    for attempt in range(1, 8):
        tell, retry = effects_of(attempts, failure(0, EXPIRED, attempt=attempt))
        assert tell == TellTime("a")
        assert isinstance(retry, RetryAfter)
        assert attempts.failed == {"a"}
        assert not attempts.is_last
        attempts.next_attempt()
    assert isinstance(effects_of(attempts, failure(0, DOWN, attempt=8))[-1], RetryAfter)
    attempts.next_attempt()
    assert attempts.is_last
    assert read(effects_of(attempts, failure(0, DOWN, attempt=9)))[0].code == DOWN.code


def test_what_has_expired_by_the_clock_of_the_router_too_ends():
    for now, deadline in ((10.0, 10.0), (10.0, 10.05)):  # and when no time is left for another attempt
        attempts = attempts_of(deadline=deadline)
        (given,) = read(effects_of(attempts, failure(0, EXPIRED), now=now))
        assert (given.code, given.retryable) == ("expired", False)


def test_a_node_that_asks_whether_its_attempt_is_wanted_is_told():
    attempts = attempts_of()
    assert effects_of(attempts, accepted(asks=True)) == [Confirm("a", 1)]
    assert effects_of(attempts, accepted(asks=True)) == []  # delivered twice


def test_the_wait_is_what_the_router_measured_whatever_a_node_says():
    for said in (-5.0, 3600.0):
        attempts = attempts_of(deadline=1000.0)
        begun = 1000.0 - attempts.request.timeout_seconds
        effects_of(attempts, accepted(queue_wait=said), now=begun + 1.5)
        answer = response(1)
        wrong = answer.model_copy(update={"timings": answer.timings.model_copy(update={"queue_wait": said})})
        (given,) = read(effects_of(attempts, wrong, now=begun + 9.0))
        assert given.timings == answer.timings.model_copy(update={"queue_wait": 1.5})


# --- Whose fault it is

FAILED = ProviderError("the MLX server answered 500", retryable=True, status=500)
BROKE = ConnectionFailure("broke")
LATE = RequestTimeout("no content in time", retryable=True)
DISTURBED = ProviderError("the MLX server answered 500", retryable=True, status=500, disturbed=True)


def failing_on(attempts, *nodes, error=FAILED, others=()):
    """Each node in turn accepts the request and fails; return what a reader gets."""
    errors = [*others, *[error] * (len(nodes) - len(others))]
    for attempt, (node, each) in enumerate(zip(nodes, errors, strict=True), 1):
        given = fed(attempts, accepted(attempt), failure(1, each, attempt), node=node)
        if given:
            return given
        attempts.next_attempt()
    return []


@pytest.mark.parametrize(
    ("error", "code"), [(FAILED, "invalid_request"), (BROKE, "invalid_request"), (LATE, "timeout")]
)
def test_a_request_that_two_nodes_fail_alike_is_to_blame(error, code):
    attempts = attempts_of(max_attempts=9)
    (given,) = failing_on(attempts, "a", "b", error=error)
    assert (given.code, given.retryable, attempts.state) == (code, False, "ended")
    assert error.message in given.message
    assert "on 2 nodes alike" in given.message
    assert [each["node"] for each in given.metadata["attempts"]] == ["a", "b"]
    assert given.metadata.get("status") == error.metadata.get("status")


def test_one_node_that_fails_again_and_again_is_no_proof():
    attempts = attempts_of(max_attempts=3)
    (given,) = failing_on(attempts, "a", "a", "a")
    assert (given.code, len(attempts.history)) == ("provider_error", 3)


def test_two_nodes_that_fail_differently_are_no_proof_and_two_of_three_are():
    attempts = attempts_of(max_attempts=9)
    assert failing_on(attempts, "a", "b", others=[BROKE]) == []
    (given,) = fed(attempts, accepted(3), failure(1, BROKE, 3), node="c")
    assert given.code == "invalid_request"


@pytest.mark.parametrize(
    "error",
    [DOWN, Overloaded("busy"), ReplyLost(retryable=True), InstanceUnavailable("not ready", status=503), DISTURBED],
)
def test_what_says_nothing_about_a_request_blames_none(error):
    assert failing_on(attempts_of(max_attempts=9), "a", "b", "c", error=error) == []


def test_a_connection_that_breaks_a_little_later_breaks_alike_and_another_status_is_another_failure():
    (given,) = failing_on(attempts_of(max_attempts=9), "a", "b", others=[BROKE, ConnectionFailure("it broke off")])
    assert given.code == "invalid_request"
    other = ProviderError("the MLX server answered 501", retryable=True, status=501)
    assert failing_on(attempts_of(max_attempts=9), "a", "b", others=[FAILED, other]) == []


def test_one_of_the_two_nodes_may_have_had_other_work():
    assert failing_on(attempts_of(max_attempts=9), "a", "b", error=DISTURBED) == []
    for errors in ([DISTURBED, FAILED], [FAILED, DISTURBED]):
        (given,) = failing_on(attempts_of(max_attempts=9), "a", "b", others=errors)
        assert given.code == "invalid_request"


def test_what_kills_servers_is_poison_and_not_only_wrong():
    (given,) = failing_on(attempts_of(max_attempts=9), "a", "b", error=ConnectionFailure("broke", instance_died=True))
    assert given.code == PoisonSuspected.code


def test_two_servers_that_freeze_with_a_request_are_enough_and_one_that_does_twice_is_not():
    """The only server of a fleet may freeze now and then."""
    froze = InstanceUnavailable("frozen", instance_frozen=True)
    (given,) = failing_on(attempts_of(max_attempts=9), "a", "b", error=froze)
    assert given.code == PoisonSuspected.code
    assert failing_on(attempts_of(max_attempts=9), "a", "a", error=froze) == []


def test_a_stream_that_has_begun_is_not_to_blame():
    attempts = attempts_of(max_attempts=9)
    fed(attempts, accepted(), deltas(1, "a"), failure(2, FAILED), node="a")
    attempts.next_attempt()
    assert fed(attempts, accepted(2), failure(1, FAILED, 2), node="b") == []


# --- In the middle of a stream


def interrupted(error=DOWN, **options):
    attempts = attempts_of(**options)
    fed(attempts, accepted(), deltas(1, "a", " b"), deltas(2, " c", tokens=3), failure(3, error))
    return attempts


def test_a_stream_goes_on_where_it_broke_off():
    attempts = interrupted()
    assert attempts.next_attempt().resume == Resume(content="a b c", tokens=3)
    marker, *rest = fed(
        attempts, accepted(2), deltas(1, " d", attempt=2, tokens=4), deltas(2, " e", attempt=2, tokens=5)
    )
    assert [delta.resumed for delta in marker.deltas] == [True, None]
    assert [delta.resumed for frame in rest for delta in frame.deltas] == [None]
    fed(attempts, failure(3, DOWN, attempt=2))
    assert attempts.next_attempt().resume == Resume(content="a b c d e", tokens=5)


def test_a_whole_answer_that_was_not_seen_begins_anew():
    attempts = attempts_of(request("chat"))
    fed(attempts, accepted(), failure(1, DOWN))
    assert attempts.next_attempt().resume is None


def test_reasoning_is_told_too():
    attempts = attempts_of()
    thought = Deltas(**head(1, 1), deltas=[Delta(reasoning="hm")], tokens=1)
    fed(attempts, accepted(), thought, failure(2, DOWN))
    assert attempts.next_attempt().resume == Resume(reasoning="hm", tokens=1)


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_half_a_json_document_is_not_continued(kind):
    attempts = interrupted(asked=request(response_format={"type": kind}))
    assert attempts.last.code == StreamInterrupted.code


def test_half_a_tool_call_is_not_continued():
    attempts = attempts_of()
    call = Deltas(**head(1, 1), deltas=[Delta(tool_calls=[{"index": 0, "function": {"name": "f"}}])], tokens=1)
    (_, given) = fed(attempts, accepted(), call, failure(2, DOWN))
    assert given.code == StreamInterrupted.code


def test_json_of_which_nothing_was_seen_begins_anew():
    attempts = attempts_of(request(response_format={"type": "json_object"}))
    fed(attempts, accepted(), failure(1, DOWN))
    assert attempts.state == "pausing"


def test_who_does_not_want_it_continued_gets_the_error():
    assert interrupted(on_interrupt="fail").last.code == DOWN.code


# --- Poison

DIED = ConnectionFailure("broke", instance_died=True)


def test_two_deaths_are_enough():
    attempts = attempts_of(max_attempts=10)
    fed(attempts, accepted(), failure(1, DIED))
    assert attempts.state == "pausing"
    attempts.next_attempt()
    (given,) = fed(attempts, accepted(2), failure(1, DIED, attempt=2), node="b")
    assert given.code == PoisonSuspected.code
    assert not given.retryable


def test_a_node_that_fell_silent_may_have_died_of_it():
    attempts = attempts_of(max_attempts=10)
    fed(attempts, accepted())
    attempts.node_lost(0.0)
    attempts.next_attempt()
    fed(attempts, accepted(2), node="b")
    orphan, end = attempts.node_lost(0.0)
    assert orphan == CancelOrphan("b", 2)
    assert end.frame.code == PoisonSuspected.code


def silence(node):
    before = InstanceStatus(host="mini", name=node, node=node, status="available", pid=7)
    return Silence(node, before, since=0.0)


def hosts_say(pid, at=60.0):
    return lambda node: replace(silence(node).before, pid=pid, heard_at=at)


def test_nodes_that_fell_silent_with_their_hosts_may_have_slept():
    attempts = attempts_of(max_attempts=10)
    for attempt, node in enumerate("abc", start=1):
        fed(attempts, accepted(attempt), node=node)
        assert cancelled(attempts.node_lost(0.0, silence(node))) == [CancelOrphan(node, attempt)]
        assert attempts.blamed
        attempts.next_attempt()
    assert attempts.look_at_silent(hosts_say(pid=7), 60.0) == []
    assert not attempts.blamed
    (given,) = fed(attempts, response(0, attempt=4))
    assert given.kind == "response"


def test_hosts_that_died_are_found_out_and_the_present_attempt_ends():
    attempts = attempts_of(max_attempts=10)
    for attempt, node in enumerate("ab", start=1):
        fed(attempts, accepted(attempt), node=node)
        attempts.node_lost(0.0, silence(node))
        attempts.next_attempt()
    fed(attempts, accepted(3), node="c")
    orphan, end = attempts.look_at_silent(hosts_say(pid=8), 60.0)
    assert orphan == CancelOrphan("c", 3)
    assert end.frame.code == PoisonSuspected.code
    assert attempts.look_at_silent(hosts_say(pid=9), 90.0) == []


def test_attempts_are_bounded_however_many_hosts_are_silent():
    attempts = attempts_of(max_attempts=2)
    for attempt, node in enumerate("ab", start=1):
        fed(attempts, accepted(attempt), node=node)
        effects = attempts.node_lost(0.0, silence(node))
        if attempts.state == "pausing":
            attempts.next_attempt()
    assert effects[-1].frame.code == NodeLost.code


def test_other_failures_are_no_deaths():
    attempts = attempts_of(max_attempts=4)
    for attempt, error in enumerate([DOWN, Overloaded("busy"), ConnectionFailure("broke")], start=1):
        fed(attempts, failure(0, error, attempt=attempt))
        attempts.next_attempt()
    assert attempts.state == "waiting"


# --- The end


def test_what_is_given_up_is_to_stop_wherever_it_is():
    attempts = attempts_of()
    effects = attempts.give_up(Cancelled("enough"))
    assert effects == [CancelOrphan(None, 1), End(attempts.last)]
    assert attempts.last.code == "cancelled"
    running = attempts_of()
    fed(running, accepted())
    assert running.give_up(Cancelled("enough")) == [CancelOrphan("a", 1), End(running.last)]
    pausing = attempts_of()
    fed(pausing, failure(0, DOWN))
    assert pausing.give_up(Cancelled("enough")) == [End(pausing.last)]


def test_it_ends_once():
    attempts = attempts_of()
    fed(attempts, accepted(), response(1))
    assert attempts.give_up(Cancelled("too late")) == []
    assert fed(attempts, deltas(2, "more"), response(3)) == []
    assert attempts.last.kind == "response"


class AnyOrder(RuleBasedStateMachine):
    """Nodes that take attempts, twice perhaps; frames that arrive late, again, in another order or never; nodes that
    die, fall silent and come back: the reader gets a beginning of the right text, and exactly one end.
    """

    def __init__(self):
        super().__init__()
        self.attempts = attempts_of(max_attempts=4)
        self.asked = [self.attempts.request]
        self.workers = {}  # (node, attempt) -> what it will still send
        self.sent = []
        self.text = ""
        self.ends = 0
        self.retries = self.gave_up_in_a_pause = self.silent = 0
        self.cancelled = set()
        self.now = 0.0

    def carry_out(self, effects):
        assert not (effects and self.ends), "nothing follows the end"
        for effect in effects:
            match effect:
                case Deliver(frame):
                    self.text += "".join(delta.content or "" for delta in frame.deltas)
                case End(frame):
                    assert frame is self.attempts.last
                    self.ends += 1
                case RetryAfter(seconds):
                    assert seconds > 0
                    self.retries += 1
                case CancelOrphan(node, attempt):
                    assert attempt not in self.cancelled, "once is enough"
                    assert node == self.attempts.history[-1].node
                    self.cancelled.add(attempt)
                case AskAgain(node):
                    assert node == self.attempts.node

    @rule(node=st.sampled_from("abc"), which=st.integers(0, 3))
    def somebody_takes_an_attempt(self, node, which):
        asked = self.asked[which % len(self.asked)]
        key = (node, asked.attempt)
        if key in self.workers:
            return
        said = asked.resume.content if asked.resume else ""
        rest = WORDS[len([word for word in WORDS if "".join(WORDS).find(word) < len(said)]) :]
        at_once = 1 + "abc".index(node)  # no two nodes send the same frames
        pieces = [
            deltas(seq, *rest[first : first + at_once], attempt=asked.attempt)
            for seq, first in enumerate(range(0, len(rest), at_once), start=1)
        ]
        self.workers[key] = [accepted(asked.attempt), *pieces, response(len(pieces) + 1, attempt=asked.attempt)]

    @precondition(lambda self: self.workers)
    @rule(which=st.integers(0, 99), frames=st.integers(1, 4))
    def a_node_sends_frames(self, which, frames):
        key = sorted(self.workers)[which % len(self.workers)]
        for _ in range(min(frames, len(self.workers[key]))):
            self.sent.append((key[0], self.workers[key].pop(0)))

    @precondition(lambda self: self.workers)
    @rule(
        which=st.integers(0, 99),
        error=st.sampled_from([DOWN, DIED, InvalidRequest("wrong"), Overloaded("busy", retry_after=1.0)]),
    )
    def a_node_fails(self, which, error):
        key = sorted(self.workers)[which % len(self.workers)]
        if self.workers[key]:
            self.sent.append((key[0], failure(self.workers[key][0].seq, error, attempt=key[1])))
            self.workers[key].clear()

    @rule(node=st.sampled_from("abc"), frames=st.integers(1, 4))
    def the_attempt_gets_on_well_for_a_while(self, node, frames):
        self.somebody_takes_an_attempt(node, len(self.asked) - 1)
        key = (node, self.asked[-1].attempt)
        for _ in range(min(frames, len(self.workers[key]))):
            self.sent.append((node, self.workers[key].pop(0)))
            self.carry_out(self.attempts.take(*self.sent[-1], self.now))

    @precondition(lambda self: self.sent)
    @rule(which=st.integers(0, 999))
    def a_frame_arrives(self, which):
        node, frame = self.sent[which % len(self.sent)]
        self.carry_out(self.attempts.take(node, frame, self.now))

    @precondition(lambda self: self.sent)
    @rule()
    def all_frames_arrive(self):
        for node, frame in tuple(self.sent):
            self.carry_out(self.attempts.take(node, frame, self.now))

    @rule(seconds=st.sampled_from([0.1, GAP_CLOSES_WITHIN]))
    def time_passes(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.attempts.state == "running")
    @rule()
    def the_node_is_lost(self):
        self.carry_out(self.attempts.node_lost(0.0))

    @precondition(lambda self: self.attempts.state == "running")
    @rule()
    def its_whole_host_is_silent(self):
        self.silent += 1
        self.carry_out(self.attempts.node_lost(0.0, silence(self.attempts.node)))

    @rule(pid=st.sampled_from([7, 8]))
    def silent_hosts_are_heard_again(self, pid):
        in_a_pause = self.attempts.state == "pausing"
        self.carry_out(self.attempts.look_at_silent(hosts_say(pid), 60.0))
        self.gave_up_in_a_pause += in_a_pause and self.attempts.state == "ended"

    @precondition(lambda self: self.attempts.state == "waiting")
    @rule()
    def nobody_took_it(self):
        self.carry_out(self.attempts.message_lost(0.0))

    @precondition(lambda self: self.attempts.state == "pausing")
    @rule()
    def the_pause_is_over(self):
        self.asked.append(self.attempts.next_attempt())

    @precondition(lambda self: len(self.attempts.history) > 2)
    @rule()
    def the_reader_leaves(self):
        self.gave_up_in_a_pause += self.attempts.state == "pausing"
        self.carry_out(self.attempts.give_up(Cancelled("enough")))

    @invariant()
    def the_text_is_right_so_far(self):
        assert "".join(WORDS).startswith(self.text)

    @invariant()
    def it_ends_once_and_with_the_whole_text_or_an_error(self):
        assert self.ends == (self.attempts.state == "ended")
        if self.attempts.last and self.attempts.last.kind == "response":
            assert self.text == "".join(WORDS)
        elif self.attempts.last:
            assert isinstance(self.attempts.last.error(), FleetError)

    @invariant()
    def there_is_one_pause_before_each_further_attempt(self):
        assert self.retries == len(self.asked) - 1 + (self.attempts.state == "pausing") + self.gave_up_in_a_pause

    @invariant()
    def attempts_and_deaths_are_bounded(self):
        assert len(self.asked) <= 4
        assert [asked.attempt for asked in self.asked] == list(range(1, len(self.asked) + 1))
        died = [each for each in self.attempts.history if each.error == NodeLost.code and each.node]
        assert len(died) - self.silent <= 2
        assert self.attempts.deaths.certain <= 2 or self.silent

    @invariant()
    def whoever_may_still_work_on_an_attempt_that_is_over_is_told(self):
        silent = {NodeLost.code, ReplyLost.code, Cancelled.code, PoisonSuspected.code}
        assert {each.attempt for each in self.attempts.history if each.error in silent} == self.cancelled


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(stateful_step_count=40)


def test_the_end_of_a_long_attempt_costs_no_more_than_that_of_a_short_one():
    """Ten long streams may fail at once, in the thread that reads the replies of all others."""

    class Unread(list):
        def __iter__(self):
            raise AssertionError("all that was delivered is read again")

    of = request()
    attempts = Attempts(of, deadline=100.0, max_attempts=3)
    attempts.take("n", Accepted(id=of.request_id, attempt=1, seq=0, instance="i", queue_wait=0.0), 0.0)
    for seq in (1, 2):
        frame = Deltas(id=of.request_id, attempt=1, seq=seq, deltas=[Delta(content="word ")], tokens=seq)
        attempts.take("n", frame, 0.0)
    attempts.delivered._runs = [(kind, Unread(parts)) for kind, parts in attempts.delivered._runs]
    attempts.fail(ConnectionFailure("it broke"), 0.0)
    assert attempts.history[-1].delivered == len("word word ")
    assert attempts.state == "pausing"
