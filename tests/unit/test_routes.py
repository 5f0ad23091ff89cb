"""Where an attempt goes: its lane, or one node."""

from collections import Counter
from types import SimpleNamespace

import pytest

from fleet_worker.routes import Routes


class Told:
    """A registry that says what a test has written: (instance, slots) by node."""

    def __init__(self, **ready):
        self.ready = ready

    def offerings(self, **asked):
        assert asked == {"model": "m", "capability": "chat", "ready": True}
        return [
            SimpleNamespace(node=node, instance=SimpleNamespace(name=instance, slots=slots))
            for node, (instance, slots) in self.ready.items()
        ]


def request(instance="any"):
    return SimpleNamespace(model="m", operation="chat", provider_instance=instance)


@pytest.mark.parametrize(
    ("ready", "instance", "failed", "node"),
    [
        ({"a": ("one", 1), "b": ("one", 1)}, "any", [], None),
        ({"a": ("one", 1), "b": ("one", 1)}, "any", ["a"], "b"),
        ({"a": ("one", 1), "b": ("one", 1)}, "any", ["a", "b"], None),
        ({"a": ("one", 1), "b": ("one", 1)}, "any", ["c"], None),
        ({"a": ("one", 1)}, "any", ["a"], None),
        ({}, "any", ["a"], None),
        ({"a": ("one", 1), "b": ("one", 1)}, "one", [], None),
        ({"a": ("one", 1), "b": ("two", 1)}, "two", [], "b"),
        ({"a": ("one", 1), "b": ("two", 1)}, "two", ["b"], None),
        ({"a": ("one", 1), "b": ("two", 1), "c": ("two", 1)}, "two", ["b"], "c"),
        ({"a": ("one", 1)}, "two", [], None),
        ({}, "two", [], None),
    ],
)
def test_an_attempt_goes_into_its_lane_unless_the_wrong_one_may_take_it_there(ready, instance, failed, node):
    assert Routes(Told(**ready)).node_for(request(instance), failed) == node


def test_who_has_more_slots_is_chosen_more_often():
    routes = Routes(Told(a=("one", 1), b=("one", 9), c=("one", None), failed=("one", 50)))
    chosen = Counter(routes.node_for(request(), ["failed"]) for _ in range(2_000))
    assert chosen.keys() == {"a", "b", "c"}
    assert chosen["b"] > 3 * (chosen["a"] + chosen["c"])


def test_who_is_not_ready_is_not_there():
    routes = Routes(Told(a=("one", 1)))
    assert routes.is_ready(request(), "a")
    assert not routes.is_ready(request(), "b")
