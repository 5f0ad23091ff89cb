"""What the registry node says of an instance whose MLX server `fleet-worker up` manages."""

import math
from dataclasses import replace

import pytest

from fleet_worker.protocol.host_messages import STAGES, HostStatus, ServerStatus
from fleet_worker.protocol.registry_event import RegistryEvent
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry import host_watch as module
from fleet_worker.registry.host_watch import HostWatch

REASONS = {
    "starting": "its MLX server has been starting for 40 s",
    "waiting": "its MLX server ended with exit code 1: out of memory; it is started again soon",
    "quarantined": (
        "its MLX server is quarantined after 2 deaths, the last one ended with exit code 1: out of memory; "
        "fleet-worker restart local@mini --server tries it now"
    ),
    "blocked": (
        "its MLX server cannot start: port 8080 is in use by python3.11, pid 123; end that program, or set another "
        "base_url"
    ),
    "stopping": "its MLX server is being stopped: it uses more than 12 GB",
}
TOLD = {
    "starting": "",
    "waiting": "ended with exit code 1: out of memory",
    "quarantined": "ended with exit code 1: out of memory",
    "blocked": "port 8080 is in use by python3.11, pid 123",
    "stopping": "it uses more than 12 GB",
}


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """Time stands still unless the test says otherwise."""
    watch = HostWatch(tmp_path / "up.sock", "mini", lambda: watch.changes.append(watch.host))
    watch.changes, watch.now = [], 1000.0
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": lambda: watch.now}))
    return watch


def told(watch, stage="serving", *, away="", **facts):
    facts = {"reason": TOLD.get(stage, ""), "restarts": 3, "deaths": 2, "memory": 7 * 2**30, **facts}
    watch._receive(HostStatus((ServerStatus("local", stage, **facts),), away=away))


def instance(status="unavailable", **facts):
    known = {"reason": "the MLX server does not accept connections", "pid": 7, **facts}
    return InstanceStatus(host="mini", name="local", node="local@mini", status=status, **known)


@pytest.mark.parametrize("stage", REASONS)
def test_an_instance_without_a_node_is_told_with_the_stage_of_its_server(watch, stage):
    told(watch, stage)
    watch.now += 40
    status, reason = watch.without_node("local")
    assert status == ("starting" if stage == "starting" else "unavailable")
    assert reason == REASONS[stage]


@pytest.mark.parametrize("stage", ["serving", "off", "of a newer version"])
def test_a_server_that_serves_is_no_reason(watch, stage):
    told(watch, stage)
    assert watch.without_node("local") is None
    assert watch.completed(instance()).reason == "the MLX server does not accept connections"


def test_an_instance_of_a_host_that_is_away_is_away(watch):
    told(watch, "off", away="a user is at it")
    assert watch.without_node("local") == ("away", "a user is at it")
    assert watch.without_node("not managed") == ("away", "a user is at it")


def test_without_an_up_nothing_is_known(watch):
    assert watch.without_node("local") is None
    assert watch.completed(instance()) == instance()
    told(watch, "quarantined", away="at night")
    watch._forget()
    assert watch.without_node("local") is None
    assert watch.completed(instance()).server_stage == ""


@pytest.mark.parametrize("status", ["unavailable", "starting", "degraded"])
def test_the_stage_of_its_server_says_more_than_what_its_node_sees(watch, status):
    told(watch, "quarantined")
    completed = watch.completed(instance(status))
    assert (completed.status, completed.reason) == (status, REASONS["quarantined"])


@pytest.mark.parametrize("status", ["available", "drained", "away"])
def test_but_not_more_than_an_order_or_a_server_that_works(watch, status):
    told(watch, "stopping")
    assert watch.completed(instance(status, reason="why")).reason == "why"


def test_routers_learn_of_it(watch):
    told(watch)
    completed = watch.completed(instance("available", reason=""))
    event = RegistryEvent.about(completed)
    seen = event.instance_status("mini", heard_at=0.0, expires_at=math.inf)
    for each in (completed, seen):
        assert (each.server_stage, each.server_deaths, each.server_memory) == ("serving", 2, 7 * 2**30)


def test_so_they_do_of_an_instance_without_a_node(watch):
    told(watch, "quarantined", memory=None)
    event = RegistryEvent.about(watch.completed(instance(pid=None)))
    seen = event.instance_status("mini", heard_at=0.0, expires_at=math.inf)
    assert (seen.server_stage, seen.server_deaths, seen.server_memory) == ("quarantined", 2, None)
    assert seen.reason == REASONS["quarantined"]


def test_an_event_of_a_server_that_is_not_managed_says_nothing_of_it():
    event = RegistryEvent.about(instance())
    assert not [key for key in {**event.runtime, **event.capacity} if key.startswith("server_")]


def test_a_stage_is_published_at_once_and_a_figure_is_not(watch):
    told(watch, "starting")
    told(watch, "serving")
    told(watch, "serving", memory=8 * 2**30, restarts=4)
    told(watch, "serving", away="a user is at it")
    assert [(host.servers[0].stage, host.away) for host in watch.changes] == [
        ("starting", ""),
        ("serving", ""),
        ("serving", "a user is at it"),
    ]
    watch._forget()
    assert watch.changes[-1] == HostStatus()


def test_the_time_of_a_start_is_counted_from_its_beginning(watch):
    told(watch, "starting")
    watch.now += 30
    told(watch, "starting", memory=1)
    watch.now += 10
    assert watch.without_node("local")[1] == "its MLX server has been starting for 40 s"
    told(watch, "waiting")
    told(watch, "starting", reason="it was told to restart")
    assert watch.without_node("local")[1] == "its MLX server has been starting for 0 s (it was told to restart)"


def test_each_stage_is_known():
    assert {*module._TROUBLES} == {*STAGES} - {"serving", "off"}
    assert replace(instance(), server_stage="x" * 255).server_stage
