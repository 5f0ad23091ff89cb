"""What a node tells the `fleet-worker up` of its host, and how it obeys: over a real socket."""

import socket
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fleet_worker.errors import InstanceUnavailable
from fleet_worker.host.up_socket import LineBuffer
from fleet_worker.node import host_link as module
from fleet_worker.node.host_link import HostLink
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.protocol.host_messages import TO_UP, Pause, Resume, to_line
from tests.mlx_clients import until

WITHIN = 5.0
LONG = 3600.0
"""A grace that no test waits for."""


class Node:
    """As far as a link sees one: its requests run until they are cancelled or ended."""

    name = "local@mini"

    def __init__(self):
        self.running = RunningAttempts()
        self.fault = ""
        self.shown = []
        self.work = {}

    def pause(self, status, reason):
        self.shown.append((status, reason))
        self.fault = ""

    def resume(self):
        self.shown.append(None)
        self.running.refusal = None

    def hand_over(self, reason, *, after_fault):
        self.running.refusal = lambda: InstanceUnavailable(reason, handed_over=True)
        self.running.stop(lambda: InstanceUnavailable(reason, handed_over=not after_fault))

    def wait_until_idle(self, timeout):
        ends = time.monotonic() + timeout
        while self.work and time.monotonic() < ends:
            time.sleep(0.002)
        return not self.work

    def begin(self, name):
        """Begin a request, and return when it has begun, or was refused."""
        begun = threading.Event()
        self.work[name] = ended = threading.Event()

        def run():
            try:
                with self.running.attempt(name, 1, "q") as token, token.on_cancel(ended.set):
                    begun.set()
                    ended.wait(WITHIN)
                    self.ended[name] = token.error
            except InstanceUnavailable as error:
                self.ended[name] = error
            del self.work[name]
            begun.set()

        threading.Thread(target=run).start()
        assert begun.wait(WITHIN)

    def end(self, name):
        self.work[name].set()
        until(lambda: name not in self.work)

    ended = property(lambda self: self.__dict__.setdefault("_ended", {}))


class Up:
    """The other end: one connection at a time."""

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(WITHIN)
        self.news = []
        self._order = 0
        self._connection = None

    def accept(self):
        """Take the connection of the node, in place of an earlier one."""
        if self._connection:
            self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
        self._connection, _ = self._listener.accept()
        threading.Thread(target=self._read, args=(self._connection,), daemon=True).start()

    def _read(self, connection):
        buffer = LineBuffer()
        with suppress(OSError):  # it was closed
            while data := connection.recv(65536):
                self.news += [TO_UP.validate_json(line) for line in buffer.feed(data)]

    def tell(self, make, *arguments):
        """Give the next order, and return when it was taken."""
        self._order += 1
        self._connection.sendall(to_line(make(*arguments, order=self._order)))
        until(lambda: self.last.order == self._order)

    def pause(self, *, status="away", reason="a user is at it", grace=LONG):
        self.tell(Pause, status, reason, grace)

    def resume(self):
        self.tell(Resume)

    @property
    def last(self):
        until(lambda: self.news)
        return self.news[-1]

    def close(self):
        self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._listener.close()


@pytest.fixture
def linked(monkeypatch):
    """A node, its link, and the `up` that it is connected to."""
    monkeypatch.setattr(module, "NEWS_APART", 0.01)
    with both() as pair:
        yield pair


@contextmanager
def both():
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        node, path = Node(), Path(folder, "up.sock")
        up, link = Up(path), HostLink(node, path)
        node.running.changed = link.changed
        link.start()
        up.accept()
        try:
            yield node, link, up
        finally:
            link.close()
            for ended in list(node.work.values()):
                ended.set()
            up.close()


def test_a_node_tells_when_it_begins_to_work_and_when_all_work_has_ended(linked):
    node, _, up = linked
    assert (up.last.node, up.last.running, up.last.idle, up.last.order) == ("local@mini", 0, False, 0)
    node.begin("a")
    until(lambda: up.last.running == 1)
    node.begin("b")
    node.end("a")
    node.end("b")
    until(lambda: up.last.running == 0)
    assert len(up.news) <= 4


def test_a_fault_is_told_until_an_order_was_taken(linked):
    node, link, up = linked
    node.fault = "no token"
    link.changed()
    until(lambda: up.last.fault == "no token")
    up.pause(status="restarting", reason="no token")
    assert up.last.fault == ""


@pytest.mark.rest
def test_however_often_something_changes_it_is_told_ten_times_a_second_at_most():
    with both() as (node, _, up):
        before = len(up.news)
        started = time.monotonic()
        for number in range(100):
            node.begin(number)
            node.end(number)
        spent = time.monotonic() - started
        assert len(up.news) - before <= spent / module.NEWS_APART + 2


# --- Pauses


def test_a_paused_node_lets_its_work_end_and_tells_then_that_it_is_idle(linked):
    node, _, up = linked
    node.begin("a")
    up.pause()
    assert node.shown == [("away", "a user is at it")]
    time.sleep(0.05)
    assert not up.last.idle
    node.end("a")
    until(lambda: up.last.idle)
    assert node.ended == {"a": None}


def test_a_restart_is_shown_as_a_start(linked):
    node, _, up = linked
    up.pause(status="restarting", reason="it has died")
    assert node.shown == [("starting", "it has died")]


def test_what_still_runs_after_the_grace_is_handed_over(linked):
    node, _, up = linked
    node.begin("a")
    up.pause(grace=0.05)
    until(lambda: up.last.idle)
    assert node.ended["a"].message == "the node takes no work: a user is at it"
    assert node.ended["a"].metadata == {"handed_over": True}


def test_work_of_a_server_with_a_fault_is_handed_over_at_once(linked):
    node, _, up = linked
    node.begin("a")
    node.fault = "no token"
    up.pause(status="restarting", reason="no token")
    until(lambda: up.last.idle)
    assert node.ended["a"].metadata == {"handed_over": False}
    node.begin("b")
    assert node.ended["b"].metadata == {"handed_over": True}


def test_what_begins_during_a_pause_runs_until_the_grace_is_over_and_is_handed_over_afterwards(linked):
    node, _, up = linked
    node.begin("a")
    up.pause()
    node.begin("b")
    assert len(node.running) == 2
    node.end("a")
    node.end("b")
    until(lambda: up.last.idle)
    node.begin("c")
    assert node.ended["c"].metadata == {"handed_over": True}
    up.resume()
    assert not up.last.idle
    node.begin("d")
    node.end("d")
    assert node.ended["d"] is None


def test_a_second_pause_shortens_the_grace_of_the_first_and_never_extends_it(linked):
    node, _, up = linked
    node.begin("a")
    up.pause(status="restarting", reason="an operator wishes it", grace=LONG)
    up.pause(grace=0.05)
    up.pause(grace=LONG)
    assert node.shown[1:] == [("away", "a user is at it")] * 2
    until(lambda: up.last.idle)
    assert node.ended["a"].metadata == {"handed_over": True}


def test_a_second_pause_leaves_an_idle_node_idle(linked):
    _, _, up = linked
    up.pause(status="restarting", reason="it has died")
    until(lambda: up.last.idle)
    up.pause()
    assert up.last.idle


def test_a_pause_that_ends_before_its_grace_hands_nothing_over(linked):
    node, _, up = linked
    node.begin("a")
    up.pause(grace=0.1)
    up.resume()
    assert node.shown[-1] is None
    time.sleep(0.15)
    assert "a" in node.work
    assert not up.last.idle
    node.begin("b")
    node.end("b")
    assert node.ended == {"b": None}


def test_the_idle_of_one_pause_is_not_that_of_the_next(linked):
    node, _, up = linked
    up.pause()
    until(lambda: up.last.idle)
    up.resume()
    node.begin("a")
    up.pause()
    assert not up.last.idle
    assert all(not news.idle for news in up.news if news.order != 1)


def test_the_same_order_again_changes_nothing(linked):
    """As after a lost connection."""
    node, _, up = linked
    up.pause()
    until(lambda: up.last.idle)
    up._order -= 1
    up.pause()
    assert up.last.idle
    up.resume()
    up._order -= 1
    up.resume()
    node.begin("a")
    node.end("a")
    assert node.ended == {"a": None}


def test_a_new_up_is_told_all_of_it(linked):
    node, _, up = linked
    up.pause()
    until(lambda: up.last.idle)
    del up.news[:]
    up.accept()
    assert up.last.idle
    assert up.last.order == 1
    assert node.shown == [("away", "a user is at it")]
