"""What keeps a node from its lanes, and what it logs of them."""

import socket
import threading
from types import SimpleNamespace

import pytest

from fleet_worker.broker.app import create_app
from fleet_worker.errors import ConnectionFailure, InstanceUnavailable
from fleet_worker.host.parent_pipe import PARENT_PIPE
from fleet_worker.host.up_socket import socket_path
from fleet_worker.mlx.timeouts import CancelToken
from fleet_worker.node import node as module
from fleet_worker.node.node import Node
from fleet_worker.node.server_discovery import Server
from fleet_worker.protocol.host_messages import Pause, to_line
from fleet_worker.settings import Settings


def settings(**instance):
    opted_in = {"enabled": True, "respond_to_requests": True}
    return Settings(instances={"one": {"base_url": "http://127.0.0.1:1", "fleet": opted_in, **instance}})


@pytest.fixture
def node(tmp_path):
    """It has one model, a server that nothing is asked of, and no connection to a broker."""
    app = create_app(Settings(broker_url="redis://127.0.0.1:1"))
    client = SimpleNamespace(url="http://127.0.0.1:1", close=lambda: None)
    mine = settings().model_copy(update={"state_dir": tmp_path})
    node = Node(app, mine, "one@test", Server(client, "openai", ["a"]))
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


@pytest.mark.parametrize("error", [InstanceUnavailable("refused"), ConnectionFailure("it broke")])
def test_a_server_that_was_stopped_on_purpose_fails_no_request_and_is_not_blamed(node, error):
    node._readiness.canary_ended(None)
    node.pause("starting", "its MLX server is restarted")
    for number in range(5):
        with pytest.raises(type(error)) as raised, node.counting_failures("a", f"r{number}", CancelToken()):
            raise error
        assert raised.value.metadata["handed_over"] is True
    node.resume()
    assert node.state.status == "starting"
    assert not node._readiness.in_doubt(idle=True)


@pytest.fixture
def begun(node, monkeypatch):
    """The state of the node when its health monitor began: from then on it may take work."""
    found = []
    monkeypatch.setattr(node._monitor, "start", lambda: found.append(node.state.status))
    for part in (node.presence, node._status_client):
        monkeypatch.setattr(part, "start", lambda: None)
    return found


def test_a_node_that_up_has_started_waits_for_its_first_order_before_it_takes_work(node, begun, monkeypatch):
    """The owner may have come already."""
    monkeypatch.setenv(PARENT_PIPE, "7")
    with socket.socket(socket.AF_UNIX) as up:
        up.bind(str(socket_path(node.settings.state_dir, "test")))
        up.listen()
        starting = threading.Thread(target=node.start)
        starting.start()
        connection, _ = up.accept()
        with connection:
            assert connection.recv(1000)
            assert begun == []
            connection.sendall(to_line(Pause("away", "a user is at it", 5.0, order=1)))
            starting.join(5)
            assert begun == ["away"]


@pytest.mark.parametrize("is_supervised", [True, False])
def test_a_node_does_not_wait_long_for_an_up_that_is_not_there(node, begun, monkeypatch, is_supervised):
    """One that somebody has started by hand does not wait at all."""
    monkeypatch.setattr(module, "FIRST_ORDER_WITHIN", 0.1 if is_supervised else 60.0)
    monkeypatch.setenv(*((PARENT_PIPE, "7") if is_supervised else ("OTHER", "7")))
    node.start()
    assert begun == ["starting"]


def test_what_begins_after_a_paused_node_has_handed_over_is_handed_over_too(node):
    node.pause("away", "a user is at it")
    with node.running.attempt("before", 1, "q") as token:
        node.hand_over("the node takes no work: a user is at it")
        assert token.error.metadata == {"handed_over": True}
    with pytest.raises(InstanceUnavailable) as raised, node.running.attempt("after", 1, "q"):
        pass
    assert raised.value.metadata == {"handed_over": True}
    node.resume()
    with node.running.attempt("later", 1, "q") as token:
        assert token.error is None


def test_what_may_have_broken_a_server_is_not_free_to_do_that_to_every_node(node):
    node.pause("starting", "no token for more than 20 s")
    with node.running.attempt("before", 1, "q") as token:
        node.hand_over("the node takes no work", after_fault=True)
        assert token.error.metadata == {"instance_frozen": True}
    with pytest.raises(InstanceUnavailable) as raised, node.running.attempt("after", 1, "q"):
        pass
    assert raised.value.metadata == {"handed_over": True}


def test_a_drained_node_still_serves_what_it_takes_after_it_has_handed_over(node):
    """Its process may be asked to take work again at any time, and its server works."""
    node.drain()
    node.hand_over()
    with node.running.attempt("later", 1, "q") as token:
        assert token.error is None


def test_without_an_up_nobody_restarts_a_server(node, tmp_path):
    node.settings = node.settings.model_copy(update={"state_dir": tmp_path})
    assert node.restart_server() == "no fleet-worker up runs on this host"
