"""What nodes, watchers and commands say to `fleet-worker up`, and it to them, over a real socket."""

import contextlib
import os
import selectors
import socket
import stat
import tempfile
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host.file_lock import hold
from fleet_worker.host.up import up_server as module
from fleet_worker.host.up.up_server import UpServer
from fleet_worker.host.up_socket import NoUp, UpLink, ask, lock_path, socket_path
from fleet_worker.protocol.host_messages import (
    Done,
    HostStatus,
    NodeNews,
    Pause,
    Reload,
    Restart,
    Resume,
    ServerStatus,
    Watch,
    to_line,
)
from fleet_worker.settings import Settings
from tests.mlx_clients import took_less_than, until

WITHIN = 5.0
NEWS = NodeNews("local@mini", running=2)
PAUSE = Pause("away", "user", 5.0, order=3)
STATUS = HostStatus((ServerStatus("local", "serving", pid=7, memory=2**34),), away="user")


@pytest.fixture
def folder():
    """With a short name: a socket's path may be no longer than 104 bytes on macOS."""
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as name:
        yield Path(name, "state")


@pytest.fixture
def path(folder):
    return socket_path(folder, "mini")


class FakeUp:
    """A server in a loop of its own: it keeps what it receives, and answers with what it is told."""

    def __init__(self, path, *answers):
        self.answers, self.heard, self.clients, self.gone = answers, [], [], 0
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wake = socket.socketpair()
        self._selector.register(self._wakeup, selectors.EVENT_READ, lambda _: None)
        self.server = UpServer(self._selector, self._receive, self._forget)
        self.server.listen(path)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _receive(self, client, message):
        self.heard.append(message)
        self.clients.append(client)
        for answer in self.answers:
            client.send(answer)

    def _forget(self, client):
        self.gone += 1

    def _run(self):
        while self._wakeup.getblocking() is not False:
            for key, events in self._selector.select(WITHIN):
                if key.fileobj is self._wakeup:
                    return
                key.data(events)

    def close(self):
        self._wake.send(b"x")
        self._thread.join(WITHIN)
        self.server.close()
        self._selector.close()
        self._wakeup.close()
        self._wake.close()


@contextmanager
def link(path, **arguments):
    heard = []
    link = UpLink(path, heard.append, **arguments)
    link.start()
    try:
        yield link, heard
    finally:
        link.close()
        link._thread.join(WITHIN)
        assert not link._thread.is_alive()


@contextmanager
def connected(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(WITHIN)
        connection.connect(str(path))
        yield connection


def test_news_and_orders_cross(path):
    """A node tells its news; the orders of up reach it in their order."""
    with closing(FakeUp(path, PAUSE, Resume(4))) as up, link(path) as (node, orders):
        node.send(NEWS)
        until(lambda: orders == [PAUSE, Resume(4)])
        assert up.heard == [NEWS]


def test_only_the_owner_can_connect(path):
    """The socket is the user's own."""
    with closing(FakeUp(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


def test_a_new_up_hears_the_last_news_again(path):
    """A link outlives up: it tells what counts now to each one that comes, and knows when there is none."""
    lost = threading.Event()
    with link(path, lost=lost.set) as (node, orders):
        node.send(NodeNews("local@mini"))
        node.send(NEWS)
        with closing(FakeUp(path, PAUSE)) as up:
            until(lambda: up.heard == [NEWS] and orders == [PAUSE])
            assert not lost.is_set()
        assert lost.wait(WITHIN)
        with closing(FakeUp(path)) as up:
            until(lambda: up.heard == [NEWS])


def test_a_socket_that_was_left_behind_is_replaced(path):
    """As by an up that was killed."""
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    with closing(FakeUp(path, Resume(1))), link(path) as (node, orders):
        node.send(NEWS)
        until(lambda: orders == [Resume(1)])


def test_an_up_that_moves_keeps_its_clients(path):
    """As after `host` was changed: who asked for that gets his answer."""
    with closing(FakeUp(path, Resume(1))) as up, link(path) as (node, orders):
        node.send(NEWS)
        until(lambda: orders == [Resume(1)])
        up.server.listen(path.with_name("up-other.sock"))
        assert not path.exists()
        node.send(NodeNews("local@mini"))
        until(lambda: orders == [Resume(1), Resume(1)])
        with link(path.with_name("up-other.sock")) as (other, its_orders):
            other.send(NEWS)
            until(lambda: its_orders == [Resume(1)])


def test_a_watcher_gets_every_status(path):
    """It asks once, for as long as it is connected."""
    with closing(FakeUp(path, STATUS)) as up, link(path) as (watcher, heard):
        watcher.send(Watch())
        until(lambda: heard == [STATUS])
        up.clients[0].send(HostStatus())
        until(lambda: heard == [STATUS, HostStatus()])


@pytest.mark.parametrize(
    "sent", [b"not JSON\n", b'{"kind": "pause"}\n', b"[" * (module.LONGEST_LINE + 9)], ids=["text", "order", "long"]
)
def test_a_client_that_sends_no_message_is_disconnected(path, sent):
    """And nobody else is."""
    with closing(FakeUp(path, Resume(1))) as up, link(path) as (node, orders), connected(path) as stranger:
        with contextlib.suppress(ConnectionError):  # it may be disconnected before it has sent all
            stranger.sendall(sent)
            assert stranger.recv(1) == b""
        node.send(NEWS)
        until(lambda: orders == [Resume(1)])
        assert up.gone == 1


def test_a_message_of_a_newer_version_is_answered_and_ends_no_connection(path):
    """The node of a newer fleet-worker, whose `up` has not been restarted yet."""
    with closing(FakeUp(path, Resume(1))) as up, connected(path) as newer:
        newer.sendall(b'{"kind": "mood", "mood": "blue"}\n{"kind": "news", "node": "local@mini", "mood": "blue"}\n')
        received = b""
        while received.count(b"\n") < 2:
            received += newer.recv(4096) or pytest.fail("it was disconnected")
        assert b"of another version" in received
        assert up.heard == [NodeNews("local@mini")]


@pytest.mark.parametrize("count", [1, 64, 100])
def test_long_reasons_of_many_servers_fit_into_a_line(path, count):
    """As that of a program that is not in a long PATH."""
    servers = tuple(ServerStatus(f"local{number}", "waiting", "\U0001f600" * 100_000) for number in range(count))
    with closing(FakeUp(path, HostStatus(servers))), link(path) as (watcher, heard):
        watcher.send(Watch())
        until(lambda: heard)
        assert len(heard[0].servers) == min(count, 64)


def test_an_answer_with_a_thousand_faults_arrives(folder, path):
    settings = Settings(state_dir=folder, host="mini")
    with closing(FakeUp(path, Done("no such thing; " * 10_000))):
        assert ask(settings, Reload(), WITHIN).error.startswith("no such thing; ")


def test_the_same_message_again_and_again_counts_once(path):
    with closing(FakeUp(path, Done())) as up, connected(path) as eager:
        eager.sendall(to_line(Reload()) * 3000)
        eager.sendall(to_line(NEWS))
        until(lambda: up.heard and up.heard[-1] == NEWS)
        assert len(up.heard) < 30


def test_silent_clients_keep_nobody_away(path, monkeypatch):
    monkeypatch.setattr(module, "MOST_CLIENTS", 2)
    with closing(FakeUp(path, Resume(1))) as up, connected(path) as talks, connected(path) as silent:
        talks.sendall(to_line(NEWS))
        assert talks.recv(9)
        with connected(path) as third:
            third.sendall(to_line(NEWS))
            assert third.recv(9)
        assert silent.recv(1) == b""
        talks.sendall(to_line(NEWS))
        until(lambda: len(up.heard) == 3)


def test_a_client_that_reads_nothing_is_disconnected(path):
    """What waits for it is bounded, and up waits for nobody."""
    with closing(FakeUp(path)) as up, connected(path) as stuck:
        stuck.sendall(to_line(Watch()))
        until(lambda: up.clients)
        large = HostStatus(tuple(ServerStatus("local", "blocked", "x" * 1000) for _ in range(50)))
        with took_less_than(2.0):
            for _ in range(100):
                up.clients[0].send(large)
        assert not up.clients[0].connected


def test_a_slow_client_gets_all_of_it(path):
    """What does not fit into the socket at once is sent when it reads."""
    large = HostStatus(tuple(ServerStatus("local", "blocked", "x" * 1000) for _ in range(50)))
    count = 6
    with closing(FakeUp(path, *[large] * count)), connected(path) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(to_line(Watch()))
        received = b""
        while received.count(b"\n") < count:
            received += slow.recv(4096)
        assert received == to_line(large) * count


def test_the_number_of_clients_is_bounded(path, monkeypatch):
    """One more is refused, and gets in when another has left."""
    monkeypatch.setattr(module, "MOST_CLIENTS", 2)
    with closing(FakeUp(path, Resume(1))) as up:
        with connected(path) as one, connected(path) as two:
            for each in (one, two):
                each.sendall(to_line(NEWS))
                assert each.recv(9)
            with connected(path) as third:
                assert third.recv(1) == b""
        until(lambda: up.gone == 2)
        with connected(path) as third:
            third.sendall(to_line(NEWS))
            assert third.recv(9)


def test_an_order_that_fails_breaks_no_link(path, caplog):
    """The next one is obeyed."""
    obeyed = []

    def obey(order):
        if order == PAUSE:
            raise ZeroDivisionError
        obeyed.append(order)

    with closing(FakeUp(path, PAUSE, Resume(4))), closing(UpLink(path, obey)) as node:
        node.start()
        node.send(NEWS)
        until(lambda: obeyed == [Resume(4)])
    assert "could not be obeyed (ZeroDivisionError)" in caplog.text
    node._thread.join(WITHIN)


def test_a_path_that_is_too_long_is_refused():
    """By a text that names the setting."""
    with pytest.raises(ConfigurationError, match="state_dir: the path is too long"):
        socket_path(Path("/" + "x" * 100), "mini")


def test_a_link_that_never_started_leaves_nothing_open(path):
    """As that of a node that fails at its start."""
    before = len(os.listdir("/dev/fd"))
    UpLink(path, print).close()
    assert len(os.listdir("/dev/fd")) == before


def test_a_command_gets_its_answer(folder, path):
    """What comes before it, as a status, is not the answer."""
    settings = Settings(state_dir=folder, host="mini")
    with closing(FakeUp(path, STATUS, Done("no such instance"))) as up:
        assert ask(settings, Restart("local", server=True), WITHIN) == Done("no such instance")
        assert up.heard == [Restart("local", server=True)]


def test_a_command_finds_an_up_of_another_name(folder):
    """As after `host` was changed in the configuration."""
    with hold(lock_path(folder, "old")), closing(FakeUp(socket_path(folder, "old"), Done(text="read"))):
        assert ask(Settings(state_dir=folder, host="new"), Reload(), WITHIN) == Done(text="read")


def test_a_command_without_up_is_told_so(folder, path):
    """Whether none runs, or one does not answer."""
    settings = Settings(state_dir=folder, host="mini")
    with pytest.raises(NoUp, match="no fleet-worker up runs"):
        ask(settings, Reload(), WITHIN)
    with closing(FakeUp(path)), pytest.raises(NoUp, match=r"did not answer within 0\.2 s"):
        ask(settings, Reload(), 0.2)
