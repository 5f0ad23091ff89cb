import socket
import threading
from contextlib import closing, contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

from fleet_worker import FleetSaturated, Settings
from fleet_worker.broker.app import create_app
from fleet_worker.broker.queue_depth import MOST_LANES
from fleet_worker.broker.topology import direct_lane, lane, transport_of
from fleet_worker.errors import Cancelled
from fleet_worker.router import admission as admission_module
from fleet_worker.router.admission import Admission
from fleet_worker.router.submitter import Submitter
from tests.brokers import free_port
from tests.mlx_clients import took_less_than

LANE = lane("stream_chat", "Qwen3-14B")


@contextmanager
def admission_at(url, max_waiting):
    with closing(Submitter(create_app(Settings(broker_url=url)), transport_of(url))) as submitter:
        yield Admission(submitter.producer, transport_of(url), max_waiting=max_waiting)


class Told(Admission):
    """What the broker says is what a test has written; the time passes when a test says so."""

    def __init__(self, monkeypatch, *, most):
        super().__init__(None, "redis", max_waiting=most)
        self.depths, self.asked, self.now = {}, [], 1000.0
        monkeypatch.setattr(admission_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def _ask_broker(self, lane, timeout):
        self.asked.append(lane)
        depth = self.depths.get(lane, 0)
        return (depth,) if isinstance(depth, int) else depth

    def admit_many(self, number):
        for _ in range(number):
            self.admit(LANE)

    def refused(self, lane=LANE):
        with pytest.raises(FleetSaturated) as caught:
            self.admit(lane)
        return caught.value


@pytest.fixture
def told(monkeypatch):
    return Told(monkeypatch, most=10)


def test_what_is_too_much_is_refused_and_says_what_to_do(told):
    told.depths[LANE] = 12
    error = told.refused()
    assert error.retryable
    assert error.metadata == {"retry_after": 1.0}
    assert error.message == (
        "12 requests wait for stream_chat of qwen3-14b, and no more than 10 may (router.max_waiting): "
        "try again in 1 s, or let more nodes serve it"
    )


def test_no_node_is_named(told):
    name = direct_lane("local@mini-7")
    told.depths[name] = 10
    assert "mini" not in told.refused(name).message


def test_what_was_sent_since_the_broker_was_asked_makes_it_be_asked_again(told):
    told.depths[LANE] = 7
    told.admit_many(3)
    assert told.asked == [LANE]
    told.depths[LANE] = 10
    for _ in range(3):
        assert "10 requests wait" in told.refused().message
    assert told.asked == [LANE] * 2


def test_nobody_is_refused_for_what_was_taken_at_once(told):
    """A burst into a fleet with many free slots: nothing of it ever waits."""
    told.admit_many(100)
    assert len(told.asked) == 10


def test_there_is_room_when_the_broker_says_so(told):
    told.depths[LANE] = 10
    told.refused()
    told.depths[LANE] = 9
    told.refused()
    told.now += 0.25
    told.admit_many(1)
    assert told.asked == [LANE] * 2


def test_an_answer_replaces_what_was_counted(told):
    told.depths[LANE] = 9
    told.admit_many(1)
    told.now += 0.3
    told.depths[LANE] = 5
    told.admit_many(5)
    assert len(told.asked) == 2
    told.admit_many(1)
    assert len(told.asked) == 3


def test_the_broker_is_asked_four_times_a_second_when_half_of_the_bound_waits(told):
    told.depths[LANE] = 5
    for _ in range(3):
        told.admit(LANE)
        told.now += 0.1
    assert len(told.asked) == 1
    told.admit(LANE)
    assert len(told.asked) == 2


def test_the_broker_is_asked_once_a_second_when_less_waits(told):
    for _ in range(4):
        told.admit(LANE)
        told.now += 0.24
    assert len(told.asked) == 1
    told.now += 0.05
    told.admit(LANE)
    assert len(told.asked) == 2


def test_what_is_sent_in_a_hurry_makes_the_broker_be_asked_earlier(told):
    told.admit_many(5)
    told.now += 0.3
    told.admit(LANE)
    assert len(told.asked) == 2


def test_each_lane_has_a_count_of_its_own(told):
    told.depths[LANE] = 10
    told.refused()
    told.admit(lane("chat", "Qwen3-14B"))


def test_room_is_expected_by_how_fast_the_lane_was_served(told):
    told.accepted(LANE, 20.0, "normal", told.now)
    told.depths[LANE] = 10
    assert told.refused().metadata["retry_after"] == 2.0  # ten wait for 20 s each: one leaves every 2 s
    told.now += 1
    told.depths[LANE] = 20
    assert told.refused().metadata["retry_after"] == 11.0  # eleven have to leave, one each second


def test_the_queue_wait_is_smoothed(told):
    told.depths[LANE] = 10
    for seconds in (10.0, 20.0):
        told.accepted(LANE, seconds, "normal", told.now)
    assert told.refused().metadata["retry_after"] == 1.2


def test_a_lane_that_was_quick_before_it_jammed_is_expected_to_stay_full_for_as_long_as_it_has_been(told):
    told.depths[LANE] = 10
    told.accepted(LANE, 0.0, "normal", 0.0)
    expected = []
    for seconds in (0, 3, 4):
        told.now += seconds
        expected.append(told.refused().metadata["retry_after"])
    told.accepted(LANE, 0.0, "normal", 0.0)
    expected.append(told.refused().metadata["retry_after"])
    assert expected == [1.0, 3.0, 7.0, 1.0]
    told.depths[LANE], told.now = 9, told.now + 5
    told.admit(LANE)
    told.depths[LANE], told.now = 10, told.now + 5
    assert told.refused().metadata["retry_after"] == 1.0


@pytest.mark.parametrize(("queue_wait", "retry_after"), [(0.0, 1.0), (3600.0, 60.0)])
def test_nobody_is_sent_away_for_no_time_or_for_ever(told, queue_wait, retry_after):
    told.accepted(LANE, queue_wait, "normal", told.now)
    told.depths[LANE] = 10
    assert told.refused().metadata["retry_after"] == retry_after


@pytest.mark.parametrize("queue_wait", [None, 5.0])
def test_the_more_are_refused_the_later_the_next_one_is_told_to_come(told, queue_wait):
    """They do not come back all at once; and once they had time to, the next one waits no longer than the first."""
    if queue_wait:
        told.accepted(LANE, queue_wait, "normal", told.now)
    told.depths[LANE] = 10
    told.refused()
    expected = [told.refused().metadata["retry_after"] for _ in range(200)]
    assert expected == sorted(expected)
    assert 1.0 == expected[0] < expected[100] < expected[-1] <= 60.0
    told.depths[LANE] = 9
    told.now += 120
    told.admit(LANE)
    told.depths[LANE] = 10
    told.now += 1
    assert told.refused().metadata["retry_after"] == 1.0


def test_a_lane_that_is_fuller_takes_longer(told):
    expected = []
    for depth in (10, 100, 300):
        told.depths[LANE] = depth
        expected.append(told.refused().metadata["retry_after"])
        told.now += 0.5
    assert expected == sorted(expected)
    assert expected[0] < expected[-1]


def test_the_depth_is_asked_now_each_time(told):
    for depth in (3, 4):
        told.depths[LANE] = depth
        assert told.depth(LANE) == depth


def test_a_depth_that_was_asked_a_moment_ago_is_good_enough_for_who_says_so(told):
    for told.depths[LANE], depth in [(3, 3), (4, 3)]:
        assert told.depth(LANE, max_age=0.25) == depth
    told.now += 0.3
    assert told.depth(LANE, max_age=0.25) == 4
    assert told.asked == [LANE] * 2


@pytest.mark.parametrize(("depth", "waits"), [(0, False), (1, True), (None, None)])
def test_what_was_sent_into_a_lane_waits_unless_it_is_empty(told, depth, waits):
    told.depths[LANE] = depth
    assert told.is_queued(LANE, "normal", told.now, 1.0) is waits


def test_what_was_overtaken_does_not_wait_in_its_lane(told):
    told.depths[LANE] = 5
    told.accepted(LANE, 3.0, "normal", 1010.0)
    told.accepted(LANE, 3.0, "normal", 1005.0)
    assert [told.is_queued(LANE, "normal", sent_at, 1.0) for sent_at in (1008.0, 1009.5, 1011.0)] == [False, True, True]
    assert told.is_queued(LANE, "low", 1008.0, 1.0), "it may be overtaken by all others"
    assert told.is_queued(lane("chat", "another"), "normal", 1008.0, 1.0) is False, "that one is empty"
    told.depths[LANE] = None
    told.now += 1
    assert told.is_queued(LANE, "normal", 1008.0, 1.0) is None


def test_a_broker_that_gave_no_answer_is_not_asked_about_every_lane(told, monkeypatch):
    asked = []

    @contextmanager
    def silent(timeout):
        asked.append(timeout)
        raise Cancelled("no answer")
        yield

    monkeypatch.setattr(told, "_producer", silent)
    monkeypatch.setattr(told, "_ask_broker", partial(Admission._ask_broker, told))
    for node in range(100):
        assert told.is_queued(f"llm.fleet.node.{node}", "normal", told.now, 0.5) is None
    assert asked == [0.5]
    told.now += 1
    told.is_queued(LANE, "normal", told.now, 0.5)
    assert asked == [0.5, 0.5]


def test_not_more_lanes_are_remembered_than_are_good(told):
    for number in range(MOST_LANES + 50):
        told.admit(f"llm.fleet.chat.{number}")
    assert len(told._lanes) == MOST_LANES


def test_a_broker_that_does_not_tell_admits_whatever_was_counted(told):
    told.depths[LANE] = 10
    told.refused()
    told.now += 1
    told.depths[LANE] = None
    told.admit_many(20)


def test_one_thread_asks_and_nobody_waits_for_it(told, monkeypatch):
    answers, asking = threading.Event(), threading.Event()

    def slowly(lane, timeout):
        asking.set()
        answers.wait(10)
        return (10,)

    monkeypatch.setattr(told, "_ask_broker", slowly)
    first = threading.Thread(target=told.refused)
    first.start()
    assert asking.wait(10)
    with took_less_than(2):
        told.admit_many(3)
        assert told.depth(LANE, timeout=0.05) is None
    answers.set()
    first.join()


# --- How long a request may wait


def started(told, number, seconds=10.0, priority="normal"):
    """So many requests are accepted at once, and end so many seconds later."""
    places = [told.admit(LANE, priority) for _ in range(number)]
    for place in places:
        place.accepted(told.now)
    told.now += seconds
    for place in places:
        place.ended(told.now)


def too_slow(told, max_wait=5.0, priority="normal", slots=4):
    with pytest.raises(FleetSaturated) as caught:
        told.admit(LANE, priority, max_wait=max_wait, count_slots=lambda: slots)
    return caught.value


def test_a_request_that_would_wait_too_long_is_refused_and_told_when_to_come(told):
    started(told, 4)
    told.depths[LANE] = 3
    error = too_slow(told)
    assert error.message == (
        "a request for stream_chat of qwen3-14b would wait about 10 s, and this one may wait 5 s (max_wait): "
        "try again in 7.5 s, or let more nodes serve it"
    )
    assert error.metadata == {"retry_after": 7.5}
    assert too_slow(told).metadata == {"retry_after": 10.0}, "one later"
    told.admit(LANE, max_wait=11.0)
    told.admit(LANE)


def test_a_free_slot_is_no_wait(told):
    started(told, 4)
    for _ in range(4):
        told.admit(LANE, max_wait=0.0, count_slots=lambda: 4).accepted(told.now)
    assert too_slow(told, max_wait=0.0).retryable


def test_a_slot_that_works_on_what_came_by_a_direct_lane_is_not_free(told):
    started(told, 4)
    places = [told.admit(f"llm.fleet.node.{node}", beside=LANE) for node in range(4)]
    for place in places:
        place.accepted(told.now)
        place.accepted(told.now)
    told.now += 1
    assert too_slow(told, max_wait=0.0).retryable
    for place in places:
        place.ended(told.now)
        place.ended(told.now)
    for _ in range(4):
        told.admit(LANE, max_wait=0.0, count_slots=lambda: 4).accepted(told.now)
    assert too_slow(told, max_wait=0.0).retryable


def test_a_lane_is_served_while_a_node_works_on_what_came_from_it(told):
    assert not told.is_served(LANE)
    place = told.admit(LANE)
    assert not told.is_served(LANE)
    place.accepted(told.now)
    assert told.is_served(LANE)
    place.ended(told.now)
    assert not told.is_served(LANE)


def test_a_higher_priority_counts_only_what_goes_first(told):
    started(told, 4, priority="low")
    told.depths[LANE] = (0, 1, 3, 5)
    waits = {}
    for priority in ("critical", "high", "normal", "low"):
        waits[priority] = float(too_slow(told, 0.0, priority).message.split("about ")[1].split(" s")[0])
    assert waits == {"critical": 2.5, "high": 5.0, "normal": 12.0, "low": 25.0}


def test_where_the_broker_tells_one_number_the_share_of_this_router_is_that_of_all(told):
    started(told, 4)
    for priority in ("high", "normal", "normal", "normal"):
        told.admit(LANE, priority)
    told.now += 0.25
    told.depths[LANE] = 8
    assert "about 7.7 s" in too_slow(told, 0.0, "high").message


def test_a_lane_that_may_be_slow_is_asked_about_four_times_a_second(told):
    for _ in range(8):
        told.admit(LANE, max_wait=100.0)
        told.now += 0.125
    assert len(told.asked) == 4


def test_it_can_be_refused_without_asking_if_that_is_certain(told):
    started(told, 4)
    told.refuse(LANE, "normal", 0.0)
    told.depths[LANE] = 3
    told.admit(LANE, max_wait=100.0, count_slots=lambda: 4)
    asked = len(told.asked)
    with pytest.raises(FleetSaturated):
        told.refuse(LANE, "normal", 5.0)
    told.refuse(LANE, "normal", None)
    told.refuse(LANE, "normal", 100.0)
    told.now += 0.3
    told.refuse(LANE, "normal", 5.0)
    assert len(told.asked) == asked


def test_a_broker_that_does_not_tell_admits_whatever_may_wait(told):
    started(told, 4)
    told.depths[LANE] = None
    for _ in range(10):
        told.admit(LANE, max_wait=0.0)


# --- With connections ------------------------------------------------------------------------------------------------

SCHEMES = ["redis", "amqp"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broker_that_is_not_there_admits(scheme):
    with took_less_than(1.5), admission_at(f"{scheme}://127.0.0.1:{free_port()}//", 1) as refusing:
        for _ in range(3):
            refusing.admit(LANE)
        assert refusing.depth(LANE) is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broker_that_says_nothing_is_waited_for_once_in_a_while(scheme, monkeypatch):
    monkeypatch.setattr(admission_module, "ANSWER_WITHIN", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"{scheme}://127.0.0.1:{silent.getsockname()[1]}//"
        with took_less_than(0.4 + 1.2), admission_at(url, 1_000) as held_up:
            for number in range(20):
                held_up.admit(f"llm.fleet.chat.{number}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_closed_asks_nobody_and_admits(scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent, took_less_than(1):
        with admission_at(f"{scheme}://127.0.0.1:{silent.getsockname()[1]}//", 10) as closed:
            pass
        closed.admit(LANE)
        assert closed.depth(LANE) is None
