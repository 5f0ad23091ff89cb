"""What a connected router has at a broker, here a Valkey of the test's own, and to which node an attempt goes."""

from collections import Counter
from types import SimpleNamespace

import pytest
import redis

from fleet_worker import Router, Settings
from fleet_worker.errors import QueueTimeout, UnsupportedParameter
from fleet_worker.protocol.openai import ChatParams
from fleet_worker.registry.view import SETTLED_AFTER, Registry
from fleet_worker.router import node_selection
from fleet_worker.router import session as session_module
from fleet_worker.router import submitter as submitter_module
from fleet_worker.router.node_selection import MOST_COUNTED, NodeSelection
from fleet_worker.testing import embedded_broker
from tests.mlx_clients import HELLO, until
from tests.unit.registry.test_view import Clock, about_instance, about_model, say


@pytest.fixture(scope="module")
def broker_url():
    with embedded_broker() as url:
        yield url


@pytest.fixture
def valkey(broker_url):
    with redis.Redis.from_url(broker_url, single_connection_client=True) as client:
        yield client
        client.flushdb()


@pytest.fixture
def quickly_idle(monkeypatch):
    monkeypatch.setattr(session_module, "IDLE_AFTER", 0.1)
    monkeypatch.setattr(submitter_module, "IDLE_AFTER", 0.1)


@pytest.fixture
def router(broker_url, quickly_idle):
    with Router(Settings(broker_url=broker_url)) as router:
        router.registry.require_offered = lambda *_: None
        yield router


def connections(valkey):
    return len(valkey.client_list()) - 1


def reply_queues(valkey):
    return list(valkey.scan_iter("*llm.fleet.reply.*"))


@pytest.mark.parametrize(("affinity", "held"), [(True, 4), (False, 3)])
def test_an_idle_session_holds_few_connections(valkey, broker_url, quickly_idle, affinity, held):
    """One of them for digests of prompt caches."""
    with Router(Settings(broker_url=broker_url, router={"affinity": affinity})) as router:
        router.registry.require_offered = lambda *_: None
        until(lambda: connections(valkey) == held, 5)
        with router.stream_chat("m", HELLO, timeout=20):
            assert held < connections(valkey) <= held + 1
            until(lambda: connections(valkey) <= held, 5)
        until(lambda: connections(valkey) <= held, 5)


def test_what_is_left_is_cancelled_at_all_nodes(valkey, router):
    with valkey.pubsub() as nodes:
        nodes.psubscribe("*llm.fleet.cancel*")
        assert nodes.get_message(timeout=5)["type"] == "psubscribe"
        with router.stream_chat("m", HELLO, timeout=20):
            pass
        assert nodes.get_message(timeout=5)["type"] == "pmessage"


def test_it_asks_registry_nodes_whenever_it_begins_to_listen_and_nodes_after_a_loss(valkey, broker_url):
    with valkey.pubsub() as fleet, Router(Settings(broker_url=broker_url)) as router:
        fleet.psubscribe("*llm.registry.ask*", "*llm.fleet.cancel*")
        for _ in range(2):
            assert fleet.get_message(timeout=5)["type"] == "psubscribe"
        others = {client["id"] for client in valkey.client_list()}
        made_at = router._registry._asked_at
        router._connected()
        assert b"llm.registry.ask" in fleet.get_message(timeout=5)["channel"]
        assert router._registry._asked_at > made_at
        assert fleet.get_message(timeout=0.2) is None
        for client in valkey.client_list():
            if client["id"] not in others:
                valkey.client_kill_filter(_id=client["id"])
        assert b"llm.registry.ask" in fleet.get_message(timeout=5)["channel"]
        assert b"llm.fleet.cancel" in fleet.get_message(timeout=5)["channel"]


def test_a_session_that_is_closed_leaves_nothing_at_the_broker(valkey, router):
    with router.stream_chat("m", HELLO, timeout=20):
        assert reply_queues(valkey)
    router.close()
    assert reply_queues(valkey) == []
    until(lambda: connections(valkey) == 0, 5)


# --- To which node an attempt goes


class Told:
    """A registry that says what a test has written: (instance, slots) by node. Without slots a node is not ready."""

    def __init__(self, *, servers=None, **nodes):
        self.servers = servers or {}
        self.nodes = nodes

    def offerings(self, *, model, capability, ready=None):
        assert (model, capability) == ("m", "chat")
        return [
            SimpleNamespace(
                node=node,
                instance=SimpleNamespace(name=instance, slots=slots, server=self.servers.get(node, "mlx_lm")),
            )
            for node, (instance, slots) in self.nodes.items()
            if ready is None or ready == (slots != 0)
        ]


def request(instance="any", **params):
    given = ChatParams.model_validate({"messages": [{"role": "user", "content": "Hi"}], **params})
    return SimpleNamespace(model="m", operation="chat", provider_instance=instance, params=given)


NODES = {"a": ("one", 1), "b": ("two", 1), "c": ("two", 1)}
SERVERS = {"a": "mlx_lm", "b": "vllm_mlx", "c": "mlx_next"}


@pytest.mark.parametrize(
    ("params", "instance", "nodes"),
    [
        ({"top_k": 5}, "any", {None}),
        ({"top_k": 5, "temperature": 0.7, "stop": ["a"], "user": "me"}, "any", {None}),
        ({"frequency_penalty": 0.1}, "any", {"a", "c"}),
        ({"frequency_penalty": 0.0}, "any", {None}),
        ({"seed": 7, "temperature": 0.7}, "any", {"a", "c"}),
        ({"seed": 7, "temperature": 0}, "any", {None}),
        ({"seed": 7}, "any", {"a", "c"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "any", {"b", "c"}),
        ({"response_format": {"type": "json_object"}}, "any", {None}),
        ({"frequency_penalty": 0.1}, "two", {"c"}),
    ],
)
def test_an_attempt_goes_to_a_node_whose_server_can_do_what_its_parameters_ask_for(params, instance, nodes):
    """A kind of server that this version does not know can do everything, for all that it knows."""
    selection = NodeSelection(Told(servers=SERVERS, **NODES))
    selection.require_able(request(instance, **params), None)
    assert {selection.node_for(request(instance, **params)) for _ in range(50)} == nodes


@pytest.mark.parametrize(("instance", "node"), [("any", "b"), ("two", "b"), ("three", None)])
def test_a_request_that_no_server_can_do_is_refused_by_the_name_of_its_parameter(instance, node):
    selection = NodeSelection(Told(servers={**SERVERS, "d": "vllm_mlx"}, d=("three", 0), **NODES))
    with pytest.raises(UnsupportedParameter) as raised:
        selection.require_able(request(instance, frequency_penalty=0.1), node)
    assert (raised.value.metadata, raised.value.retryable) == ({"param": "frequency_penalty"}, False)
    selection.require_able(request(instance, presence_penalty=0.1), node)


def test_a_request_without_a_temperature_is_left_to_the_nodes_whose_models_may_have_0():
    selection = NodeSelection(Told(servers={"b": "vllm_mlx"}, b=("two", 1)))
    selection.require_able(request(seed=7), None)
    with pytest.raises(UnsupportedParameter):
        selection.require_able(request(seed=7, temperature=0.5), None)


def test_a_request_for_a_node_that_nobody_knows_yet_is_not_refused():
    NodeSelection(Told()).require_able(request(frequency_penalty=0.1), None)


@pytest.mark.parametrize(
    ("nodes", "instance", "failed", "node"),
    [
        ({"a": ("one", 1), "b": ("one", 1)}, "any", [], None),
        ({"a": ("one", 1), "b": ("one", 1)}, "any", ["a"], "b"),
        ({"a": ("one", 1), "b": ("one", 1)}, "any", ["a", "b"], None),
        ({"a": ("one", 1), "b": ("one", 1)}, "any", ["c"], None),
        ({"a": ("one", 1)}, "any", ["a"], None),
        ({}, "any", ["a"], None),
        ({"a": ("one", 1), "b": ("one", 1)}, "one", [], None),
        ({"a": ("one", 1), "b": ("two", 1)}, "two", [], "b"),
        ({"a": ("one", 1), "b": ("two", 1)}, "two", ["b"], "b"),
        ({"a": ("one", 1), "b": ("two", 0)}, "two", [], "b"),
        ({"a": ("one", 0), "b": ("two", 0)}, "two", [], "b"),
        ({"a": ("one", 1), "b": ("two", 1), "c": ("two", 0)}, "two", [], "b"),
        ({"a": ("one", 1), "b": ("two", 1), "c": ("two", 0)}, "two", ["b"], "b"),
        ({"a": ("two", 0), "b": ("two", 0)}, "two", [], None),
        ({"a": ("one", 0), "b": ("one", 1)}, "any", ["b"], None),
        ({"a": ("one", 1), "b": ("two", 1), "c": ("two", 1)}, "two", ["b"], "c"),
        ({"a": ("one", 1)}, "two", [], None),
        ({}, "two", [], None),
    ],
)
def test_an_attempt_goes_into_its_lane_unless_the_wrong_one_may_take_it_there(nodes, instance, failed, node):
    assert NodeSelection(Told(**nodes)).node_for(request(instance), failed) == node


def test_many_requests_that_wait_in_direct_lanes_do_not_look_up_all_nodes_each(monkeypatch):
    told, now = Told(a=("one", 1), b=("one", 0)), [100.0]
    monkeypatch.setattr(node_selection, "time", SimpleNamespace(monotonic=lambda: now[0]))
    looked_up, look_up = [], told.offerings
    told.offerings = lambda *args, **options: looked_up.append(args) or look_up(*args, **options)
    selection = NodeSelection(told)
    for _ in range(100):
        assert selection.is_ready(request(), "a")
        assert not selection.is_ready(request(), "b")
    assert len(looked_up) == 1
    told.nodes["a"] = ("one", 0)
    now[0] += 0.25
    assert not selection.is_ready(request(), "a")


def test_who_has_more_slots_is_chosen_more_often():
    selection = NodeSelection(Told(a=("one", 1), b=("one", 9), c=("one", None), failed=("one", 50)))
    chosen = Counter(selection.node_for(request(), ["failed"]) for _ in range(2_000))
    assert chosen.keys() == {"a", "b", "c"}
    assert chosen["b"] > 3 * (chosen["a"] + chosen["c"])


@pytest.mark.parametrize(
    ("nodes", "instance", "waits_in_vain"),
    [
        ({"a": ("one", 1)}, "any", False),
        ({"a": ("one", 0), "b": ("two", 1)}, "any", True),
        ({"b": ("two", 1)}, "any", True),
        ({"a": ("one", 0), "b": ("two", 1)}, "one", False),
        ({"a": ("one", 0), "b": ("one", 1)}, "one", True),
    ],
)
def test_a_node_that_is_away_is_waited_for_only_if_nobody_else_may_take_it(nodes, instance, waits_in_vain):
    assert NodeSelection(Told(**nodes)).waits_in_vain(request(instance), "a") == waits_in_vain


# --- Whether a request for which nobody is ready may wait


@pytest.fixture
def away():
    """A model of two instances, "one" since 20 s and "two" since 8 s away, and one with 3 slots."""
    clock = Clock()
    registry = Registry(clock=clock)
    clock.turn(60)
    say(
        registry,
        about_instance("one", status="unavailable", capacity={"slots": 2}, status_age=20.0),
        about_instance("two", status="unavailable", capacity={"slots": 2}, status_age=8.0),
        about_instance("three", capacity={"slots": 3}, node="three@mini"),
        *(about_model("away", instance=name, status="unavailable") for name in ("one", "two")),
        about_model("ready", instance="three"),
    )
    return NodeSelection(registry)


def wish(model, instance="any"):
    return SimpleNamespace(model=model, operation="chat", provider_instance=instance, params=None)


@pytest.mark.parametrize(
    ("model", "instance", "max_wait", "away_for"),
    [
        ("away", "any", None, None),
        ("away", "any", 10.0, None),
        ("away", "any", 5.0, 8.0),
        ("away", "any", 0.0, 8.0),
        ("away", "one", 10.0, 20.0),
        ("ready", "any", 0.0, None),
        ("unknown", "any", 0.0, None),
    ],
)
def test_who_may_wait_less_than_its_instances_have_been_away_is_told_at_once(away, model, instance, max_wait, away_for):
    if away_for is None:
        away.require_soon(wish(model, instance), None, max_wait)
        return
    with pytest.raises(QueueTimeout) as caught:
        away.require_soon(wish(model, instance), None, max_wait)
    assert caught.value.metadata == {"away_for": away_for}
    instances = "all 2 instances of it are" if instance == "any" else "its only instance is"
    assert caught.value.message == (
        f"nobody has served chat of that model for {away_for:.0f} s ({instances} unavailable), "
        f"and the request may wait {max_wait:g} s (max_wait)"
    )


@pytest.fixture
def fleet():
    """A registry of a router that asked long ago, and its clock."""
    clock = Clock()
    registry = Registry(clock=clock)
    clock.turn(60)
    return registry, clock


def tell(registry, **instances):
    """Each instance offers the model `m`: in this state, for so many seconds."""
    for name, (status, age) in instances.items():
        say(
            registry,
            about_instance(name, status=status, status_age=age, capacity={"slots": 1}, node=f"{name}@mini"),
            about_model("m", instance=name, status=status),
        )


def is_refused(registry, instance="any", node=None):
    try:
        NodeSelection(registry).require_there(wish("m", instance), node, 120.0)
    except QueueTimeout as error:
        return error.metadata.get("by_owner", "away for long")
    return False


@pytest.mark.parametrize(
    ("instances", "refused"),
    [
        ({"a": ("away", 1.0)}, True),
        ({"a": ("away", 1.0), "b": ("away", 900.0)}, True),
        ({"a": ("away", 1.0), "b": ("available", 1.0)}, False),
        ({"a": ("away", 900.0), "b": ("degraded", 1.0)}, False),
        ({"a": ("unavailable", 119.0)}, False),
        ({"a": ("unavailable", 121.0)}, "away for long"),
        ({"a": ("drained", 121.0), "b": ("unavailable", 119.0)}, False),
        ({"a": ("drained", 900.0), "b": ("starting", 900.0)}, False),
        ({"a": ("away", 900.0), "b": ("drained", 900.0)}, "away for long"),
        ({}, False),
    ],
)
def test_only_what_nobody_can_do_soon_is_refused_at_once(fleet, instances, refused):
    registry, _ = fleet
    tell(registry, **instances)
    assert is_refused(registry) == refused


def test_who_is_refused_at_once_is_told_why_and_when_to_come_back(fleet):
    registry, _ = fleet
    tell(registry, a=("away", 3.0), b=("away", 7.0))
    with pytest.raises(QueueTimeout) as caught:
        NodeSelection(registry).require_there(wish("m"), None, 120.0)
    assert caught.value.message == (
        "no node can take the request now: "
        "nobody has served chat of that model for 3 s (all 2 instances of it are away)"
    )
    assert caught.value.metadata == {"away_for": 3.0, "by_owner": True, "retry_after": 60.0}


@pytest.mark.parametrize(
    ("status", "running", "is_there"),
    [
        ("degraded", 1, True),
        ("unavailable", 1, True),
        ("unavailable", 0, False),
        ("starting", 0, True),
        ("away", 1, False),
        ("drained", 1, False),
    ],
)
def test_a_server_that_starts_or_is_too_busy_to_answer_is_there(fleet, status, running, is_there):
    """It loads a large model, or reads a long prompt. One that is drained takes no other work after it."""
    registry, _ = fleet
    about = about_instance("a", status=status, status_age=900.0, capacity={"slots": 1, "running": running})
    say(registry, about, about_model("m", instance="a", status=status))
    assert NodeSelection(registry).may_be_there(wish("m"), None, is_served=True) == is_there
    assert bool(is_refused(registry)) != is_there


def test_what_is_known_of_other_instances_and_nodes_does_not_count(fleet):
    registry, _ = fleet
    tell(registry, a=("away", 1.0), b=("available", 1.0))
    assert is_refused(registry, "a")
    assert is_refused(registry, node="a@mini")
    assert not is_refused(registry, "b")
    assert not is_refused(registry, node="b@mini")


def test_no_request_is_refused_because_the_router_is_new_or_was_cut_off(fleet):
    """The host of an instance that is ready may not have answered yet."""
    registry, clock = fleet
    assert NodeSelection(registry).may_be_there(wish("m"), None)
    for _ in range(2):
        registry.note_asked()
        tell(registry, a=("away", 1.0))
        assert not is_refused(registry)
        clock.turn(SETTLED_AFTER)
        assert is_refused(registry)


def test_the_hosts_that_were_forgotten_are_not_there(fleet):
    registry, clock = fleet
    tell(registry, a=("available", 1.0))
    assert NodeSelection(registry).may_be_there(wish("m"), None)
    clock.turn(900)
    nodes = NodeSelection(registry)
    assert not nodes.may_be_there(wish("m"), None)
    assert nodes.may_be_there(wish("m"), None, is_served=True)  # without a registry node, as it seems
    assert not is_refused(registry)
    say(registry, about_instance("other"))
    assert nodes.why_waiting(wish("m"), None).text == "no host reports a node for chat of that model"


def test_the_slots_of_a_request_are_those_of_the_ready_instances_that_may_take_it(away):
    assert away.slots("ready", "chat", "any", None) == 3
    assert away.slots("ready", "chat", "one", None) == 0
    assert away.slots("ready", "chat", "any", "three@mini") == 3
    assert away.slots("away", "chat", "any", None) == 0


def test_slots_are_not_counted_for_each_request(away, monkeypatch):
    counted = []
    offerings = away._registry.offerings
    monkeypatch.setattr(away._registry, "offerings", lambda **how: counted.append(how) or offerings(**how))
    assert {away.slots("ready", "chat", "any", None) for _ in range(20)} == {3}
    assert len(counted) == 1
    for number in range(3 * MOST_COUNTED):
        away.slots(f"m{number}", "chat", "any", None)
    assert len(away._known) <= MOST_COUNTED
