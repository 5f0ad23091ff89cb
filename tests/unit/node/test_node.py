"""What keeps a node from its lanes, and what it logs of them."""

from types import SimpleNamespace

import pytest

from fleet_worker.broker.app import create_app
from fleet_worker.node.node import Node
from fleet_worker.node.server_discovery import Server
from fleet_worker.settings import Settings


def settings(**instance):
    opted_in = {"enabled": True, "respond_to_requests": True}
    return Settings(instances={"one": {"base_url": "http://127.0.0.1:1", "fleet": opted_in, **instance}})


@pytest.fixture
def node():
    """It has one model, a server that nothing is asked of, and no connection to a broker."""
    app = create_app(Settings(broker_url="redis://127.0.0.1:1"))
    client = SimpleNamespace(url="http://127.0.0.1:1", close=lambda: None)
    node = Node(app, settings(), "one@test", Server(client, "openai", ["a"]))
    yield node
    node.close()


@pytest.mark.parametrize(
    ("leave", "level"),
    [
        (lambda node: node.drain(), "INFO"),
        (lambda node: node.drain(ending=True), "INFO"),
        (lambda node: node.pause("away", "a user is at it"), "INFO"),
        (lambda node: (node._readiness.connection_refused(), node._update_lanes()), "WARNING"),
    ],
    ids=["drained", "ending", "paused", "its server is gone"],
)
def test_a_node_that_is_meant_to_leave_its_lanes_does_not_warn_of_it(node, leave, level, caplog):
    caplog.set_level("INFO", "fleet_worker")
    node._readiness.canary_ended(None)
    node._update_lanes()
    leave(node)
    left = [record for record in caplog.records if "leaves lane" in record.getMessage()]
    assert {record.levelname for record in left} == {level}
    assert node.lanes == frozenset()


def test_a_paused_node_leaves_its_lanes_until_its_server_has_proved_itself_again(node):
    node._readiness.canary_ended(None)
    node._update_lanes()
    wanted = node._lane_consumer.wanted
    node.pause("away", "a user is at it")
    assert (node.state.status, node._lane_consumer.wanted) == ("away", frozenset())
    node.resume()
    assert (node.state.status, node._lane_consumer.wanted) == ("starting", frozenset())
    node._readiness.canary_ended(None)
    node._update_lanes()
    assert node._lane_consumer.wanted == wanted != frozenset()
