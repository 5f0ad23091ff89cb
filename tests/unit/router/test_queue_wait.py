"""How long a request will wait: the estimate, and what it is made of."""

import heapq
import random
import threading
from itertools import count

import pytest

from fleet_worker.router.queue_wait import RANKS, LaneLoad, Place, Seen, estimate

BUSY = {"slots": 4, "service": 8.0}
"""One leaves the lane every two seconds."""


@pytest.mark.parametrize(
    ("seen", "seconds"),
    [
        ({"ahead": 0, "idle": 1, **BUSY}, 0.0),
        ({"ahead": 2, "idle": 3, **BUSY}, 0.0),
        ({"ahead": 3, "idle": 3, **BUSY}, 2.0),
        ({"ahead": 0, **BUSY}, 2.0),
        ({"ahead": 4, **BUSY}, 10.0),
        ({"ahead": 4, **BUSY, "busy": 20.0, "completed": 10.0}, 10.0),
        ({"ahead": 4, **BUSY, "busy": 92.0, "completed": 96.0}, 5.0),
        ({"ahead": 4, **BUSY, "busy": 8.0}, 20.0),
        ({"ahead": 4, **BUSY, "overtakers": 0.25}, 20.0),
        ({"ahead": 0, **BUSY, "overtakers": 9.0}, 100.0),
        ({"ahead": 9, "slots": 0, "service": 1.0}, 10.0),
    ],
    ids=[
        "a slot is free",
        "more slots are free than wait",
        "they are for those that wait",
        "none is free",
        "others go first",
        "the lane is as fast as the slots say",
        "it is twice as fast",
        "nothing was completed for as long as a request takes",
        "half of the slots go to a higher priority",
        "all of them do",
        "the slots are not known",
    ],
)
def test_the_estimate(seen, seconds):
    assert estimate(Seen(**seen)) == pytest.approx(seconds)


def seen(load, now, priority="normal"):
    return load.seen(priority, now)


def test_a_lane_of_which_nothing_is_known_has_a_free_slot():
    assert estimate(seen(LaneLoad(), 5.0)) == 0.0


def test_what_has_entered_since_the_broker_was_asked_waits_too():
    load = LaneLoad()
    for _ in range(3):
        load.enter("normal", 0.0)
    before = load.entered
    load.enter("normal", 0.1)
    load.tell((0, 0, 3, 0), 4, before, 0.1)
    assert seen(load, 0.1).ahead == 4
    load.accept("normal", 0.2)
    assert seen(load, 0.2).ahead == 3


def test_the_time_that_a_request_takes_is_averaged_and_begins_with_the_first():
    load = LaneLoad()
    for seconds in (8.0, 4.0):
        load.enter("normal", 0.0)
        load.complete(seconds, load.accept("normal", 0.0), seconds)
    assert seen(load, 8.0).service == 6.0


def test_only_the_time_in_which_requests_wait_tells_how_fast_a_lane_is():
    load = LaneLoad()
    load.enter("normal", 0.0)
    load.complete(5.0, load.accept("normal", 0.0), 5.0)
    assert (seen(load, 5.0).busy, seen(load, 5.0).completed) == (0, 0)
    load.enter("normal", 5.0)
    assert 0.9 < seen(load, 6.0).busy < 1.0
    assert seen(load, 6.0).overtakers == 0
    assert load.seen("low", 6.0).overtakers > 0


def test_of_several_routers_each_counts_what_the_others_complete():
    load = LaneLoad()
    for _ in range(5):
        load.enter("normal", 0.0)
    for _ in range(50):
        load.tell((0, 0, 20, 0), 4, load.entered, 0.0)
    load.complete(1.0, load.accept("normal", 0.0), 1.0)
    assert seen(load, 1.0).completed == pytest.approx(4.0)


def test_a_place_is_left_once():
    load, lock = LaneLoad(), threading.Lock()
    place = Place(load, lock, "normal", 0.0)
    for _ in range(2):
        place.accepted(1.0)
    for _ in range(2):
        place.ended(3.0)
    place.accepted(4.0)
    Place(load, lock, "normal", 4.0).ended(5.0)
    load.slots = 2
    assert (load.entered, seen(load, 5.0).idle, load.service) == ([0, 0, 0, 0], 2, 2.0)


class Fleet:
    """Slots that take the first request of the lane when they are free, and routers that refuse by the estimate."""

    def __init__(self, slots, service, *, routers=1, max_wait=5.0, seed=0):
        self.slots, self.service, self.max_wait = slots, service, max_wait
        self.random = random.Random(seed)
        self.loads = [LaneLoad() for _ in range(routers)]
        self.lane = {priority: [] for priority in RANKS}
        self.running = 0
        self.waits = {priority: [] for priority in RANKS}
        self.refused = dict.fromkeys(RANKS, 0)
        self.completed = 0
        self.events, self.numbers = [], count()

    def at(self, when, do, *what):
        heapq.heappush(self.events, (when, next(self.numbers), do, what))

    def run(self, seconds, *, load, priorities):
        """Let requests come for so many seconds, `load` times as many as the slots can do."""
        now = 0.0
        while now < seconds:
            now += self.random.expovariate(load * self.slots / self.service)
            self.at(now, self.ask, self.random.choices([*priorities], [*priorities.values()])[0])
        for each in self.loads:
            self.at(0.0, self.tell, each, seconds)
        while self.events:
            self.now, _, do, what = heapq.heappop(self.events)
            if self.now > seconds:
                return
            do(*what)

    def tell(self, load, until):
        load.tell([len(each) for each in self.lane.values()], self.slots, load.entered, self.now)
        self.at(self.now + 0.25, self.tell, load, until)

    def ask(self, priority):
        load = self.random.choice(self.loads)
        if estimate(load.seen(priority, self.now)) > self.max_wait:
            self.refused[priority] += 1
            return
        load.enter(priority, self.now)
        self.lane[priority].append((load, self.now))
        self.start()

    def start(self):
        for priority, waiting in self.lane.items():
            while waiting and self.running < self.slots:
                load, since = waiting.pop(0)
                self.running += 1
                self.waits[priority].append(self.now - since)
                seconds = self.random.expovariate(1 / self.service)
                self.at(self.now + seconds, self.end, load, seconds, load.accept(priority, self.now))

    def end(self, load, seconds, stands_for):
        self.running -= 1
        self.completed += 1
        load.complete(seconds, stands_for, self.now)
        self.start()


def together(priority, fleets):
    """The part that was refused, and the wait that 95 of 100 of the others do not exceed."""
    waits = sorted(wait for fleet in fleets for wait in fleet.waits[priority])
    refused = sum(fleet.refused[priority] for fleet in fleets)
    return refused / (refused + len(waits)), waits[int(0.95 * len(waits))]


def run(*what, seconds=60, load=2.0, priorities=None, **how):
    fleets = [Fleet(*what, seed=seed, **how) for seed in range(5)]
    for fleet in fleets:
        fleet.run(seconds, load=load, priorities=priorities or {"normal": 1})
    return fleets


@pytest.mark.parametrize(("slots", "service", "routers"), [(32, 1.0, 1), (16, 0.5, 1), (100, 4.0, 2), (16, 1.0, 3)])
def test_at_twice_the_capacity_half_is_refused_and_the_others_wait_no_longer_than_they_may(slots, service, routers):
    fleets = run(slots, service, routers=routers)
    refused, p95 = together("normal", fleets)
    assert 0.4 < refused < 0.55
    assert p95 < 6.0
    assert sum(fleet.completed for fleet in fleets) * service > 0.95 * slots * 60 * 5, "all slots are used"


def test_at_less_than_the_capacity_nothing_is_refused():
    fleets = run(16, 1.0, load=0.8, priorities={"normal": 1, "low": 1})
    assert {count for fleet in fleets for count in fleet.refused.values()} == {0}


def test_a_higher_priority_is_refused_less_and_a_lower_one_before_it_waits_in_vain():
    fleets = run(16, 1.0, seconds=120, priorities={"high": 1, "normal": 1, "low": 1})
    (high, high_p95), (normal, normal_p95), (low, _) = (together(each, fleets) for each in ("high", "normal", "low"))
    assert high < 0.05 < normal < 0.6 < low
    assert high_p95 < 1.5
    assert normal_p95 < 6.5


def test_many_of_a_higher_priority_may_come():
    load = LaneLoad()
    for number in range(100):
        load.enter("high", number / 10)
    assert load.seen("high", 10.0).overtakers == 0
    assert 10 < load.seen("normal", 10.0).overtakers < 14
