"""The choreography of a managed server and its node: each way through it, and everything at once."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fleet_worker.host.node_process import NEVER
from fleet_worker.host.up.server_plan import LATE, Away, Seen, ServerPlan, Wish
from fleet_worker.protocol.host_messages import Pause, Resume

GRACE = 30.0
FAULT = Wish("fault", "no token for 20 s", 0.0)
MEMORY = Wish("memory", "memory 13 GB", GRACE)
OPERATOR = Wish("operator", "an operator", GRACE)
CONFIGURATION = Wish("configuration", "its configuration has changed", GRACE)
USER = Away("user", 5.0, stops_server=True)


class Scene:
    """A plan, a server that obeys it, and a node that takes orders when told to."""

    def __init__(self):
        self.plan = ServerPlan()
        self.now = 100.0
        self.node_runs = self.serves = False
        self.idle = 0
        self.done = []

    def settle(self):
        """Do all that can be done now."""
        while step := self.plan.step(Seen(self.now, self.node_runs, self.idle, self.serves)):
            self.done.append(step if isinstance(step, str) else step.cause)
            self.serves = False
        return self.plan.order

    def serve(self):
        self.serves = True
        self.node_runs = True
        return self.settle()

    def become_idle(self):
        self.idle = self.plan.order.order
        return self.settle()

    def wait(self, seconds):
        self.now += seconds
        return self.settle()


@pytest.fixture
def scene():
    """A server that serves, with its node."""
    scene = Scene()
    scene.settle()
    assert scene.serve() == Resume(0)
    assert scene.done == ["start"]
    scene.done.clear()
    return scene


@pytest.mark.parametrize("wish", [FAULT, MEMORY, OPERATOR, CONFIGURATION])
def test_a_restart_waits_for_the_node_and_the_node_for_the_server(scene, wish):
    """Running requests have the grace of the wish."""
    scene.plan.wish(wish)
    assert scene.settle() == Pause("restarting", wish.reason, wish.grace, 1)
    assert not scene.done
    assert scene.become_idle() == Pause("restarting", wish.reason, wish.grace, 1)
    assert scene.done == [wish.cause]
    assert scene.serve() == Resume(2)
    assert scene.plan.due == NEVER


def test_a_node_that_never_gets_idle_delays_it_by_its_grace_and_a_little(scene):
    """It is frozen, or has no link."""
    scene.plan.wish(OPERATOR)
    scene.settle()
    assert scene.plan.due == scene.now + GRACE + LATE
    scene.wait(GRACE + LATE - 0.1)
    assert not scene.done
    scene.wait(0.1)
    assert scene.done == ["operator"]
    assert scene.plan.due == NEVER


def test_an_idle_of_an_earlier_pause_is_not_believed(scene):
    """It may have crossed the order to go on."""
    scene.plan.away = USER
    scene.settle()
    scene.idle = 1
    scene.plan.away = None
    scene.settle()
    scene.plan.wish(OPERATOR)
    assert scene.settle() == Pause("restarting", OPERATOR.reason, GRACE, 3)
    assert scene.done == []
    scene.become_idle()
    assert scene.done == ["operator"]


def test_every_pause_has_its_whole_grace(scene):
    """Whatever time the one before took."""
    scene.plan.wish(OPERATOR)
    scene.settle()
    scene.become_idle()
    scene.serve()
    scene.wait(1000.0)
    scene.plan.wish(MEMORY)
    scene.settle()
    assert scene.done == ["operator"]
    assert scene.plan.due == scene.now + GRACE + LATE


@pytest.mark.parametrize("wish", [OPERATOR, CONFIGURATION])
def test_a_server_that_does_not_serve_is_restarted_without_a_pause(scene, wish):
    """There is nothing to save. It may be quarantined: that is one try now."""
    scene.serves = False
    scene.plan.wish(wish)
    scene.settle()
    assert scene.done == [wish.cause]


@pytest.mark.parametrize("wish", [FAULT, MEMORY])
def test_what_was_wrong_with_a_server_ends_with_it(scene, wish):
    """It dies while its node ends its work: the next process has neither the fault nor the memory."""
    scene.plan.wish(wish)
    scene.settle()
    scene.serves = False
    assert scene.settle() == Resume(2)
    scene.serve()
    assert scene.done == []


def test_a_fault_makes_a_restart_urgent(scene):
    """What runs on a server that does not generate will not end."""
    scene.plan.wish(OPERATOR)
    scene.settle()
    scene.plan.wish(FAULT)
    assert scene.settle() == Pause("restarting", OPERATOR.reason, 0.0, 2)
    assert scene.plan.due == scene.now + LATE


def test_the_owner_gets_his_memory_and_gives_it_back(scene):
    """The server is started before the node goes on."""
    scene.plan.away = USER
    assert scene.settle() == Pause("away", "user", 5.0, 1)
    scene.become_idle()
    assert scene.done == ["stop"]
    scene.plan.away = None
    order = scene.settle()
    assert (order.status, order.order) == ("restarting", 2)
    assert scene.done == ["stop", "start"]
    assert scene.serve() == Resume(3)


def test_a_server_may_run_on_while_the_owner_is_there(scene):
    """Then its node goes on at once."""
    scene.plan.away = Away("user", 5.0, stops_server=False)
    scene.settle()
    scene.become_idle()
    scene.plan.away = None
    assert scene.settle() == Resume(2)
    assert scene.done == []


def test_the_owner_comes_during_a_restart(scene):
    """The server that loads is stopped; it starts once, when he has left."""
    scene.plan.wish(MEMORY)
    scene.settle()
    scene.become_idle()
    scene.plan.away = USER
    assert scene.settle().status == "away"
    scene.become_idle()
    assert scene.done == ["memory", "stop"]
    scene.plan.wish(OPERATOR)
    scene.settle()
    scene.plan.away = None
    scene.settle()
    assert scene.serve() == Resume(scene.plan.order.order)
    assert scene.done == ["memory", "stop", "start"]


def test_the_owner_shortens_the_grace_of_a_restart(scene):
    """But not the time that has passed already."""
    scene.plan.wish(OPERATOR)
    scene.settle()
    scene.wait(28.0)
    scene.plan.away = USER
    assert scene.settle() == Pause("away", "user", 5.0, 2)
    assert scene.plan.due == scene.now - 28.0 + GRACE + LATE


def test_a_configuration_that_changes_while_the_owner_is_there_starts_nothing(scene):
    """The server that starts when he has left is a new one."""
    scene.plan.away = USER
    scene.settle()
    scene.become_idle()
    scene.plan.wish(CONFIGURATION)
    scene.settle()
    assert scene.done == ["stop"]
    scene.plan.away = None
    scene.settle()
    assert scene.done == ["stop", "start"]


def test_an_instance_that_leaves_ends_its_node_first(scene):
    """However long that drains. If it comes back, its server starts again."""
    scene.plan.wanted = False
    scene.plan.wish(OPERATOR)
    scene.settle()
    scene.wait(1000.0)
    assert scene.done == []
    scene.node_runs = False
    scene.settle()
    assert scene.done == ["stop"]
    scene.plan.wanted = True
    scene.settle()
    assert scene.done == ["stop", "start"]


def test_nothing_is_started_for_an_owner_who_is_there(scene):
    """As when `up` starts while he works."""
    scene = Scene()
    scene.plan.away = USER
    scene.settle()
    assert scene.done == []
    scene.plan.away = None
    scene.settle()
    assert scene.done == ["start"]


class Everything(RuleBasedStateMachine):
    """Whatever overlaps: no request of a node that answers is cut, and in the end all is as it should be."""

    def __init__(self):
        super().__init__()
        self.plan = ServerPlan()
        self.now = 0.0
        self.server = "off"  # or starting, serving, dead
        self.node = "not started"  # or runs, ended
        self.answers = True
        self.taken = Resume(0)
        self.running = 0
        self.ends_at = math.inf
        """When the node hands over what runs."""
        self.idle = 0
        self.asked_at = None
        """When the oldest wish was made that still waits."""
        self._settle()

    def _settle(self):
        for _ in range(5):
            self._take_order()
            seen = Seen(self.now, self.node == "runs", self.idle, self.server == "serving")
            step = self.plan.step(seen)
            if not step:
                break
            if step != "start" and self.server == "serving" and self.node == "runs" and self.answers:
                assert self.running == 0, f"{step} cuts requests"
            if step == "start":
                assert self.server == "off"
                self.server = "starting"
            elif step == "stop":
                assert self.server != "off"
                self.server = "off"
            else:
                self.asked_at = None
                assert self.server != "off"
                self.server = "starting"
        else:
            raise AssertionError("it never rests")
        self._take_order()
        assert self.plan.due == NEVER or self.plan.due > self.now

    def _take_order(self):
        """A node takes the standing order, also the one that has just begun."""
        order = self.plan.order
        if self.node == "runs" and self.answers and order != self.taken:
            pauses = isinstance(order, Pause)
            self.ends_at = min(self.ends_at, self.now + order.grace) if pauses else math.inf
            self.taken = order
        if self.node == "runs" and self.answers and isinstance(self.taken, Pause):
            if self.now >= self.ends_at:
                self.running = 0
            if not self.running:
                self.idle = self.taken.order

    @rule(reason=st.sampled_from(["user", "battery"]), stops=st.booleans(), grace=st.sampled_from([0.0, 5.0]))
    def owner_comes(self, reason, stops, grace):
        self.plan.away = Away(reason, grace, stops)
        self._settle()

    @rule()
    def owner_leaves(self):
        self.plan.away = None
        self._settle()

    @rule(wish=st.sampled_from([OPERATOR, CONFIGURATION]))
    def wish(self, wish):
        self.plan.wish(wish)
        self._settle()

    @precondition(lambda self: self.server == "serving")
    @rule(wish=st.sampled_from([FAULT, MEMORY]))
    def wish_of_a_server_that_serves(self, wish):
        self.plan.wish(wish)
        self._settle()

    @rule(wanted=st.booleans())
    def leave_or_come_back(self, wanted):
        self.plan.wanted = wanted
        self._settle()

    @precondition(lambda self: self.server == "starting")
    @rule()
    def server_has_started(self):
        self.server = "serving"
        if self.node == "not started" and self.plan.wanted:
            self._start_node()
        self._settle()

    @precondition(lambda self: self.server in ("starting", "serving"))
    @rule()
    def server_dies(self):
        """`ManagedServer` starts it again."""
        self.server = "starting"
        self.running = 0
        self._settle()

    @precondition(lambda self: self.node == "runs")
    @rule()
    def node_ends(self):
        """As after a crash, or when it was told to, since its instance leaves."""
        self.node = "ended"
        self.running = self.idle = 0
        self._settle()

    @precondition(lambda self: self.node == "ended" and self.plan.wanted)
    @rule()
    def node_starts(self):
        self._start_node()
        self._settle()

    def _start_node(self):
        self.node, self.taken, self.ends_at, self.answers = "runs", Resume(0), math.inf, True
        self.running = self.idle = 0

    @precondition(lambda self: self.node == "runs" and isinstance(self.taken, Resume) and self.server == "serving")
    @rule()
    def request_comes(self):
        self.running += 1

    @precondition(lambda self: self.running)
    @rule()
    def request_ends(self):
        self.running -= 1
        self._settle()

    @precondition(lambda self: self.node == "runs")
    @rule(answers=st.booleans())
    def node_freezes_or_thaws(self, answers):
        self.answers = answers
        self._settle()

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0, 36.0]))
    def time_passes(self, seconds):
        """The loop of `up` wakes at `due`, the node at the end of its grace."""
        until = self.now + seconds
        while self.now < until:
            grace = [self.ends_at] if self.ends_at > self.now else []
            self.now = min([until, self.plan.due, *grace])
            self._settle()

    @invariant()
    def a_node_is_told_to_go_on_only_if_it_should(self):
        assert not (self.plan.away and isinstance(self.plan.order, Resume))

    def teardown(self):
        """All that has begun ends: the plan gets where it should."""
        self.time_passes(36.0)
        if not self.plan.wanted:
            if self.node == "runs":
                self.node_ends()
            assert self.server == "off"
            return
        for _ in range(2):
            if self.server == "starting":
                self.server_has_started()
        if self.node == "ended":
            self.node_starts()
        self.answers = True
        self.time_passes(36.0)
        away = self.plan.away
        assert self.server == ("off" if away and away.stops_server else "serving")
        if self.node == "runs":
            assert self.taken == self.plan.order
            assert getattr(self.taken, "status", "") == ("away" if away else "")
            assert self.idle == self.plan.order.order if away else True


TestEverything = Everything.TestCase
TestEverything.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
