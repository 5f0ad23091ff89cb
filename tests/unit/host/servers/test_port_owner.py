import os
import socket
import subprocess
import sys
from contextlib import closing

import psutil
import pytest

from fleet_worker.host.child_process import free_port
from fleet_worker.host.servers import port_owner
from tests.mlx_clients import until


@pytest.mark.parametrize(
    ("listens", "asked"), [("127.0.0.1", "localhost"), ("127.0.0.1", "127.0.0.1"), ("", "127.0.0.1")]
)
def test_a_port_with_a_listener_is_taken_and_its_owner_is_found(listens, asked):
    with closing(socket.create_server((listens, 0))) as listener:
        port = listener.getsockname()[1]
        assert port_owner.is_taken(asked, port)
        assert port_owner.accepts(asked, port)
        assert port_owner.owner(port) == psutil.Process()


def shown_to_root_only(_kind):
    raise psutil.AccessDenied


@pytest.mark.parametrize("shows_all", [True, False], ids=["Linux", "macOS"])
def test_a_port_that_the_system_gave_to_a_connection_has_an_owner_too(monkeypatch, shows_all):
    if not shows_all:
        monkeypatch.setattr(psutil, "net_connections", shown_to_root_only)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        port = one.getsockname()[1]
        assert port_owner.is_taken("127.0.0.1", port)
        assert port_owner.owner(port) == psutil.Process()
        assert port_owner.owner(listener.getsockname()[1]) == psutil.Process()


def test_a_port_that_is_bound_is_taken_before_anybody_listens():
    """A server that loads its model before it listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        assert not port_owner.accepts("127.0.0.1", port)
        assert port_owner.is_taken("127.0.0.1", port)


def test_a_port_is_free_as_soon_as_its_server_has_ended_though_connections_linger():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = listener.accept()
            connection.close()  # the server's end waits in TIME_WAIT then
            client.recv(1)
    assert not port_owner.is_taken("127.0.0.1", port)
    assert not port_owner.is_taken("localhost", port)
    assert port_owner.owner(port) is None


def test_a_server_with_a_full_backlog_holds_its_port_and_nobody_waits_for_it():
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen(0)
        port = frozen.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert port_owner.is_taken("127.0.0.1", port)


def test_a_connection_to_itself_is_no_server(monkeypatch):
    """Where nobody listens, the system may choose the very port that is asked for our own end."""
    port = free_port()
    plain = socket.socket

    def bound(family=socket.AF_INET):
        found = plain(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", port))
        return found

    monkeypatch.setattr(port_owner.socket, "socket", bound)
    assert not port_owner.accepts("127.0.0.1", port)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-c", "secret = 'hush'; import time; time.sleep(60)"], ""),
        (["-S", "-m", "http.server", "0"], " http.server"),
    ],
)
def test_an_interpreter_is_described_by_what_it_runs_and_never_by_its_code(arguments, shown):
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = psutil.Process(process.pid)
        until(found.cmdline)  # it has none for a moment, on a busy machine
        assert port_owner.described(found) == f"{found.name()}{shown}, pid {process.pid}"
    finally:
        process.kill()
        process.wait()
    assert port_owner.described(found) == f"process {process.pid}"


def test_what_belongs_to_another_user_has_no_name():
    assert port_owner.described(None) == "a program of another user"
    assert port_owner.described(psutil.Process()).endswith(f"pid {os.getpid()}")
