"""A request in flight: readers that come and go, silences, lanes that are empty, and what the nodes are told."""

import contextlib
import queue
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fleet_worker.errors import (
    BrokerUnavailable,
    Cancelled,
    Expired,
    InvalidRequest,
    PoisonSuspected,
    QueueTimeout,
    ReplyOverflow,
    RequestTimeout,
)
from fleet_worker.protocol.reply import Alive, Deltas
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.router.attempts import Attempts
from fleet_worker.router.deaths import Deaths
from fleet_worker.router.effects import AskAgain, CancelOrphan, Confirm
from fleet_worker.router.idempotency import IdempotencyCache
from fleet_worker.router.in_flight import TRY_EVERY, InFlightRequest
from fleet_worker.router.node_selection import WhyWaiting
from fleet_worker.router.route import Route
from fleet_worker.router.wakeups import Wakeups
from fleet_worker.settings import RouterSettings
from tests.mlx_clients import took_less_than
from tests.unit.router.test_attempts import DOWN, accepted, deltas, failure, head, request, response
from tests.unit.router.test_route import PREFIXES, Warm


class Later:
    """A scheduler whose time is up when a test says so."""

    def __init__(self):
        self.due = []
        self.moments = []

    def at(self, moment, do):
        self.due.append(do)
        self.moments.append(moment)

    def soon(self, do):
        self.due.append(do)

    def now(self):
        due, self.due = self.due, []
        for do in due:
            do()


class Fleet:
    """What a request in flight has around it, as a test wants it to be."""

    def __init__(self, **settings):
        patient = {
            "connect_timeout": 1.0,
            "lost_after": 5.0,
            "accept_timeout": 0.0,
            "max_attempts": 3,
            "max_buffered": 10,
            **settings,
        }
        self.later = Later()
        self.clock = SimpleNamespace(name="replies", clock=0.0, back=0.0, wakeups=Wakeups())
        self.clock.silence = lambda since: self.clock.clock - max(since, self.clock.back)
        self.waits = True
        self.is_served = False
        self.accepted = []
        self.ended = []
        self.sent = []
        self.told = []
        self.first = self.target = None
        self.ready = self.is_there = True
        self.refusal = self.affinity = None
        self.hosts = {}
        self.session = SimpleNamespace(
            settings=RouterSettings.model_construct(**patient),
            scheduler=self.later,
            replies=self.clock,
            admission=SimpleNamespace(
                is_queued=lambda *_: self.waits,
                accepted=lambda *what: self.accepted.append(what),
                is_served=lambda _: self.is_served,
            ),
            control=SimpleNamespace(tell=lambda _, effect: self.told.append(effect)),
            submitter=SimpleNamespace(submit=self._submit),
            nodes=SimpleNamespace(
                unable=lambda _: set(),
                node_for=lambda request, avoided: self.target if avoided else self.first,
                why_waiting=lambda *_: WhyWaiting("nobody has served it for 7 s", 7.0),
                may_be_there=lambda *_, is_served: self.is_there or is_served,
                waits_in_vain=lambda *_: not self.ready,
                seen=lambda node: self.hosts.get(node),
            ),
            ended=lambda request_id, last: self.ended.append(request_id),
        )

    @property
    def cancelled(self):
        return [effect for effect in self.told if isinstance(effect, CancelOrphan)]

    def _submit(self, request, lane, patience, prefixes):
        if self.refusal:
            raise self.refusal
        _, _, node = lane.partition(".node.")
        self.sent.append((request.attempt, node or None))

    def submit(self, node=None, prefixes=None, **options):
        asked = options.pop("asked", None) or request()
        route = Route(asked, node, self.session.nodes, self.affinity, prefixes)
        in_flight = InFlightRequest(asked.addressed_to(asked.reply_to), route, self.session, **options)
        self.reader = in_flight.join(0.0)
        in_flight.submit()
        return in_flight

    def read(self, buffer=None):
        buffer = buffer or self.reader
        frames = []
        with contextlib.suppress(queue.Empty):
            while buffer._frames:
                frames.append(buffer.get())
        return frames


@pytest.fixture
def fleet():
    return Fleet()


def said(frames):
    return "".join(delta.content or "" for frame in frames if isinstance(frame, Deltas) for delta in frame.deltas)


# --- Nodes that fall silent


def test_a_node_that_is_silent_for_too_long_is_lost(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    fleet.clock.clock = 4.9
    fleet.later.now()
    assert fleet.sent == [(1, None)]
    fleet.clock.clock = 5.1
    fleet.later.now()
    assert fleet.cancelled == [CancelOrphan("a", 1)]
    fleet.later.now()
    assert fleet.sent == [(1, None), (2, None)]


def fall_silent(fleet, in_flight, node, attempt):
    """A node accepts an attempt, and is not heard any more, nor is its host."""
    in_flight.receive(node, accepted(attempt=attempt))
    fleet.clock.clock += 5.1
    fleet.later.now()


def host_says(fleet, node, pid):
    """Its host says now that it is available."""
    facts = {"host": "mini", "name": node, "node": node, "status": "available", "pid": pid}
    fleet.hosts[node] = InstanceStatus(**facts, heard_at=time.monotonic() + 60.0)


@pytest.fixture
def silent(fleet):
    """A request under which two whole hosts fell silent."""
    for node in ("a", "b"):
        host_says(fleet, node, pid=7)
        fleet.hosts[node] = replace(fleet.hosts[node], heard_at=0.0)
    in_flight = fleet.submit()
    fall_silent(fleet, in_flight, "a", 1)
    fleet.later.now()
    fall_silent(fleet, in_flight, "b", 2)
    fleet.later.now()
    return in_flight


def test_two_silent_hosts_do_not_end_a_request_which_waits_for_their_word(fleet, silent):
    fleet.later.now()
    assert [attempt for attempt, _ in fleet.sent] == [1, 2]
    host_says(fleet, "a", pid=7)
    fleet.later.now()
    fleet.later.now()
    assert [attempt for attempt, _ in fleet.sent] == [1, 2, 3]
    silent.receive("c", accepted(attempt=3))
    silent.receive("c", response(1, attempt=3))
    assert fleet.read()[-1].kind == "response"


def test_a_request_does_not_wait_for_silent_hosts_for_ever(fleet, silent, monkeypatch):
    monkeypatch.setattr(Deaths, "must_wait", lambda *_: False)
    fleet.later.now()
    assert [attempt for attempt, _ in fleet.sent] == [1, 2, 3]


def test_a_request_under_which_two_hosts_were_restarted_is_tried_on_no_third(fleet, silent):
    host_says(fleet, "a", pid=8)
    fleet.later.now()
    assert fleet.read() == []
    host_says(fleet, "b", pid=8)
    fleet.later.now()
    assert fleet.read()[-1].code == PoisonSuspected.code
    fleet.later.now()
    assert [attempt for attempt, _ in fleet.sent] == [1, 2]


def test_a_running_attempt_ends_when_two_hosts_turn_out_to_have_died(fleet, silent, monkeypatch):
    monkeypatch.setattr(Deaths, "must_wait", lambda *_: False)
    fleet.later.now()
    silent.receive("c", accepted(attempt=3))
    fleet.later.now()
    assert fleet.later.moments[-1] <= time.monotonic() + TRY_EVERY
    for node in ("a", "b"):
        host_says(fleet, node, pid=8)
    fleet.later.now()
    assert fleet.read()[-1].code == PoisonSuspected.code
    assert fleet.cancelled[-1] == CancelOrphan("c", 3)


def test_a_node_that_is_lost_soon_after_it_accepted_is_noticed_in_time(fleet):
    """Also if `lost_after` is shorter than `accept_timeout`, after which a queued request is checked."""
    fleet.session.settings = fleet.session.settings.model_copy(update={"accept_timeout": 50.0, "lost_after": 2.0})
    begun = time.monotonic()
    fleet.submit()
    assert fleet.later.moments[0] <= begun + 2.5
    fleet.later.now()
    assert fleet.later.moments[1] <= time.monotonic() + 2.0


def test_a_word_now_and_then_is_enough(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    for second in range(1, 20):
        fleet.clock.clock = float(second)
        assert in_flight.receive("a", Alive(**head(1, 1)))
        fleet.later.now()
    assert fleet.sent == [(1, None)]


def test_what_is_not_listened_to_is_not_silent(fleet):
    """While the broker is away the clock stands still, and afterwards the nodes get the whole time again."""
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    fleet.clock.clock = fleet.clock.back = 4.9
    fleet.clock.clock = 9.0
    fleet.later.now()
    assert fleet.sent == [(1, None)]
    fleet.clock.clock = 10.0
    fleet.later.now()
    fleet.later.now()
    assert fleet.sent == [(1, None), (2, None)]


def test_a_lost_node_that_comes_back_is_not_wanted(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    in_flight.receive("a", deltas(1, "x"))
    fleet.clock.clock = 6.0
    fleet.later.now()
    assert not in_flight.receive("a", deltas(2, "y"))
    fleet.later.now()
    assert not in_flight.receive("a", Alive(**head(1, 3)))
    assert in_flight.receive("b", accepted(2))
    in_flight.receive("b", deltas(1, "y", attempt=2))
    assert said(fleet.read()) == "xy"


# --- Messages that are nowhere


def test_a_lane_is_looked_at_twice_before_a_request_that_is_not_in_it_is_sent_again(fleet):
    fleet.waits = False
    fleet.submit()
    fleet.later.now()
    fleet.clock.clock = 0.5
    fleet.later.now()
    assert fleet.sent == [(1, None)]
    fleet.clock.clock = 1.1
    fleet.later.now()
    fleet.later.now()
    assert fleet.sent == [(1, None), (2, None)]
    assert fleet.cancelled == [CancelOrphan(None, 1)]


@pytest.mark.parametrize("waits", [True, None])
def test_a_request_that_waits_is_let_wait_and_so_is_one_that_cannot_be_seen(fleet, waits):
    fleet.waits = waits
    fleet.submit()
    for second in range(10):
        fleet.clock.clock = float(second)
        fleet.later.now()
    assert fleet.sent == [(1, None)]


def test_a_request_that_was_not_missing_all_the_time_is_let_wait(fleet):
    fleet.submit()
    for second, fleet.waits in enumerate([False, True, False, None, False, True]):
        fleet.clock.clock = 2.0 * second
        fleet.later.now()
    assert fleet.sent == [(1, None)]


def test_a_look_that_fails_is_not_the_last_one(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    fleet.clock.silence = lambda since: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fleet.later.now()
    fleet.clock.silence = lambda since: 6.0
    fleet.later.now()
    assert fleet.cancelled == [CancelOrphan("a", 1)]


# --- Another attempt


def test_it_goes_where_the_router_says(fleet):
    fleet.target = "b@mini"
    in_flight = fleet.submit()
    in_flight.receive("a", failure(0, DOWN))
    fleet.later.now()
    assert fleet.sent == [(1, None), (2, "b@mini")]


def test_the_first_attempt_goes_where_the_router_says(fleet):
    fleet.first = "a@mini"
    assert fleet.submit().lane == "llm.fleet.node.a@mini"
    assert fleet.sent == [(1, "a@mini")]


def test_what_is_for_one_node_only_stays_there(fleet):
    fleet.target = "b@mini"
    in_flight = fleet.submit(node="a@mini")
    in_flight.receive("a@mini", failure(0, DOWN))
    fleet.later.now()
    assert fleet.sent == [(1, "a@mini"), (2, "a@mini")]


@pytest.mark.parametrize(("node", "most", "sent"), [(None, 3, 3), (None, 2, 3), ("b@mini", 3, 2)])
def test_what_waits_for_a_node_that_is_gone_goes_elsewhere_unless_its_caller_wants_that_node(node, most, sent):
    fleet = Fleet(max_attempts=most)
    fleet.target = "b@mini"
    in_flight = fleet.submit(node)
    in_flight.receive(node or "a@mini", failure(0, DOWN))
    for _ in range(3):
        fleet.later.now()
    assert len(fleet.sent) == 2
    fleet.ready, fleet.target = False, None
    for _ in range(3):
        fleet.later.now()
    assert fleet.sent[2:] == [(3, None)][: sent - 2]
    assert fleet.cancelled == [CancelOrphan(None, 2)][: sent - 2]


def test_what_a_chosen_node_does_not_take_goes_to_the_shared_lane_at_once(fleet):
    warm = fleet.affinity = Warm()
    fleet.session.nodes.is_ready = lambda *_: fleet.ready
    in_flight = fleet.submit(prefixes=PREFIXES)
    fleet.later.now()
    assert fleet.sent == [(1, "a")]
    fleet.ready = False
    fleet.later.now()
    fleet.later.now()
    assert fleet.sent == [(1, "a"), (2, None)]
    assert fleet.cancelled == [CancelOrphan(None, 1)]
    assert not in_flight.receive("a", accepted())
    assert in_flight.receive("b", accepted(2))
    in_flight.receive("b", response(1, 2))
    (answer,) = fleet.read()
    assert [(each.node, each.error) for each in answer.attempts] == [(None, "moved"), ("b", None)]
    assert answer.cache == in_flight._attempts.last.cache == "hit"
    assert warm.told == [("sent", "a"), ("sent", None), ("accepted", "b"), ("ended", answer.usage, answer.node)]


def test_affinity_counts_no_attempt_of_a_request_that_has_ended(fleet):
    """Or its node would look busy for ever."""
    warm = fleet.affinity = Warm()
    fleet.session.nodes.is_ready = lambda *_: True
    in_flight = fleet.submit(prefixes=PREFIXES)
    in_flight.give_up(Cancelled("nobody waits"))
    in_flight._send(request(), 0.0)
    assert warm.told == [("sent", "a"), ("ended", None, None)]


def test_a_broker_that_is_away_is_waited_for(fleet):
    in_flight = fleet.submit()
    fleet.refusal = BrokerUnavailable("away", retryable=True)
    in_flight.receive("a", failure(0, DOWN))
    for _ in range(3):
        fleet.later.now()
    fleet.refusal = None
    fleet.later.now()
    assert fleet.sent == [(1, None), (2, None)]
    assert in_flight.receive("b", accepted(2))


def test_a_further_attempt_that_the_broker_refuses_ends_it(fleet):
    in_flight = fleet.submit()
    fleet.refusal = BrokerUnavailable("too large for it")
    in_flight.receive("a", failure(0, DOWN))
    fleet.later.now()
    assert fleet.read()[0].code == "broker_unavailable"


def test_what_was_answered_although_the_broker_never_said_that_it_has_it_is_answered(fleet):
    def submit(*_, **__):
        in_flight.receive("a", accepted())
        in_flight.receive("a", response(1))
        raise BrokerUnavailable("it fell silent", retryable=True)

    fleet.session.submitter.submit = submit

    in_flight = InFlightRequest(request().addressed_to("r"), Route(request(), None, fleet.session.nodes), fleet.session)
    buffer = in_flight.join(5.0)
    in_flight.submit()
    assert [frame.kind for frame in fleet.read(buffer)] == ["response"]


def test_a_first_attempt_that_the_broker_refuses_ends_it(fleet):
    fleet.refusal = BrokerUnavailable("away")
    with pytest.raises(BrokerUnavailable) as caught:
        fleet.submit()
    assert [each["error"] for each in caught.value.metadata["attempts"]] == ["broker_unavailable"]
    assert fleet.ended == ["r"]
    assert fleet.read()[0].code == "broker_unavailable"


def test_a_caller_that_is_interrupted_while_it_sends_leaves_nothing_behind(fleet):
    fleet.refusal = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fleet.submit()
    assert fleet.ended == ["r"]
    assert fleet.read()[0].code == "cancelled"
    assert fleet.cancelled == [CancelOrphan(None, 1)]


# --- Readers


def test_when_the_last_reader_leaves_nobody_wants_it(fleet):
    in_flight = fleet.submit()
    second = in_flight.join(0.0)
    in_flight.receive("a", accepted())
    in_flight.leave(fleet.reader)
    fleet.later.now()
    assert fleet.cancelled == []
    in_flight.leave(second)
    fleet.later.now()
    assert fleet.cancelled == [CancelOrphan("a", 1)]
    assert fleet.ended == ["r"]
    assert not in_flight.receive("a", deltas(1, "x"))


def test_leaving_after_the_end_cancels_nothing(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    in_flight.receive("a", response(1))
    in_flight.leave(fleet.reader)
    fleet.later.now()
    assert fleet.cancelled == []


def test_what_everybody_has_left_cannot_be_joined_even_before_it_is_cancelled(fleet):
    cache = IdempotencyCache(ttl=60)
    in_flight = fleet.submit(asked=request_with_key())
    cache.add(in_flight)
    in_flight.leave(fleet.reader)
    assert cache.join(request_with_key()) is None
    assert fleet.cancelled == [CancelOrphan(None, 1)]


def test_to_leave_waits_for_no_change_of_the_request(fleet):
    """It may be called by the garbage collector, in a thread that holds what that change waits for."""
    in_flight = fleet.submit()
    with in_flight._lock, took_less_than(5):
        leaving = threading.Thread(target=in_flight.leave, args=(fleet.reader,))
        leaving.start()
        leaving.join(10)
    fleet.later.now()
    assert fleet.ended == ["r"]


def test_who_comes_later_gets_the_whole_answer(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    in_flight.receive("a", deltas(1, "a"))
    second = in_flight.join(0.0)
    in_flight.receive("a", deltas(2, "b"))
    in_flight.receive("a", response(3))
    third = in_flight.join(0.0)
    for buffer in (fleet.reader, second, third):
        frames = fleet.read(buffer)
        assert said(frames) == "ab"
        assert frames[-1].kind == "response"


def test_who_comes_late_to_a_long_answer_gets_all_of_it_and_may_be_slow_from_then_on(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    for seq in range(1, 20):
        in_flight.receive("a", deltas(seq, "x"))
        fleet.read()
    second = in_flight.join(0.0)
    for seq in range(20, 30):
        in_flight.receive("a", deltas(seq, "x"))
    fleet.read()
    in_flight.receive("a", response(30))
    for buffer in (second, in_flight.join(0.0)):
        frames = fleet.read(buffer)
        assert said(frames) == "x" * 29
        assert frames[-1].kind == "response"


def test_a_request_that_failed_cannot_be_joined(fleet):
    in_flight = fleet.submit()
    in_flight.give_up(Cancelled("closed"))
    assert in_flight.join(0.0) is None
    assert fleet.read()[0].code == "cancelled"


def test_a_reader_that_is_too_slow_is_told_so_and_the_other_ones_go_on(fleet):
    in_flight = fleet.submit()
    quick = in_flight.join(0.0)
    in_flight.receive("a", accepted())
    text = ""
    for seq in range(1, 20):
        in_flight.receive("a", deltas(seq, "x"))
        text += said(fleet.read(quick))
    slow = fleet.read()
    assert isinstance(slow[-1].error(), ReplyOverflow)
    assert len(said(slow)) == 10
    assert text == "x" * 19
    assert fleet.cancelled == []


def test_a_stream_whose_only_reader_is_too_slow_is_stopped(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    for seq in range(1, 20):
        in_flight.receive("a", deltas(seq, "x"))
    assert fleet.cancelled == [CancelOrphan("a", 1)]


def test_at_its_deadline_it_is_over_whoever_reads(fleet):
    in_flight = fleet.submit(asked=request().model_copy(update={"timeout_seconds": 0.01}))
    in_flight.receive("a", accepted())
    time.sleep(0.02)
    fleet.later.now()
    assert fleet.cancelled == [CancelOrphan("a", 1)]
    assert fleet.read()[0].code == "timeout"


def test_its_deadline_is_noticed_also_if_it_comes_before_the_first_look_is_due():
    fleet = Fleet(accept_timeout=5.0)
    in_flight = fleet.submit(asked=request().model_copy(update={"timeout_seconds": 0.5}))
    assert fleet.later.moments == [in_flight._deadline]


def test_who_is_told_that_it_is_too_late_is_told_the_attempts_too(fleet):
    in_flight = fleet.submit()
    assert in_flight.timed_out(60.0).metadata["attempts"] == [
        {"attempt": 1, "node": None, "error": "expired", "delivered": 0}
    ]
    in_flight.receive("a", failure(0, DOWN))
    fleet.later.now()
    in_flight.receive("b", accepted(2))
    in_flight.receive("b", deltas(1, "xyz", attempt=2))
    assert [tuple(each.values()) for each in in_flight.timed_out(60.0).metadata["attempts"]] == [
        (1, "a", "instance_unavailable", 0),
        (2, "b", "timeout", 3),
    ]


# --- A request that waits for too long


def waiting(fleet, seconds=0.05, **options):
    """A request whose time to wait is over as soon as the scheduler is asked."""
    in_flight = fleet.submit(queue_timeout=seconds, **options)
    time.sleep(seconds)
    return in_flight


def test_a_request_that_no_node_takes_in_time_ends_with_why_and_is_cancelled(fleet):
    waiting(fleet)
    fleet.later.now()
    (given,) = fleet.read()
    assert given.code == "queue_timeout"
    assert given.message == (
        "no node took the request within its queue_timeout of 0.05 s: nobody has served it for 7 s"
    )
    assert given.metadata["away_for"] == 7.0
    assert [each["error"] for each in given.metadata["attempts"]] == ["queue_timeout"]
    assert fleet.cancelled == [CancelOrphan(None, 1)]
    assert isinstance(given.error(), QueueTimeout)
    assert isinstance(given.error(), Expired)


def test_a_request_that_a_node_has_taken_waits_no_more(fleet):
    in_flight = waiting(fleet)
    in_flight.receive("a", accepted())
    fleet.later.now()
    assert fleet.read() == []


def test_after_an_interruption_it_may_wait_as_long_again(fleet):
    in_flight = waiting(fleet)
    in_flight.receive("a", accepted())
    in_flight.receive("a", failure(1, DOWN))
    fleet.later.now()  # what was due before, and the next attempt
    assert fleet.read() == []
    assert fleet.sent[-1][0] == 2
    time.sleep(0.05)
    in_flight._end_wait()
    assert fleet.read()[-1].code == "queue_timeout"


def test_attempts_that_no_node_has_taken_do_not_prolong_the_wait(fleet):
    in_flight = waiting(fleet)
    in_flight.receive("a", failure(0, DOWN))
    fleet.later.now()
    assert fleet.read()[-1].code == "queue_timeout"


# --- A request for which nobody is there


@pytest.fixture
def alone(fleet):
    """A stream that broke off after its first words. Nobody can go on with it."""
    in_flight = fleet.submit(absent_timeout=60.0)
    in_flight.receive("a", accepted())
    in_flight.receive("a", deltas(1, "half an "))
    fleet.is_there = False
    in_flight.receive("a", failure(2, DOWN))
    fleet.later.now()  # the next attempt is sent
    assert fleet.sent == [(1, None), (2, None)]
    return in_flight


def wait(fleet, seconds):
    fleet.clock.clock += seconds
    fleet.later.now()


def test_a_stream_that_nobody_can_continue_ends_with_why(fleet, alone):
    wait(fleet, 59.0)
    assert said(fleet.read()) == "half an "
    wait(fleet, 1.0)
    (given,) = fleet.read()
    assert given.message == (
        "no node went on with the answer within the 60 s of router.absent_timeout: nobody has served it for 7 s"
    )
    assert isinstance(given.error(), QueueTimeout)
    assert [each["error"] for each in given.metadata["attempts"]] == ["instance_unavailable", "queue_timeout"]
    assert fleet.cancelled[-1] == CancelOrphan(None, 2)


def test_a_stream_goes_on_if_somebody_comes_back_in_time(fleet, alone):
    wait(fleet, 59.0)
    fleet.is_there = True
    wait(fleet, 30.0)
    alone.receive("a", accepted(2))
    wait(fleet, 1.0)
    alone.receive("a", deltas(1, "answer", attempt=2))
    alone.receive("a", response(2, attempt=2))
    frames = fleet.read()
    assert said(frames) == "half an answer"
    assert frames[-1].kind == "response"


def test_a_request_that_was_never_taken_ends_in_the_same_way(fleet):
    fleet.is_there = False
    fleet.submit(absent_timeout=60.0)
    wait(fleet, 60.0)
    assert fleet.read()[-1].message.startswith("no node took the request within the 60 s of router.absent_timeout: ")


def test_a_request_waits_while_a_node_works_on_others_of_its_lane(fleet):
    """Its host may have lost its registry node, and tell nothing."""
    fleet.is_there, fleet.is_served = False, True
    fleet.submit(absent_timeout=60.0)
    for _ in range(3):
        wait(fleet, 59.0)
    assert fleet.read() == []
    fleet.is_served = False
    wait(fleet, 1.0)
    wait(fleet, 60.0)
    assert isinstance(fleet.read()[-1].error(), QueueTimeout)


def test_a_stream_that_waits_when_its_time_is_over_is_told_why(fleet, alone):
    error = alone.timed_out(60.0)
    assert isinstance(error, RequestTimeout)
    assert error.message == ("no node went on with the answer within its timeout of 60 s: nobody has served it for 7 s")


def test_a_node_may_accept_while_its_request_is_being_sent_though_it_was_not_ready(fleet):
    """The time at that node does not count later."""
    fleet.is_there = False

    def accept(*_, **__):
        fleet.session.submitter.submit = fleet._submit
        in_flight.receive("a", accepted())

    fleet.session.submitter.submit = accept
    route = Route(request(), None, fleet.session.nodes)
    in_flight = InFlightRequest(request().addressed_to("replies"), route, fleet.session, absent_timeout=60.0)
    fleet.reader = in_flight.join(0.0)
    in_flight.submit()
    fleet.clock.clock += 1000.0
    in_flight.receive("a", failure(1, DOWN))
    fleet.later.now()
    fleet.later.now()
    assert fleet.read() == []


def test_the_wait_in_the_lane_is_measured_by_the_clock_of_the_router_alone(fleet):
    in_flight = fleet.submit()
    time.sleep(0.02)
    in_flight.receive("a", accepted(queue_wait=3600.0))
    ((lane, wait, priority, sent_at),) = fleet.accepted
    assert (lane, priority, sent_at) == ("llm.fleet.stream_chat.m", "normal", in_flight._queue_watch.sent_at)
    assert 0.02 <= wait < 5


def test_a_node_may_accept_a_request_before_its_submission_has_returned(fleet):
    fleet.session.submitter.submit = lambda *_, **options: in_flight.receive("a", accepted())
    in_flight = InFlightRequest(
        request().addressed_to("replies"), Route(request(), None, fleet.session.nodes), fleet.session
    )
    in_flight.submit()
    assert 0 <= fleet.accepted[0][1] < 5


def test_a_node_that_asks_is_told_that_its_attempt_is_wanted(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted(asks=True))
    assert fleet.told == [Confirm("a", 1)]


def test_a_node_is_asked_once_for_what_it_sent_and_never_arrived(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", accepted())
    in_flight.receive("a", deltas(2, "b"))
    in_flight.receive("a", deltas(3, "c"))
    assert fleet.told == [AskAgain("a")]
    for seq, letter in enumerate("abc", start=1):
        in_flight.receive("a", deltas(seq, letter))
    assert said(fleet.read()) == "abc"


# --- Requests with a key


def request_with_key(key="k", **params):
    return request(**params).model_copy(update={"idempotency_key": key})


def test_what_is_under_way_is_joined_and_what_was_answered_is_there(fleet):
    cache = IdempotencyCache(ttl=60)
    assert cache.join(request_with_key()) is None
    in_flight = fleet.submit(asked=request_with_key())
    assert cache.add(in_flight) is None
    assert cache.join(request_with_key())[0] is in_flight
    assert cache.join(request_with_key("other")) is None
    in_flight.receive("a", accepted())
    in_flight.receive("a", response(1))
    same, buffer = cache.join(request_with_key())
    assert same is in_flight
    assert [frame.kind for frame in fleet.read(buffer)] == ["response"]


def test_of_two_that_come_at_once_the_second_joins(fleet):
    cache = IdempotencyCache(ttl=60)
    first, second = fleet.submit(asked=request_with_key()), fleet.submit(asked=request_with_key())
    assert cache.add(first) is None
    assert cache.add(second)[0] is first


def test_a_key_of_something_else_is_refused(fleet):
    cache = IdempotencyCache(ttl=60)
    cache.add(fleet.submit(asked=request_with_key()))
    for other in (request_with_key(max_tokens=5), request_with_key().model_copy(update={"model": "other"})):
        with pytest.raises(InvalidRequest, match="idempotency_key"):
            cache.join(other)


def test_with_an_answer_only_a_hash_of_its_request_is_kept(fleet):
    cache = IdempotencyCache(ttl=60)
    in_flight = fleet.submit(asked=request_with_key(user="swordfish"))
    cache.add(in_flight)
    assert "swordfish" in in_flight.request.model_dump_json()
    in_flight.receive("a", response(0))
    assert cache.join(request_with_key(user="swordfish"))
    for each in (in_flight.request, in_flight._attempts.request):
        assert "swordfish" not in each.model_dump_json()
    with pytest.raises(InvalidRequest):
        cache.join(request_with_key(user="another"))


def test_a_failure_is_not_kept(fleet):
    cache = IdempotencyCache(ttl=60)
    in_flight = fleet.submit(asked=request_with_key())
    cache.add(in_flight)
    in_flight.give_up(Cancelled("closed"))
    assert cache.join(request_with_key()) is None
    assert cache.add(fleet.submit(asked=request_with_key())) is None


def test_an_answer_is_kept_for_its_time(fleet, monkeypatch):
    cache = IdempotencyCache(ttl=0.05)
    in_flight = fleet.submit(asked=request_with_key())
    cache.add(in_flight)
    in_flight.receive("a", response(0))
    assert cache.join(request_with_key())
    time.sleep(0.06)
    assert cache.join(request_with_key()) is None


@pytest.mark.parametrize(("bound", "most"), [("MAX_ANSWERS", 2), ("MAX_CHARACTERS", 6_000)])
def test_not_more_answers_than_allowed_are_kept_nor_more_characters_of_them(fleet, monkeypatch, bound, most):
    monkeypatch.setattr(f"fleet_worker.router.idempotency.{bound}", most)
    cache = IdempotencyCache(ttl=60)
    for number in range(4):
        in_flight = fleet.submit(asked=request_with_key(str(number)))
        cache.add(in_flight)
        in_flight.receive("a", accepted())
        in_flight.receive("a", deltas(1, "x" * 2_000))
        in_flight.receive("a", response(2))
    assert [number for number in range(4) if cache.join(request_with_key(str(number)))] == [2, 3]


def test_an_answer_that_is_kept_is_one_piece(fleet):
    cache = IdempotencyCache(ttl=60)
    in_flight = fleet.submit(asked=request_with_key())
    cache.add(in_flight)
    in_flight.receive("a", accepted())
    for seq, letter in enumerate("abc", start=1):
        in_flight.receive("a", deltas(seq, letter))
    in_flight.receive("a", response(4))
    for _ in range(2):
        _, buffer = cache.join(request_with_key())
        frames = fleet.read(buffer)
        assert said(frames) == "abc"
        assert len(frames) == 2


@pytest.mark.parametrize("step", ["wants", "fail", "next_attempt"])
def test_a_stream_that_is_forgotten_in_the_middle_of_a_change_is_cancelled_after_it(fleet, monkeypatch, step):
    """The garbage collector closes a generator that reads a stream, in any thread and between any two statements."""

    def interrupted(attempts, *arguments, **options):
        result = change(attempts, *arguments, **options) if step == "wants" else None
        if not fleet.reader.closed:
            in_flight.leave(fleet.reader)
        return result if step == "wants" else change(attempts, *arguments, **options)

    in_flight = fleet.submit()
    change = getattr(Attempts, step)
    monkeypatch.setattr(Attempts, step, interrupted)
    in_flight.receive("a", failure(0, DOWN))
    for _ in range(5):
        fleet.later.now()
    assert fleet.ended == ["r"]
    assert in_flight._attempts.state == "ended"
    assert fleet.later.due == []


def test_a_look_at_what_has_ended_is_the_last_one(fleet):
    in_flight = fleet.submit()
    in_flight.receive("a", response(0))
    fleet.later.now()
    assert fleet.later.due == []
