"""What `fleet-worker restart` does one after the other, prints, and its exit codes."""

import dataclasses
from types import SimpleNamespace

import pytest

from fleet_worker import Settings
from fleet_worker.errors import BrokerUnavailable
from fleet_worker.host.up_socket import NoUp
from fleet_worker.ops import restart as module
from fleet_worker.ops import restart_control
from fleet_worker.ops.restart_control import RestartControl, RestartReply
from fleet_worker.ops.rolling_restart import RollingRestart, is_back
from fleet_worker.protocol.host_messages import Done
from fleet_worker.protocol.status import InstanceStatus
from tests.clock import Clock

ONE, TWO, THREE = "one@mini", "two@mini", "three@other"


def status(node, status="available", process="old", server_restarts=0, reason=""):
    name, _, host = node.partition("@")
    facts = {"pid": process and 7, "process": process or "", "server_restarts": server_restarts, "reason": reason}
    return InstanceStatus(host=host, name=name, node=node, status=status, **facts)


class Fleet:
    """Nodes that come back so many seconds after they were told to, or never, or that refuse.

    It is the view and the control of a rolling restart at the same time.
    """

    def __init__(self, *nodes, server=False, takes=2.0, lost=(), refuse=(), silent=(), alone=()):
        self.clock = Clock()
        self.server = server
        self.silent = []
        self.told = []
        self._nodes = {each.node: each for each in nodes}
        self._takes, self._lost, self._alone = takes, lost, alone
        self._refuse = dict(refuse)
        self._is_silent = silent
        self._back_at = {}

    def restart(self, node):
        assert all(self.clock.now >= at for at in self._back_at.values()), "two at the same time"
        self.told.append((round(self.clock.now), node))
        if node in self._is_silent:
            self.silent.append(node)
            return None
        if error := self._refuse.pop(node, None):
            return RestartReply(node, **error)
        before = self._nodes[node]
        if node not in self._lost:
            self._back_at[node] = self.clock.now + self._takes
        self._nodes[node] = status(node, "starting", process=before.process, reason="it restarts")
        return RestartReply(node, process=before.process, server_restarts=before.server_restarts, grace=30.0)

    def status(self, node):
        if self.clock.now >= self._back_at.get(node, float("inf")):
            return status(node, process="old" if self.server else "new", server_restarts=int(self.server))
        return self._nodes.get(node)

    def served_alone(self, node):
        return ["qwen3"] if node in self._alone else []

    def refresh(self):
        pass

    def sleep(self, seconds):
        self.clock.now += seconds

    def run(self, capsys, *, only_available=False, within=60.0):
        rolling = RollingRestart(self, self, within, clock=self.clock, sleep=self.sleep)
        return rolling.run(list(self._nodes), only_available=only_available), *capsys.readouterr()


@pytest.mark.parametrize(("server", "what"), [(False, "was restarted"), (True, "has a restarted MLX server")])
def test_each_node_waits_until_the_one_before_it_is_available(capsys, server, what):
    fleet = Fleet(status(ONE), status(TWO), status(THREE), server=server)
    code, out, error = fleet.run(capsys)
    assert (code, error) == (0, "")
    assert out.splitlines() == [f"{node} {what}, available after 2.0 s" for node in (ONE, TWO, THREE)]
    assert fleet.told == [(0, ONE), (2, TWO), (4, THREE)]


def test_the_first_that_does_not_come_back_ends_it_and_the_rest_is_named(capsys):
    fleet = Fleet(status(ONE), status(TWO), status(THREE), lost=[TWO])
    code, out, _ = fleet.run(capsys)
    assert code == 1
    assert out.splitlines()[1:] == [
        f"{TWO} is not back after 90 s: starting (it restarts)",
        f"Not restarted: {THREE}",
    ]
    assert [node for _, node in fleet.told] == [ONE, TWO]


def test_a_server_that_goes_into_quarantine_again_is_not_waited_for(capsys):
    class Dying(Fleet):
        def status(self, node):
            stage = "starting" if self.told and 5 <= self.clock.now < 20 else "quarantined"
            return dataclasses.replace(status(node, "unavailable", reason="5 deaths"), server_stage=stage)

    code, out, _ = Dying(status(ONE, "unavailable"), server=True).run(capsys, within=900.0)
    assert (code, out) == (1, f"{ONE} is not back after 20 s: unavailable (5 deaths)\n")


@pytest.mark.parametrize(
    ("left_out", "code", "line"),
    [
        (status(ONE, "drained"), 0, f"{ONE} is left out: it is drained, and stays so"),
        (status(ONE, "away"), 0, f"{ONE} is left out: it is away, and stays so"),
        (
            status(ONE, "unavailable", reason="no"),
            1,
            f"{ONE} is left out: it is unavailable (no); name it to restart it",
        ),
    ],
)
def test_of_all_nodes_those_that_take_no_work_are_left_out(capsys, left_out, code, line):
    fleet = Fleet(left_out, status(TWO))
    assert fleet.run(capsys, only_available=True)[:2] == (code, f"{line}\n{TWO} was restarted, available after 2.0 s\n")
    assert [node for _, node in fleet.told] == [TWO]


def test_a_drained_node_that_is_named_is_restarted(capsys):
    assert Fleet(status(ONE, "drained")).run(capsys)[0] == 0


def test_who_refuses_or_does_not_answer_is_named_and_the_others_are_restarted(capsys):
    fleet = Fleet(status(ONE), status(TWO), status(THREE), refuse={ONE: {"error": "not managed"}}, silent=[TWO])
    code, out, error = fleet.run(capsys)
    assert code == 69
    assert out == f"{ONE} is not restarted: not managed\n{THREE} was restarted, available after 2.0 s\n"
    assert error.startswith(f"fleet-worker: {TWO} does not answer: ")
    assert Fleet(status(ONE), refuse={ONE: {"error": "not managed"}}).run(capsys)[0] == 1


def test_a_node_that_was_restarted_just_now_is_told_again_when_it_obeys(capsys):
    fleet = Fleet(status(ONE), refuse={ONE: {"error": "try again in 7 s", "again_in": 7.0}})
    assert fleet.run(capsys)[0] == 0
    assert fleet.told == [(0, ONE), (7, ONE)]


def test_it_says_whose_requests_wait(capsys):
    _, out, _ = Fleet(status(ONE), alone=[ONE]).run(capsys)
    assert out.splitlines()[0] == f"{ONE} alone serves qwen3: requests wait until it is back"
    _, out, _ = Fleet(status(ONE), alone=[ONE], refuse={ONE: {"error": "it is not managed"}}).run(capsys)
    assert out == f"{ONE} is not restarted: it is not managed\n"


def test_what_a_host_says_cannot_move_the_cursor(capsys):
    _, out, _ = Fleet(status(ONE), refuse={ONE: {"error": "\x1b[2Jgone"}}).run(capsys)
    assert out == f"{ONE} is not restarted: ?[2Jgone\n"


@pytest.mark.parametrize(
    ("seen", "server", "back"),
    [
        (None, False, False),
        (status(ONE), False, False),
        (status(ONE, process=None), False, False),
        (status(ONE, process="new"), False, True),
        (status(ONE, "starting", process="new"), False, False),
        (status(ONE, "unavailable", process="new"), False, False),
        (status(ONE, server_restarts=1), False, False),
        (status(ONE), True, False),
        (status(ONE, server_restarts=1), True, True),
        (status(ONE, "starting", server_restarts=1), True, False),
        (status(ONE, process="new"), True, True),
        (status(ONE, process="new", server_restarts=None), True, True),
    ],
)
def test_back_is_what_is_new_and_works(seen, server, back):
    assert is_back(seen, status(ONE), RestartReply(ONE, process="old", server_restarts=0), server=server) is back
    assert is_back(seen, status(ONE), RestartReply(ONE), server=server) is back  # `up` answered, which knows neither


@pytest.mark.parametrize("state", ["drained", "away"])
def test_a_node_that_took_no_work_before_is_back_when_it_takes_none_again(state):
    reply = RestartReply(ONE, process="old", server_restarts=0)
    assert is_back(status(ONE, state, process="new"), status(ONE, state), reply, server=False)
    assert not is_back(status(ONE, state, process="new"), status(ONE), reply, server=False)


# --- Who is told ---


@pytest.fixture
def settings():
    opted_in = {"fleet": {"enabled": True, "respond_to_requests": True}}
    return Settings(host="mini", instances={"one": opted_in, "two": opted_in, "mine": {}})


@pytest.fixture
def up(monkeypatch):
    """What the `up` of this host answers; None if there is none. It tells what it was asked."""
    up = SimpleNamespace(answer=Done(), asked=[])

    def ask(settings, message, within):
        if up.answer is None:
            raise NoUp("none")
        up.asked.append((message.instance, message.server))
        return up.answer

    monkeypatch.setattr(restart_control, "ask", ask)
    return up


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("one", [ONE]),
        ("mini", [ONE, TWO]),
        ("other", ["other"]),
        (THREE, [THREE]),
        (ONE, [ONE]),
    ],
)
def test_a_name_is_that_of_an_instance_here_of_a_host_or_of_a_node(settings, name, nodes):
    assert module._resolved(name, settings) == nodes


@pytest.mark.parametrize("reply", [None, [], {"error": "a node does not obey this"}, {"error": "", "process": "p"}])
def test_a_node_that_answers_is_asked_alone(settings, up, monkeypatch, reply):
    control = RestartControl(settings, server=True)
    monkeypatch.setattr(control, "tell", lambda command, nodes: {ONE: reply} if command == "restart_server" else {})
    answer = control.restart(ONE)
    if isinstance(reply, dict):
        assert (answer.error, answer.process, up.asked) == (reply["error"], reply.get("process", ""), [])
    else:
        assert (answer.error, up.asked) == ("", [("one", True)])


@pytest.mark.parametrize(("node", "answer"), [(ONE, None), (THREE, Done())])
def test_without_an_up_here_and_for_another_host_nobody_answers(settings, up, monkeypatch, node, answer):
    up.answer = answer
    control = RestartControl(settings, server=False)
    monkeypatch.setattr(control, "tell", lambda *_: {})
    assert control.restart(node) is None
    assert (control.silent, up.asked) == ([node], [])


def test_without_a_broker_the_up_of_this_host_is_asked(settings, up, capsys):
    control, away = RestartControl(settings, server=False), BrokerUnavailable("it is away")
    assert module._restart_here(control, [ONE, TWO], away) == 0
    assert up.asked == [("one", False), ("two", False)]
    up.answer = Done(error="no such instance")
    assert module._restart_here(control, [ONE], away) == 1
    assert "one@mini is not restarted: no such instance" in capsys.readouterr().out
    for names, answer in ([ONE, THREE], Done()), ([ONE], None):
        up.answer = answer
        with pytest.raises(BrokerUnavailable):
            module._restart_here(control, names, away)
