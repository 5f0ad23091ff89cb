import socket
import sys
from contextlib import closing

import psutil
import pytest

from fleet_worker import Settings
from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.host.file_lock import hold
from fleet_worker.host.up_socket import lock_path
from fleet_worker.ops.server_checks import instances


@pytest.fixture
def listener():
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        yield found


def findings(tmp_path, port, serve):
    fleet = {"enabled": True, "respond_to_requests": True}
    local = {"base_url": f"http://127.0.0.1:{port}", "serve": serve, "fleet": fleet, "clocks": {"connect": 0.2}}
    settings = Settings(state_dir=tmp_path, host="mini", instances={"local": local})
    return settings, lambda: [(each.severity, each.found) for each in instances(settings)]


def test_a_server_that_up_will_start_is_no_problem_but_one_that_it_runs_in_silence_is(tmp_path, listener):
    port = listener.getsockname()[1]
    listener.close()
    settings, found = findings(tmp_path, port, f"{sys.executable} {{port}}")
    assert found() == [("ok", f"fleet-worker up will start {sys.executable} on port {port}")]
    with hold(lock_path(settings.state_dir, settings.host)):
        ((severity, text),) = found()
        assert severity == "error"
        assert "fleet-worker up will start" not in text


def test_one_that_is_stopped_while_the_host_is_away_is_no_error(tmp_path, listener):
    port = listener.getsockname()[1]
    listener.close()
    settings, _ = findings(tmp_path, port, f"{sys.executable} {{port}}")
    away = settings.model_copy(update={"availability": AvailabilitySettings(hours="mon 3:00-4:00")})
    with hold(lock_path(settings.state_dir, settings.host)):
        ((severity, text),) = [(each.severity, each.found) for each in instances(away)]
    assert severity == "warning"
    assert text.endswith("it is stopped while this host is away")


def test_a_program_that_is_missing_is_said(tmp_path, listener):
    port = listener.getsockname()[1]
    listener.close()
    _, found = findings(tmp_path, port, "no-such-server {port}")
    ((severity, text),) = found()
    assert severity == "error"
    assert text.startswith("there is no program no-such-server, which serve names: install it")


def test_a_stranger_on_its_port_is_said(tmp_path, listener):
    port = listener.getsockname()[1]
    _, found = findings(tmp_path, port, f"{sys.executable} {{port}}")
    ((severity, text),) = found()
    assert severity == "error"
    assert text.startswith(f"port {port} is in use by {psutil.Process().name()}")
