"""What a node makes of a server that is silent: a real monitor and client, and a simulated server on real sockets."""

import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from fleet_worker.errors import FleetError, InstanceUnavailable
from fleet_worker.node import health_monitor as module
from fleet_worker.node.health_monitor import HealthMonitor
from fleet_worker.node.readiness import Readiness
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.settings import WorkerSettings
from fleet_worker.simulator import Fault
from tests.mlx_clients import served, until

SILENT = {"path": "/health", "kind": "slow_headers", "times": None}
SOON = 3.0
"""Seconds. With the figures of this file a frozen server is known after half a second."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "SILENT_FOR", 0.2)
    monkeypatch.setattr(module, "LAST_CHANCE", 0.4)


class Models:
    def __init__(self, offering):
        self.available = {}
        self._offering = offering

    def for_canary(self, loaded):
        return self._offering


class Monitored:
    """A server, its client and its monitor, and streams in threads of their own."""

    def __init__(self, mlx, client, probe_timeout):
        self.mlx, self.client, self.running = mlx, client, RunningAttempts()
        self.readiness = Readiness(stall_after=20.0)
        settings = WorkerSettings(probe_interval=0.02, probe_timeout=probe_timeout)
        models = Models(client.offering)
        self.monitor = HealthMonitor(client, self.readiness, models, self.running, settings, lambda: None)
        self.monitor.start()
        self.ended, self.pieces = {}, {}
        until(lambda: self.readiness.state.ready)

    @contextmanager
    def stream(self, name, **params):
        """Begin a stream; wait for its end."""
        thread = threading.Thread(target=self._read, args=(name,), kwargs=params)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _read(self, name, **params):
        self.pieces[name] = 0
        try:
            with self.running.attempt(name, 1, "q") as token, self.client.open(token=token, **params) as stream:
                for deltas in stream:
                    self.pieces[name] += len(deltas)
        except FleetError as error:
            self.ended[name] = error
        else:
            self.ended[name] = None

    def freeze(self):
        self.mlx.fail(Fault(seconds=60.0, **SILENT))


@contextmanager
def monitored(flavour, probe_timeout=0.1, **options):
    with served(flavour, tokens=100, **options) as (mlx, client):
        monitored = Monitored(mlx, client, probe_timeout)
        try:
            yield monitored
        finally:
            mlx._plan.clear()
            mlx.release()
            monitored.monitor.close()
            monitored.monitor._thread.join()


def also(*values):
    return pytest.param(*values, marks=pytest.mark.rest)


@pytest.mark.parametrize("flavour", ["mlx_lm", *map(also, ["vllm_batched", "mlx_openai", "omni", "openai"])])
def test_all_streams_of_a_frozen_server_go_elsewhere(flavour):
    streams = 1 if flavour == "omni" else 4
    with monitored(flavour, tokens_per_write=1) as server, server.mlx.held(at_token=3), ExitStack() as opened:
        for number in range(streams):
            opened.enter_context(server.stream(number))
        until(lambda: list(server.pieces.values()) == [3] * streams)
        server.freeze()
        until(lambda: len(server.ended) == streams, SOON)
        for error in server.ended.values():
            assert isinstance(error, InstanceUnavailable)
            assert error.retryable
        assert not server.readiness.state.ready


@pytest.mark.parametrize(("flavour", "goes"), [also("mlx_lm", True), also("vllm_batched", True), ("openai", False)])
def test_a_prompt_that_is_read_is_given_away_only_where_health_answers_meanwhile(flavour, goes):
    with monitored(flavour) as server:
        server.mlx.ttft = 1.0
        with server.stream("long"):
            until(lambda: server.mlx.counters["running"] == 1)
            server.freeze()
            until(lambda: "long" in server.ended, SOON)
        assert isinstance(server.ended["long"], InstanceUnavailable) is goes


@pytest.mark.rest
def test_a_server_that_is_only_slow_keeps_its_streams():
    """Its prompt takes long, and `/health` is late each time, but answers."""
    with monitored("mlx_lm") as server:
        server.mlx.fail(Fault(seconds=0.25, **SILENT))
        server.mlx.ttft = 1.5
        with server.stream("long"):
            until(lambda: server.readiness.state.status == "degraded")
        assert server.ended == {"long": None}


@pytest.mark.rest
def test_a_long_prompt_beside_an_answer_of_health_is_no_sign_at_all():
    with monitored("mlx_lm", probe_timeout=2.0) as server:
        server.mlx.ttft = 1.0
        with server.stream("long"):
            until(lambda: server.mlx.counters["running"] == 1)
            while not server.ended:
                assert server.readiness.state.ready
                time.sleep(0.02)
        assert server.ended == {"long": None}


@pytest.mark.rest
def test_one_stream_that_moves_keeps_the_silent_ones():
    with monitored("vllm_batched", token_interval=0.02) as server:
        server.mlx.fail(Fault("freeze", at_token=2))
        with server.stream("silent"):
            until(lambda: server.pieces.get("silent") == 2)
            server.freeze()
            with server.stream("moving"):
                pass
            assert server.ended.pop("moving") is None
            assert server.ended == {}
            until(lambda: "silent" in server.ended, SOON)  # now nothing moves any more
