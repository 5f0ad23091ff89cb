"""Which MLX servers a node wants to have restarted, and which never.

A real monitor and client, and a simulated server on real sockets. A second here is about a minute of a real one.
"""

import threading
import time
from contextlib import contextmanager

import pytest

from fleet_worker.errors import FleetError, InstanceUnavailable
from fleet_worker.mlx import activity
from fleet_worker.mlx.offering import offerings_of
from fleet_worker.node import health_monitor as module
from fleet_worker.node import server_fault
from fleet_worker.node.health_monitor import HealthMonitor
from fleet_worker.node.readiness import Readiness
from fleet_worker.node.running_attempts import RunningAttempts
from fleet_worker.settings import Instance, Model, WorkerSettings
from fleet_worker.simulator import Fault
from tests.mlx_clients import chat_params, served, until

STALL_AFTER = 0.3
SOON = STALL_AFTER + 1.0
LONG = 1.2
"""Seconds: much more than it takes to find a fault."""
SILENT = {"kind": "slow_headers", "seconds": 60.0, "times": None}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "SILENT_FOR", 0.2)
    monkeypatch.setattr(module, "LAST_CHANCE", 0.2)
    monkeypatch.setattr(module, "DOUBT_DEADLINE", 0.2)
    monkeypatch.setattr(module, "SILENCE_DEADLINE", 0.3)
    monkeypatch.setattr(activity, "BLIND_PATIENCE", 2.5)
    monkeypatch.setattr(server_fault, "ASK_AGAIN_AFTER", 0.1)


class Models:
    def __init__(self, *offerings):
        self._offerings = offerings
        self.available = {}

    def for_canary(self, loaded):
        return next((each for each in self._offerings if each.backend in loaded), self._offerings[0])

    def forget_missing(self):
        pass


class Monitored:
    """A server, its client and its monitor, and requests in threads of their own."""

    def __init__(self, mlx, client, *offerings):
        self.mlx, self.client, self.running = mlx, client, RunningAttempts()
        self.readiness = Readiness(stall_after=STALL_AFTER)
        self.models = Models(*(offerings or [client.offering]))
        self.told = []
        settings = WorkerSettings(probe_interval=0.02, probe_timeout=0.1, stall_after=STALL_AFTER)
        self.monitor = HealthMonitor(
            client,
            self.readiness,
            self.models,
            self.running,
            settings,
            lambda: None,
            fault_changed=lambda: self.told.append(self.fault),
        )
        self.threads = []
        self.ended = {}

    @property
    def fault(self):
        return self.monitor.fault.text

    def start(self, *, proved=True):
        self.monitor.start()
        if proved:
            until(lambda: self.readiness.state.ready)
        return self

    def begin(self, name, call=None):
        """Begin a request: a chat, unless `call` makes another one with a token."""

        def run():
            try:
                with self.running.attempt(name, 1, "q") as token:
                    (call or self.client.ask)(token=token)
            except FleetError as error:
                self.monitor.request_failed(error, name)
                self.ended[name] = error
            else:
                self.ended[name] = None

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def watched(self, seconds=LONG):
        """Let time pass; return what was told of faults."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            time.sleep(0.05)
        return [text for text in self.told if text]

    def close(self):
        self.mlx._plan.clear()
        self.mlx.release()
        self.running.stop(lambda: InstanceUnavailable("the test is over"))
        for thread in self.threads:
            thread.join(5)
        self.monitor.close()
        self.client.unreachable.set()
        self.mlx.kill()  # both end a canary that would wait
        self.monitor._thread.join(5)


@contextmanager
def monitored(flavour="mlx_lm", *, proved=True, client=None, **options):
    with served(flavour, client=client, **{"tokens": 100, **options}) as (mlx, of_it):
        monitored = Monitored(mlx, of_it)
        try:
            yield monitored.start(proved=proved)
        finally:
            monitored.close()


def also(*values):
    return pytest.param(*values, marks=pytest.mark.rest)


# --- Faults


@pytest.mark.parametrize("is_answering", [True, also(False)])
def test_a_server_that_delivers_nothing_more_has_a_fault_soon_after_the_time_to_stall(is_answering):
    """`/health` answers 200: its generation thread has died."""
    with monitored(old_health=True) as server, server.mlx.held(at_token=3):
        if is_answering:
            server.begin("answering")
            until(lambda: server.mlx.counters["generated"] >= 3)
        server.mlx.engine.die()
        server.mlx.release()
        begun = time.monotonic()
        for number in range(3):
            server.begin(number)
        until(lambda: server.fault, SOON)
        assert time.monotonic() - begun > STALL_AFTER
        assert server.fault.startswith("no token for more than 0.3 s while work is in progress, and a canary had no ")
        assert len(server.watched(0.3)) == 1


@pytest.mark.rest
@pytest.mark.parametrize("flavour", ["vllm_batched", "mlx_openai", "openai"])
def test_so_have_servers_of_other_kinds(flavour):
    with monitored(flavour, old_health=True) as server:
        server.mlx.engine.die()
        server.begin("a")
        until(lambda: server.fault, SOON)


@pytest.mark.parametrize("by", ["a request", also("health alone")])
def test_a_server_that_says_that_its_generation_thread_has_died_has_a_fault_at_once(by):
    with monitored() as server:
        server.mlx.engine.die()
        if by == "a request":
            server.begin("a")
        until(lambda: server.fault, STALL_AFTER)


@pytest.mark.rest
@pytest.mark.parametrize("flavour", ["mlx_lm", "openai"])
@pytest.mark.parametrize("works", [True, False])
def test_a_frozen_server_has_a_fault(flavour, works):
    with monitored(flavour) as server, server.mlx.held(at_token=3):
        if works:
            server.begin("a")
            until(lambda: server.mlx.counters["generated"] >= 3)
        server.mlx.fail(*(Fault(**SILENT, path=path) for path in ("/health", "/v1/chat/completions")))
        until(lambda: server.fault, SOON + 1.0)


@pytest.mark.rest
def test_a_server_that_works_again_by_itself_has_no_fault_any_more():
    with monitored() as server, server.mlx.held(at_token=0):
        server.begin("a")
        until(lambda: server.fault, SOON)
        server.mlx.release()
        until(lambda: server.ended == {"a": None})
        until(lambda: not server.fault)


@pytest.mark.rest
def test_a_restarted_server_has_none():
    with monitored(old_health=True) as server:
        server.mlx.engine.die()
        server.begin("a")
        until(lambda: server.fault, SOON)
        server.mlx.kill()
        server.mlx.restart()
        until(lambda: not server.fault)
        until(lambda: server.readiness.state.ready)


# --- No faults


@pytest.mark.rest
def test_a_server_that_only_embeds_is_asked_for_embeddings_and_never_for_chats():
    model = {"dimensions": 384, "backend": "sim-embed"}
    with monitored("vllm_batched", client={"model": model}, models=["sim-embed"]) as server:
        server.mlx.ttft = 1.0
        server.mlx.fail(Fault("status", path="/v1/chat/completions", status=500, times=None))
        for number in range(2):
            server.begin(number, lambda token: server.client.vectors("text " * 400, token=token))
            assert server.watched(0.5) == []
        until(lambda: len(server.ended) == 2)
        assert set(server.ended.values()) == {None}
        assert {request.path for request in server.mlx.requests} <= {"/v1/embeddings", "/health"}


@pytest.mark.rest
@pytest.mark.parametrize("flavour", ["mlx_lm", "omni"])
def test_a_server_that_loads_its_model_for_the_first_request_is_only_cold(flavour):
    options = {"models": ["other", "sim-chat"], "load_delay": LONG}
    with monitored(flavour, proved=False, **options) as server:
        server.begin("cold")
        assert server.watched(LONG + 0.2) == []
        until(lambda: server.ended == {"cold": None})
        until(lambda: server.readiness.state.ready)


@pytest.mark.rest
def test_a_server_that_swaps_its_model_for_a_request_is_only_cold():
    """The canaries ask for the model that it has."""
    with monitored(models=["sim-chat", "other"], load_delay=0.0) as server:
        other = offerings_of(Instance(models={"o": Model(backend="other")}), {}, ())["o"]
        server.models._offerings = [server.client.offering, other]
        server.mlx.load_delay = LONG

        def ask_the_other(token):
            server.client.chat(chat_params(), other, deadline=time.monotonic() + 30, cancel_token=token)

        server.begin("swap", ask_the_other)
        assert server.watched(LONG + 0.2) == []
        until(lambda: server.ended == {"swap": None})


@pytest.mark.rest
@pytest.mark.parametrize("flavour", ["mlx_lm", "vllm_simple"])
def test_a_server_whose_slots_are_full_is_only_saturated(flavour):
    with monitored(flavour, slots=1, token_interval=0.02) as server:
        for number in range(4):
            server.begin(number)
        assert server.watched(LONG) == []


@pytest.mark.rest
@pytest.mark.parametrize("status", [429])
def test_a_server_that_answers_that_it_is_busy_is_only_saturated(status):
    """With work of somebody else; the canaries of a node that has none are refused, too."""
    with monitored("vllm_batched") as server:
        busy = Fault("status", path="/v1/chat/completions", status=status, headers={"retry-after": "0"}, times=None)
        server.mlx.fail(busy)
        ends = time.monotonic() + LONG
        while time.monotonic() < ends:
            server.begin(time.monotonic())
            server.monitor.canary_now()
            assert server.watched(0.1) == []


@pytest.mark.rest
@pytest.mark.parametrize(("flavour", "words"), [("mlx_lm", 400), ("vllm_batched", 400)])
def test_a_server_that_reads_a_long_prompt_is_only_slow(flavour, words):
    """`mlx_lm` tells how far it is; of the others nothing is heard until the first token."""
    messages = [{"role": "user", "content": "word " * words}]
    with monitored(flavour, prefill_rate=words / LONG) as server:
        server.begin("long", lambda token: server.client.ask(messages, token=token))
        assert server.watched(LONG) == []
        until(lambda: server.ended == {"long": None})


@pytest.mark.rest
def test_a_server_whose_health_is_late_is_only_late():
    with monitored(token_interval=0.02, tokens=40) as server:
        server.mlx.fail(Fault(**{**SILENT, "path": "/health"}))
        for number in range(2):
            server.begin(number)
            assert server.watched(0.5) == []
        until(lambda: len(server.ended) == 2)
        assert server.watched(0.6) == []
