"""What a node answers an operator who restarts it, or its server."""

import threading
from types import SimpleNamespace

import pytest

from fleet_worker.host.parent_pipe import PARENT_PIPE
from fleet_worker.node import restart_commands as module
from fleet_worker.node.restart_commands import NOBODY_STARTS_IT, RESTARTS_APART, restart_commands
from tests.clock import Clock


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(module, "ANSWERS_FIRST", 0.0)
    return clock


@pytest.fixture
def node():
    worker = SimpleNamespace(drain_grace=30.0)
    server = {"restart_server": lambda: node.answer, "server_restarts": 3}
    node = SimpleNamespace(name="one@test", process="p", settings=SimpleNamespace(worker=worker), answer="", **server)
    return node


@pytest.fixture
def ended():
    return threading.Event()


@pytest.fixture
def tell(clock, node, ended, monkeypatch):
    """Send a command to a node that `up` has started long ago."""
    monkeypatch.setenv(PARENT_PIPE, "7")
    commands = restart_commands(node, ended.set)
    clock.now += RESTARTS_APART
    return lambda command: commands[command](None)


def test_a_node_answers_and_ends(tell, ended):
    assert tell("restart") == {"error": "", "again_in": 0.0, "process": "p", "server_restarts": 3, "grace": 30.0}
    assert ended.wait(5)


def test_a_node_that_nobody_would_start_again_lives_on(tell, ended, monkeypatch):
    monkeypatch.delenv(PARENT_PIPE)
    assert tell("restart")["error"] == NOBODY_STARTS_IT
    assert not ended.wait(0.05)


def test_a_server_is_restarted_or_the_answer_says_why_not(tell, node):
    node.answer = "its server is not managed"
    assert tell("restart_server")["error"] == "its server is not managed"
    node.answer = ""
    assert tell("restart_server")["error"] == ""


def test_what_was_restarted_just_now_is_not_restarted_again(tell, clock):
    """Whoever reaches the broker can send this as often as he likes."""
    assert tell("restart_server")["error"] == ""
    clock.now += RESTARTS_APART - 1
    refused = tell("restart_server")
    assert (refused["error"], refused["again_in"]) == ("it was restarted just now: try again in 1 s", 1.0)
    clock.now += 1
    assert tell("restart_server")["error"] == ""


def test_a_process_that_has_just_begun_was_restarted_just_now(clock, node, monkeypatch):
    monkeypatch.setenv(PARENT_PIPE, "7")
    commands = restart_commands(node, lambda: pytest.fail("it ends"))
    assert "try again in 10 s" in commands["restart"](None)["error"]
    assert commands["restart_server"](None)["error"] == ""


def test_a_stranger_who_restarts_a_server_all_the_time_does_not_keep_it_down(tell, clock):
    times = []
    for _ in range(24 * 360):
        if not tell("restart_server")["error"]:
            times.append(clock.now)
        clock.now += 10
    assert len(times) < 35, "one an hour in the end"
    clock.now += 2 * module.LONGEST_APART
    assert tell("restart_server")["error"] == ""
    clock.now += RESTARTS_APART
    assert tell("restart_server")["error"] == "", "he has gone, and it is as it was"
