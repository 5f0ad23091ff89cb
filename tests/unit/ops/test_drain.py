"""What drain and undrain print about the answers of nodes, and their exit codes."""

import math
from types import SimpleNamespace

import pytest

from fleet_worker import Settings
from fleet_worker.ops import drain as module
from fleet_worker.ops.drain import ASK_EVERY, RELEASE_WITHIN, DrainControl, DrainState, drain, undrain


def said(drained=True, running=0, handed_over=0):
    return DrainState("one@mini", drained, running, handed_over, grace=30.0)


class Fleet:
    """One node that answers at once, and after the wait; and others that do not answer."""

    def __init__(self, at_once, later=None, silent=()):
        self.at_once, self.later, self.silent = at_once, later, silent

    def __call__(self, settings):
        return self

    def find(self, names):
        return names

    def ask(self, command, nodes):
        self.command = command
        return [self.at_once]

    def wait(self, said, seconds):
        self.seconds = seconds
        yield self.later


@pytest.fixture
def asked(monkeypatch, capsys):
    """The exit code and the lines of a command in such a fleet."""

    def asked(command, fleet, **options):
        monkeypatch.setattr(module, "DrainControl", fleet)
        code = command(Settings(), ["one@mini"], **options)
        return code, *capsys.readouterr()

    return asked


GONE_ON = "one@mini is drained: it takes no more work, 2 requests not finished yet\n"
IDLE = "one@mini is drained: nothing runs there any more\n"
TAKES = "one@mini is not drained: it takes work as soon as its MLX server has proved that it works\n"


@pytest.mark.parametrize(
    ("node", "code", "line", "code_of_undrain"),
    [(said(), 0, IDLE, 1), (said(running=2), 0, GONE_ON, 1), (said(drained=False), 1, TAKES, 0)],
)
def test_without_wait_the_answer_decides_the_exit_code(asked, node, code, line, code_of_undrain):
    assert asked(drain, Fleet(node)) == (code, line, "")
    assert asked(undrain, Fleet(node)) == (code_of_undrain, line, "")


@pytest.mark.parametrize(
    ("node", "code", "line"),
    [
        (said(handed_over=1), 0, IDLE.replace("more", "more, 1 request handed over to other nodes")),
        (said(running=2), 1, GONE_ON),
        (said(drained=False), 1, TAKES),
    ],
)
def test_with_wait_the_end_of_the_work_decides_the_exit_code(asked, node, code, line):
    assert asked(drain, Fleet(said(running=3), later=node), wait=5.0) == (code, line, "")


@pytest.mark.parametrize(("wait", "seconds"), [(0.0, 0.0), (5.0, 5.0), (math.inf, None)])
def test_the_wait_is_as_long_as_given_or_the_grace_of_the_node(asked, wait, seconds):
    asked(drain, fleet := Fleet(said(), later=said()), wait=wait)
    assert fleet.seconds == seconds


@pytest.mark.parametrize("command", [drain, undrain])
def test_nodes_that_do_not_answer_are_named_whatever_the_others_answer(asked, command):
    code, out, error = asked(command, Fleet(said(), silent=["two@mini", "attic"]))
    assert (code, out) == (69, IDLE)
    assert [line.partition(":")[2].split()[0] for line in error.splitlines()] == ["two@mini", "attic"]
    assert error.count("check its name") == 1  # a host has another advice
    assert "A node is named attic@HOST." in error


@pytest.fixture
def control(monkeypatch):
    """One that asks a node whose work never ends, by a clock that only moves while it sleeps."""
    now, asked = [0.0], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(module, "time", clock)
    control = DrainControl(Settings())

    def ask(command, nodes):
        asked.append((now[0], command, tuple(nodes)))
        return [said(running=1) for _ in nodes]

    monkeypatch.setattr(control, "ask", ask)
    control.now, control.asked = clock.monotonic, asked
    return control


@pytest.mark.parametrize(("seconds", "grace"), [(5.0, 5.0), (None, 30.0)])
def test_work_is_handed_over_after_its_grace_and_waited_for_a_little_longer(control, seconds, grace):
    (state,) = control.wait([said(running=1)], seconds)
    assert state.running == 1
    assert control.now() == pytest.approx(grace + RELEASE_WITHIN, abs=2 * ASK_EVERY)
    first = next(when for when, command, nodes in control.asked if command == "hand_over" and nodes)
    assert first == pytest.approx(grace, abs=ASK_EVERY)


def test_a_node_without_work_is_not_waited_for(control):
    assert list(control.wait([said(), said(drained=False, running=3)], 5.0)) == [said(), said(drained=False, running=3)]
    assert control.now() == 0.0


STATE = {"drained": True, "running": 2, "handed_over": 0, "grace": 30.0}


@pytest.mark.parametrize(
    "reply", [None, [], "secret", {}, {"error": "no"}, {**STATE, "running": []}, {**STATE, "grace": "x"}, {1: 2}]
)
def test_a_node_that_replies_something_else_does_not_answer(monkeypatch, reply):
    control = DrainControl(Settings())
    monkeypatch.setattr(control, "_broadcast", lambda *_, **__: {"one@mini": reply, "two@mini": {**STATE, "new": 1}})
    assert control.ask("drain", ["one@mini", "two@mini"]) == [DrainState("two@mini", **STATE)]
    assert control.silent == ["one@mini"]
