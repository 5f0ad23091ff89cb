"""Metrics are there when they are needed most: with a broker that is frozen or away, and with a node that is killed."""

import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from fleet_worker.host.child_process import child, python
from fleet_worker.testing import SimulatedMLX, running_host, worker_toml
from tests.brokers import Valkey, free_port
from tests.mlx_clients import took_less_than
from tests.scrapes import ON, metrics_url, samples, until

CHAT = "sim-chat"
NODE, LANE = ("node", "sim@test"), ("lane", f"llm.fleet.chat.{CHAT}")
REGISTRY = python("-m", "celery", "-A", "fleet_worker", "worker", "-n", "registry@test")

OFF = """
import socket, sys
bound = []
sys.addaudithook(lambda event, args: event == "socket.bind" and bound.append(args[0].family))
from fleet_worker import Settings
from fleet_worker.broker.app import create_app
from fleet_worker.registry.node import RegistryNode
settings = Settings()
node = RegistryNode(create_app(settings), settings, "test")
assert bound == [socket.AF_UNIX], bound
assert "prometheus_client" not in sys.modules
node.status_server.close()
"""


@pytest.fixture
def configured():
    """The environment of a host with one instance, whose broker is away."""
    with tempfile.TemporaryDirectory(prefix="fleet-host-") as folder:  # short enough for a socket, on macOS too
        config = Path(folder, "worker.toml")
        config.write_text(worker_toml("sim", {"base_url": "http://127.0.0.1:9", "models": {CHAT: {}}}))
        broker = {"FLEET_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0"}
        yield {"FLEET_CONFIG": str(config), "FLEET_STATE_DIR": folder, **broker}


@pytest.mark.rest
def test_a_scrape_does_not_wait_for_a_frozen_broker_and_a_killed_node_is_gone():
    with SimulatedMLX(models=[CHAT]) as mlx, Valkey() as broker:
        instances = {"sim": {"base_url": mlx.base_url, "models": {CHAT: {}}}}
        with running_host(broker.url, instances, env=ON) as processes:
            url = metrics_url(processes)
            broker.signal(signal.SIGSTOP)
            with took_less_than(2.0):
                assert samples(url)[("fleet_broker_up",)] == 0
            frozen = until(url, lambda seen: ("fleet_slots", NODE) in seen)
            assert frozen.keys().isdisjoint({("fleet_lane_depth", LANE), ("fleet_lane_oldest_age_seconds", LANE)})
            broker.signal(signal.SIGCONT)
            until(url, lambda seen: seen[("fleet_broker_up",)] and ("fleet_lane_depth", LANE) in seen)
            processes["sim"].signal(signal.SIGKILL)
            until(url, lambda seen: not seen[("fleet_instance_ready", NODE)] and ("fleet_slots", NODE) not in seen)


@pytest.mark.rest
def test_metrics_do_not_wait_for_a_broker_that_is_away(configured):
    port = free_port()
    with child("registry", REGISTRY, {**configured, "FLEET_REGISTRY__METRICS_PORT": str(port)}) as process:
        process.wait_for("is away", 20)
        seen = samples(f"http://127.0.0.1:{port}/metrics")
        process.signal(signal.SIGKILL)
    assert (seen[("fleet_broker_up",)], seen[("fleet_instance_ready", NODE)]) == (0, 0)


@pytest.mark.rest
def test_a_port_that_is_taken_and_a_missing_package_are_told_in_one_line(configured, tmp_path):
    package = tmp_path / "missing" / "prometheus_client"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ModuleNotFoundError(name='prometheus_client')")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        path = f"{package.parent}:{os.environ.get('PYTHONPATH', '')}"
        wrong = {
            f"registry.metrics_port: {port} ": {"FLEET_REGISTRY__METRICS_PORT": port},
            "pip install '.[metrics]'": {"FLEET_REGISTRY__METRICS_PORT": "0", "PYTHONPATH": path},
        }
        for words, env in wrong.items():
            with child("registry", REGISTRY, {**configured, **env}) as process:
                assert process.wait(20) == 78
                process.wait_for(words, 5)
            assert len(process.lines) == 1


def test_without_a_port_nothing_listens_and_the_package_is_not_loaded(configured):
    done = subprocess.run(
        python("-c", OFF), env={**os.environ, **configured}, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")
