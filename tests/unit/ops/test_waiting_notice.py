"""A request that waits because no node serves the model says so on standard error."""

from types import SimpleNamespace

import pytest

from fleet_worker.errors import BrokerUnavailable
from fleet_worker.ops import waiting_notice
from fleet_worker.ops.waiting_notice import WaitingNotice
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.offered import Offered


def offered(host, status, reason=""):
    instance = InstanceStatus(host=host, name="local", node=f"local@{host}", status=status, reason=reason)
    return Offered("qwen", ("chat",), (), {}, instance.ready, instance)


def printed(capsys, monkeypatch, offerings):
    """What is printed for a request for `qwen` that waits for longer than a person likes to."""
    monkeypatch.setattr(waiting_notice, "PATIENCE", 0.0)
    router = SimpleNamespace(registry=SimpleNamespace(offerings=offerings))
    with WaitingNotice(router, "qwen") as notice:
        notice._timer.join(5)
    return capsys.readouterr().err


def test_where_all_nodes_are_away_it_says_why(capsys, monkeypatch):
    nodes = [offered(f"mini-{each}", "away", "a user is at it\x1b") for each in range(4)]
    assert printed(capsys, monkeypatch, lambda model: nodes) == (
        "fleet-worker: no node takes requests for qwen now, so this one waits (local@mini-0 is away: a user is at it?; "
        "local@mini-1 is away: a user is at it?; local@mini-2 is away: a user is at it?; and 1 more)\n"
    )


@pytest.mark.parametrize("nodes", [[], [offered("a", "available"), offered("b", "away")]], ids=["unknown", "one works"])
def test_where_it_is_not_so_it_says_nothing(capsys, monkeypatch, nodes):
    assert printed(capsys, monkeypatch, lambda model: nodes) == ""


def test_a_broker_that_is_away_is_left_to_the_request(capsys, monkeypatch):
    def offerings(model):
        raise BrokerUnavailable("it is away")

    assert printed(capsys, monkeypatch, offerings) == ""


def test_an_answer_ends_it(capsys):
    with WaitingNotice(SimpleNamespace(), "qwen") as notice:
        notice.cancel()
        notice._timer.join(5)
    assert capsys.readouterr().err == ""
