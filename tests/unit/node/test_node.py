"""What a node offers, when its configuration and its server's list of models change at the same moment."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from fleet_worker.mlx.offering import offerings_of
from fleet_worker.node import node as module
from fleet_worker.node.node import Node
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.settings import Settings


class LaneConsumer:
    """It follows at once."""

    lanes = wanted = frozenset()

    def follow(self, lanes):
        self.lanes = self.wanted = lanes

    def settled(self, timeout):
        return True


def settings(**instance):
    opted_in = {"enabled": True, "respond_to_requests": True}
    return Settings(instances={"one": {"base_url": "http://127.0.0.1:1", "fleet": opted_in, **instance}})


def new_node(settings, reported):
    return Node(
        settings,
        name="one@test",
        instance="one",
        server="openai",
        mlx=SimpleNamespace(url="http://127.0.0.1:1"),
        offerings=offerings_of(settings.instances["one"], settings.features, reported),
        reported=reported,
        sender=None,
        intake=LaneConsumer(),
        running=RunningAttempts(),
        listeners=None,
        control=None,
    )


def reloaded(node):
    assert node.reload(settings(model_blacklist=["b"]))


def listed(node):
    node._models_reported(["a", "b", "c"])


@pytest.mark.parametrize(("first", "second"), [(reloaded, listed), (listed, reloaded)])
def test_what_is_offered_follows_the_newest_configuration_and_the_newest_list(first, second, monkeypatch):
    """The first one thinks until the second one has ended, or has to wait."""
    thinks, ended = threading.Event(), threading.Event()

    def slow_at_first(*known):
        offerings = offerings_of(*known)
        if not thinks.is_set():
            thinks.set()
            ended.wait(0.3)
        return offerings

    node = new_node(settings(), ["a", "b"])
    monkeypatch.setattr(module, "offerings_of", slow_at_first)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first, node)
        assert thinks.wait(5)
        other = pool.submit(second, node)
        other.add_done_callback(lambda _: ended.set())
    assert one.exception() is other.exception() is None
    assert set(node.offerings) == {"a", "c"}


@pytest.mark.parametrize(
    ("leave", "level"),
    [
        (lambda node: node.drain(), "INFO"),
        (lambda node: node.drain(ending=True), "INFO"),
        (lambda node: (node._readiness.refused(), node._follow()), "WARNING"),
    ],
    ids=["drained", "ending", "its server is gone"],
)
def test_a_node_that_is_meant_to_leave_its_lanes_does_not_warn_of_it(leave, level, caplog):
    caplog.set_level("INFO", "fleet_worker")
    node = new_node(settings(), ["a"])
    node._readiness.canary_ended(None)
    node._follow()
    leave(node)
    left = [record for record in caplog.records if "leaves lane" in record.getMessage()]
    assert {record.levelname for record in left} == {level}
    assert node.lanes == frozenset()
