"""The reports of nodes to the registry node of their host, over a real socket."""

import os
import socket
import stat
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fleet_worker.errors import ConfigurationError
from fleet_worker.host import state_socket
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.protocol.cache_digest import CacheDigest
from fleet_worker.protocol.status import InstanceStatus, ModelStatus
from fleet_worker.registry import status_socket as module
from fleet_worker.registry.status_socket import (
    _JSON,
    NodeReport,
    StatusClient,
    StatusServer,
    model_status,
    socket_path,
)
from fleet_worker.settings import Instance
from tests.mlx_clients import took_less_than, until

WITHIN = 5.0
SECRET = "hunter2"
MODEL = ModelStatus(model="m", capabilities=("chat",), status="available")
FACTS = {"pid": 1, "version": "0.1.0", "server": "mlx_lm", "status": "available", "slots": 4, "lanes": ("a",)}


def report(instance="local", *, models=(MODEL,), reply_lag=0.0, counters=None, digest=None, **facts):
    status = InstanceStatus(host="mini", name=instance, node=f"{instance}@mini", **{**FACTS, **facts})
    return NodeReport(status, models, reply_lag, counters or {"tokens": 0}, digest)


def line(**facts):
    return _JSON.dump_json(report(**facts)) + b"\n"


@pytest.fixture
def path():
    """In a folder with a short name: a socket's path may be no longer than 104 bytes on macOS."""
    with tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp") as folder:
        yield socket_path(Path(folder, "state"), "mini")


class Heard(StatusServer):
    """The registry node's end, which counts how often something changed."""

    def __init__(self, path):
        self.changes = 0
        self.counting = threading.Condition()
        super().__init__(path, self._count)

    def _count(self):
        with self.counting:
            self.changes += 1
            self.counting.notify_all()

    def changed(self, times):
        with self.counting:
            assert self.counting.wait_for(lambda: self.changes >= times, WITHIN)
            assert self.changes == times
        return self.reports()


@pytest.fixture
def reports(path):
    reports = Heard(path)
    yield reports
    reports.close()


@contextmanager
def speaking(path):
    """A connection as a node has one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(WITHIN)
        connection.connect(str(path))
        yield connection


def is_hung_up(connection):
    return connection.recv(1) == b""


def listening(registry, path):
    """Listen with this socket, without ever answering; returns how to accept."""
    registry.bind(str(path))
    registry.listen()
    registry.settimeout(WITHIN)
    return lambda: registry.accept()[0]


@contextmanager
def reporting(path, make=report):
    reporter = StatusClient(path, make)
    reporter.start()
    try:
        yield reporter
    finally:
        reporter.close()
        reporter._thread.join(WITHIN)
        assert not reporter._thread.is_alive()


# --- What arrives


def test_a_report_arrives_as_it_was_made(path, reports):
    said = report(running=2, last_token_age=0.25, counters={"errors": {"timeout": 1}})
    with reporting(path, lambda: said):
        assert reports.changed(1) == {"local": said}


def test_each_node_of_the_host_is_known_by_its_instance(path, reports):
    with speaking(path) as one, speaking(path) as two:
        one.sendall(line(instance="one"))
        reports.changed(1)
        two.sendall(line(instance="two"))
        nodes = {name: each.instance.node for name, each in reports.changed(2).items()}
    assert nodes == {"one": "one@mini", "two": "two@mini"}


def test_what_a_newer_node_adds_is_ignored(path, reports):
    with speaking(path) as connection:
        connection.sendall(line().replace(b'{"', b'{"new": 1, "', 3))
        assert reports.changed(1) == {"local": report()}


@pytest.mark.parametrize(
    "news",
    [
        {"status": "degraded"},
        {"reason": "it answers late"},
        {"lanes": ()},
        {"models": ()},
        {"models": (replace(MODEL, status="unavailable"),)},
    ],
)
def test_only_changes_are_passed_on(path, reports, news):
    with speaking(path) as connection:
        connection.sendall(line())
        reports.changed(1)
        connection.sendall(line(running=3, tokens_per_second=30.0, reply_lag=0.1, counters={"tokens": 9}))
        until(lambda: reports.reports()["local"].instance.running == 3)
        connection.sendall(line(**news))
        assert reports.changed(2) == {"local": report(**news)}


def test_the_end_of_work_is_passed_on_if_nothing_else_follows_it(path, reports):
    with speaking(path) as connection:
        connection.sendall(line(status="unavailable", running=2))
        reports.changed(1)
        connection.sendall(line(status="unavailable", running=1))
        until(lambda: reports.reports()["local"].instance.running == 1)
        connection.sendall(line(status="unavailable", running=0))
        assert reports.changed(2)["local"].instance.running == 0


def test_a_node_is_gone_when_its_connection_ends(path, reports):
    with speaking(path) as other:
        other.sendall(line(instance="other"))
        reports.changed(1)
        with speaking(path) as connection:
            connection.sendall(line())
            reports.changed(2)
        assert list(reports.changed(3)) == ["other"]


def test_a_connection_without_a_report_changes_nothing(path, reports):
    with speaking(path):
        pass
    with speaking(path) as connection:
        connection.sendall(line())
        reports.changed(1)


def test_the_end_of_an_old_connection_does_not_hide_a_node_that_has_connected_again(path, reports):
    with speaking(path) as old:
        old.sendall(line(running=1))
        reports.changed(1)
        with speaking(path) as new:
            new.sendall(line(running=2))
            assert reports.changed(2)["local"].instance.running == 2
            old.sendall(line(running=3))
            old.shutdown(socket.SHUT_WR)
            assert reports.changed(3)["local"].instance.running == 2


def test_a_node_that_falls_silent_is_gone(path, reports, monkeypatch, caplog):
    monkeypatch.setattr(module, "SILENT_AFTER", 0.3)
    with speaking(path) as connection:
        for _ in range(20):
            connection.sendall(line())
            time.sleep(0.02)
        assert reports.changed(1) == {"local": report()}
        assert reports.changed(2) == {}
        assert is_hung_up(connection)
    assert "local@mini: its status is not received any more (TimeoutError)" in caplog.text


@pytest.mark.parametrize(
    "nonsense",
    [
        b"hunter2\n",
        b'{"node": "hunter2"}\n',
        line()[:-20] + b"\n",
        line(status="available").replace(b'"slots":4', b'"slots":"hunter2"'),
        b"\xff\xfe\n",
        b"x" * 3000,
    ],
)
def test_an_invalid_report_ends_the_connection_and_nothing_else(path, reports, nonsense, monkeypatch, caplog):
    monkeypatch.setattr(module, "LONGEST_LINE", 2000)
    with speaking(path) as other:
        other.sendall(line(instance="other"))
        reports.changed(1)
        with speaking(path) as connection:
            connection.sendall(line())
            reports.changed(2)
            connection.sendall(nonsense)
            assert list(reports.changed(3)) == ["other"]
            assert is_hung_up(connection)
        other.sendall(line(instance="other", status="degraded"))
        assert reports.changed(4)["other"].instance.status == "degraded"
    assert "local@mini: its status is not received any more (ValidationError)" in caplog.text
    assert SECRET not in caplog.text


# --- Digests of prompt caches

DIGEST = CacheDigest(node="local@mini", slots=4, running=0, held=["iB4CYvjf5XQ"])


def test_another_digest_is_passed_on_by_itself(path):
    """Also the first, and that there is none any more: registry events have nothing to do with it."""
    changed, told = [], []
    with closing(StatusServer(path, lambda: changed.append(1), lambda: told.append(1))) as reports:
        with speaking(path) as connection:
            for running, times in [(0, 1), (0, 1), (1, 2)]:
                connection.sendall(line(running=running, digest=DIGEST.model_copy(update={"running": running})))
                until(lambda: len(told) == times, WITHIN)  # noqa: B023
            assert reports.reports()["local"].prompt_cache.running == 1
            assert len(changed) == 1
        until(lambda: len(told) == 3, WITHIN)
        assert len(changed) == 2


def test_a_node_whose_digest_cannot_be_used_is_as_ready_as_before(path, reports):
    """Another version may tell more of its cache than this one lets in."""
    with speaking(path) as connection:
        connection.sendall(line(digest=DIGEST).replace(b"iB4CYvjf5XQ", b"an id of a newer version"))
        assert reports.changed(1) == {"local": report()}


# --- The socket


def test_a_second_registry_node_of_a_host_is_refused_and_the_first_goes_on(path, reports):
    with pytest.raises(ConfigurationError, match="runs already"):
        StatusServer(path, lambda: None)
    with reporting(path):
        assert list(reports.changed(1)) == ["local"]


def test_the_socket_of_a_killed_registry_node_is_replaced(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    reports = Heard(path)
    with reporting(path):
        assert list(reports.changed(1)) == ["local"]
    reports.close()


def test_only_this_user_may_connect(path, reports):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


class Aborting:
    """The listening socket of a Mac: a node disconnects before it is accepted."""

    def __init__(self, listening):
        self._listening = listening
        self._aborts = 1

    def accept(self):
        if self._aborts:
            self._aborts = 0
            raise ConnectionAbortedError
        return self._listening.accept()

    def __getattr__(self, name):
        return getattr(self._listening, name)


def test_a_node_that_disconnects_too_early_does_not_keep_the_others_out(path, monkeypatch):
    listen = state_socket.listen
    monkeypatch.setattr(state_socket, "listen", lambda *given, **options: Aborting(listen(*given, **options)))
    reports = Heard(path)
    with reporting(path):
        assert list(reports.changed(1)) == ["local"]
    reports.close()


def test_it_leaves_no_socket_behind(path):
    reports = Heard(path)
    reports.close()
    assert not path.exists()
    reports._thread.join(WITHIN)
    assert not reports._thread.is_alive()


@pytest.mark.parametrize(("host", "fits"), [("h" * 80, True), ("h" * 81, False), ("é" * 40, True), ("é" * 41, False)])
def test_a_path_that_is_too_long_is_refused_by_the_name_of_its_setting(host, fits):
    folder = Path("/" + "f" * 13)  # with "/" and ".sock" 20 bytes
    if fits:
        assert socket_path(folder, host) == folder / f"{host}.sock"
    else:
        with pytest.raises(ConfigurationError, match="state_dir"):
            socket_path(folder, host)


def test_a_folder_that_cannot_be_created_is_refused_by_the_name_of_its_setting():
    with pytest.raises(ConfigurationError, match="state_dir"):
        StatusServer(Path("/dev/null/state/test.sock"), lambda: None)


def test_a_socket_that_cannot_be_created_is_refused_by_the_name_of_its_setting(path):
    path.parent.mkdir()
    path.mkdir()
    with pytest.raises(ConfigurationError, match="state_dir"):
        StatusServer(path, lambda: None)


# --- The node's end


def test_a_node_reports_regularly_and_at_once_when_its_status_changes(path, reports, monkeypatch):
    made = []

    def make():
        made.append(report(running=len(made)))
        return made[-1]

    with reporting(path, make) as reporter:
        reports.changed(1)
        with took_less_than(0.9):
            reporter.send_now()
            until(lambda: reports.reports()["local"].instance.running == 1)
        monkeypatch.setattr(module, "REPORT_EVERY", 0.01)
        reporter.send_now()
        until(lambda: reports.reports()["local"].instance.running > 5)


def test_a_node_that_ends_disconnects(path, reports):
    with reporting(path):
        reports.changed(1)
    assert reports.changed(2) == {}


def test_a_node_connects_again_when_another_registry_node_takes_over(path, monkeypatch):
    monkeypatch.setattr(module, "REPORT_EVERY", 0.01)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as first:
        accept = listening(first, path)
        with reporting(path):
            with accept() as connection:
                assert connection.recv(1)
            first.close()  # it was killed
            reports = Heard(path)
            assert list(reports.changed(1)) == ["local"]
        reports.close()


def test_a_node_does_not_wait_for_a_registry_node_that_does_not_read(path, monkeypatch):
    monkeypatch.setattr(module, "REPORT_EVERY", 0.02)
    large = report(reason="x" * 1_000_000)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as frozen:
        accept = listening(frozen, path)
        with reporting(path, lambda: large), accept(), accept():
            pass


def test_a_node_that_counted_as_gone_is_known_again_with_its_next_report(path, reports, monkeypatch):
    monkeypatch.setattr(module, "SILENT_AFTER", 0.05)
    with reporting(path) as reporter:
        assert reports.changed(2) == {}
        monkeypatch.setattr(module, "SILENT_AFTER", WITHIN)
        monkeypatch.setattr(module, "REPORT_EVERY", 0.01)
        reporter.send_now()
        assert list(reports.changed(3)) == ["local"]


def test_without_a_registry_node_nothing_grows(path, monkeypatch):
    tries = []
    monkeypatch.setattr(module, "REPORT_EVERY", 0.0005)
    monkeypatch.setattr(
        StatusClient, "_disconnect", lambda self, hang_up=StatusClient._disconnect: (tries.append(1), hang_up(self))
    )
    open_files = len(os.listdir("/dev/fd"))
    with reporting(path):
        until(lambda: len(tries) > 50)
        assert len(os.listdir("/dev/fd")) <= open_files + 1


# --- The status of a model


def test_a_model_is_reported_with_what_it_can_do():
    instance = Instance(
        base_url="http://127.0.0.1:1",
        models={
            "talker": {"context_window": 4096, "max_output_tokens": 100, "features": {"tools": True, "vision": False}},
            "embedder": {"features": {"embedding": True, "completion": False, "streaming": False}, "dimensions": 384},
        },
    )
    offerings = offerings_of(instance, {}, ())
    talker = model_status(offerings["talker"], "available")
    assert talker.limits == {"context_window": 4096, "max_output_tokens": 100}
    assert "tools" in talker.features
    assert "vision" not in talker.features
    assert (talker.capabilities, talker.status) == (("chat", "stream_chat"), "available")
    embedder = model_status(offerings["embedder"], "unavailable")
    assert embedder == ModelStatus(
        model="embedder",
        capabilities=("embed",),
        features=("embedding",),
        limits={"dimensions": 384},
        status="unavailable",
    )
