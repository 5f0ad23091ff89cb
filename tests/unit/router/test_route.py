"""The way of a request: the shared lane or a direct one, chosen before each attempt."""

import math
from types import SimpleNamespace

import pytest

from fleet_worker.broker.topology import lane
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes
from fleet_worker.protocol.reply import Usage
from fleet_worker.router.affinity.affinity import Placement
from fleet_worker.router.route import Route
from fleet_worker.router.session import Session
from fleet_worker.settings import RouterSettings
from tests.unit.router.test_attempts import DOWN, failure, request, response

PREFIXES = PromptPrefixes(chain=(("A" * 11, 100),))
SETTINGS = RouterSettings()
HOUR = 3600.0


class Warm:
    """An `Affinity` that chooses what a test says, and keeps what it is told."""

    def __init__(self):
        self.best, self.patience, self.wait = "a", math.inf, 0.0
        self.silence, self.free, self.other = 0.0, False, False
        self.placed, self.told = [], []

    def place(self, request, prefixes, failed, *, blamed):
        self.placed.append((set(failed), blamed))
        return Placement(self.best, prefixes, patience=self.patience, wait=self.wait)

    def is_silent(self, node, seconds):
        return self.silence > seconds

    def has_free_slots(self, node):
        return self.free

    def another_is_free(self, request, node):
        return self.other

    def sent(self, request_id, placement):
        self.told.append(("sent", placement.node))

    def accepted(self, request_id, node):
        self.told.append(("accepted", node))

    def first_token(self, request_id):
        self.told.append("token")

    def ended(self, request_id, usage, node):
        self.told.append(("ended", usage, node))
        return "hit" if usage else None


class Nodes:
    def __init__(self):
        self.cannot, self.away, self.chosen = set(), set(), None
        self.all = {"a", "b"}

    def node_for(self, request, avoided):
        return self.chosen

    def unable(self, request):
        return self.cannot

    def is_ready(self, request, node):
        return node not in self.away

    def ready(self, model, operation):
        return self.all - self.away

    def waits_in_vain(self, request, node):
        return node in self.away


@pytest.fixture
def warm():
    return Warm()


@pytest.fixture
def nodes():
    return Nodes()


@pytest.fixture
def route(nodes, warm):
    return Route(request(), None, nodes, warm, PREFIXES)


def is_stranded(route, waited):
    return route.is_stranded(request(), waited, SETTINGS)


def test_it_goes_to_the_warmest_node(route):
    assert route.lane(request()) == "llm.fleet.node.a"
    assert route.is_chosen


def test_it_goes_to_the_shared_lane_if_affinity_says_so(nodes, warm):
    warm.best = None
    route = Route(request(), None, nodes, warm, PREFIXES)
    assert route.lane(request()) == lane("stream_chat", "m")
    assert not route.is_chosen
    assert not is_stranded(route, HOUR)


def test_what_a_caller_wants_on_one_node_is_not_placed(nodes, warm):
    route = Route(request(), "b", nodes, warm, PREFIXES)
    assert route.lane(request()) == "llm.fleet.node.b"
    assert (warm.placed, route.prefixes) == ([], PREFIXES)
    assert not is_stranded(route, HOUR)


def test_what_a_caller_wants_on_an_instance_is_not_placed(nodes, warm):
    nodes.chosen = "c"
    route = Route(request().model_copy(update={"provider_instance": "two"}), None, nodes, warm, PREFIXES)
    assert (route.node, warm.placed) == ("c", [])


def test_with_affinity_off_nothing_is_told(warm):
    route = Route(request(), None, Nodes())
    assert (route.node, route.prefixes) == (None, None)
    frame = response(1)
    assert route.ended(frame) is frame


@pytest.mark.parametrize("waited", [0.0, 1.0])
def test_a_node_that_is_not_ready_any_more_is_left_at_once(route, nodes, waited):
    assert not is_stranded(route, waited)
    nodes.away.add("a")
    assert is_stranded(route, waited)


@pytest.mark.parametrize(
    ("said", "waited", "stranded"),
    [
        ({}, HOUR, False),
        ({"silence": 5.1}, 5.0, True),
        ({"silence": 5.1}, 4.9, False),
        ({"silence": 4.9}, HOUR, False),
        ({"free": True}, 5.0, True),
        ({"free": True}, 4.9, False),
        ({"free": False}, 5.0, False),
        ({"other": True, "patience": 20.0}, 20.0, True),
        ({"other": True, "patience": 20.0}, 19.9, False),
        ({"other": False, "patience": 20.0}, HOUR, False),
        ({"other": True, "patience": 0.5}, 0.5, True),
    ],
)
def test_a_chosen_node_is_left_when_it_would_have_taken_the_request_or_another_is_free(
    nodes, warm, said, waited, stranded
):
    warm.patience = said.pop("patience", math.inf)
    route = Route(request(), None, nodes, warm, PREFIXES)
    vars(warm).update(said)
    assert is_stranded(route, waited) is stranded


def test_what_a_node_did_not_take_goes_to_the_shared_lane(route, warm):
    assert route.leave()
    route.choose(request())
    assert route.node is None
    assert len(warm.placed) == 1
    route.sent()
    assert warm.told == [("sent", None)]
    assert not route.leave()


def test_after_a_failure_it_goes_to_the_next_warmest(route, warm):
    warm.best = "b"
    route.choose(request(), {"a"}, blamed=True)
    assert route.node == "b"
    assert warm.placed[-1] == ({"a"}, True)


def test_after_a_failure_and_a_node_that_did_not_take_it_neither_is_tried_again(route, warm):
    warm.best = "b"
    route.choose(request(), {"a"})
    assert route.leave()
    route.choose(request(), {"a"})
    assert warm.placed[-1] == ({"a", "b"}, False)


def test_after_a_failure_a_chosen_node_is_left_only_for_another_one(route, nodes, warm):
    warm.best, warm.silence = "b", HOUR
    route.choose(request(), {"a"})
    assert not is_stranded(route, HOUR)
    nodes.all = {"a", "b", "c"}
    assert is_stranded(route, 5.0)
    assert not is_stranded(route, 4.9)
    warm.silence = 0.0
    assert not is_stranded(route, HOUR)
    nodes.away.add("b")
    assert is_stranded(route, 5.0)
    assert not is_stranded(route, 4.9)


def test_a_node_whose_server_cannot_do_it_counts_as_failed(nodes, warm):
    nodes.cannot = {"c"}
    route = Route(request(), None, nodes, warm, PREFIXES)
    assert warm.placed == [({"c"}, False)]
    route.leave()
    route.choose(request())
    assert warm.placed[-1] == ({"a", "c"}, False)


def test_affinity_learns_the_first_token_of_each_attempt_once(route, warm):
    for node in ("a", "b"):
        route.sent()
        route.accepted(node)
        route.first_token()
        route.first_token()
    assert warm.told == [("sent", "a"), ("accepted", "a"), "token", ("sent", "a"), ("accepted", "b"), "token"]


def test_an_answer_tells_what_became_of_the_cached_prompt(route, warm):
    frame = response(1).model_copy(update={"usage": Usage(prompt_tokens=10, cached_tokens=9)})
    assert route.ended(frame).cache == "hit"
    assert warm.told == [("ended", frame.usage, frame.node)]


def test_affinity_forgets_a_request_that_failed(route, warm):
    frame = failure(1, DOWN)
    assert route.ended(frame) is frame
    assert warm.told == [("ended", None, None)]


@pytest.mark.parametrize(
    ("wait", "max_wait", "admitted"), [(5.0, None, ["a"]), (5.0, 5.0, ["a"]), (5.0, 4.9, [None]), (0.0, 0.0, ["a"])]
)
def test_who_may_not_wait_for_the_warm_node_goes_to_the_shared_lane(route, warm, wait, max_wait, admitted):
    warm.wait = wait
    route.choose(request())
    asked = []
    session = SimpleNamespace(_admit_to=lambda request, route, max_wait: asked.append(route.node))
    Session._admit(session, request(), route, max_wait)
    assert asked == admitted
