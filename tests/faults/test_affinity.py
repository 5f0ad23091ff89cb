"""A request that waits for the warmest node is answered elsewhere if that one dies, freezes, drains or stays full."""

import signal
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from fleet_worker import Router, Settings
from fleet_worker.host.child_process import python
from fleet_worker.testing import SimulatedMLX, running_host
from tests.benchmarks.conversations import words
from tests.brokers import any_broker
from tests.mlx_clients import until

LOST_AFTER, ACCEPT_TIMEOUT = 2.0, 1.0
PREFILL_RATE = 1_500.0
"""Tokens a second: a cold prompt takes about two seconds."""
PROMPT = 3_000
WITHIN = LOST_AFTER + ACCEPT_TIMEOUT + 1.0
"""Seconds until a request is answered elsewhere, without what the server there needs for it."""

pytestmark = pytest.mark.rest


class Pair:
    """Two hosts with one slot each, and a conversation that is warm on the one that answered it first."""

    def __init__(self, broker_url, stack, pool):
        self.broker_url, self.pool = broker_url, pool
        self.model = f"pair-{uuid.uuid4().hex[:8]}"
        self.servers, self.hosts = {}, {}
        for name in ("one", "two"):
            server = SimulatedMLX(models=[self.model], prefill_rate=PREFILL_RATE, token_interval=0.01, tokens=20)
            stack.enter_context(server)
            instance = {"base_url": server.base_url, "limits": {"concurrency": 1}, "models": {self.model: {}}}
            host = f"{self.model}-{name}"
            self.servers[f"{name}@{host}"] = server
            self.hosts[f"{name}@{host}"] = stack.enter_context(running_host(broker_url, {name: instance}, host=host))
        settings = {"lost_after": LOST_AFTER, "accept_timeout": ACCEPT_TIMEOUT}
        self.router = stack.enter_context(Router(Settings(broker_url=broker_url, router=settings)))
        self.begin()

    def begin(self):
        """Have a conversation begun; wait until the router has heard from a digest what the node has measured."""
        until(lambda: len(self.router.registry.offerings(self.model, capability="chat", ready=True)) == 2, 20)
        self.messages = [{"role": "user", "content": words(uuid.uuid4(), PROMPT)}]
        answer = self.ask()
        self.messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": "Go on."}]
        self.warm = answer.node
        (self.cold,) = self.servers.keys() - {self.warm}
        loads = self.router._session._prompt_caches.affinity._loads
        until(lambda: loads[self.warm].prefill_speed, 10)

    def ask(self, **options):
        return self.router.chat(self.model, self.messages, timeout=40, **options)

    def hold(self):
        """Hold the only slot of the warm node, and send the next turn, which waits for it."""
        server = self.servers[self.warm]
        server.hold(at_token=2)
        hello = [{"role": "user", "content": "Hello"}]
        self.running = self.pool.submit(self.router.chat, self.model, hello, node=self.warm, timeout=40)
        until(lambda: server.counters["running"] == 1)
        self.waiting = self.pool.submit(self.ask)
        until(lambda: any(each.route.is_chosen for each in self.router._session._requests.copy().values()))
        self.since = time.monotonic()

    def release(self):
        self.servers[self.warm].release()
        assert self.running.result(40).node == self.warm

    def is_answered_elsewhere(self, within=WITHIN):
        answer = self.waiting.result(40)
        took = time.monotonic() - self.since - answer.timings.duration
        assert (answer.node, answer.cache) == (self.cold, "moved")
        assert {each.error for each in answer.attempts} == {"moved", None}
        assert took <= within

    def signal(self, number):
        for process in self.hosts[self.warm].values():
            process.signal(number)

    def drain(self, command):
        environment = {"PATH": "/usr/bin:/bin", "FLEET_BROKER_URL": self.broker_url}
        command = python("-m", "fleet_worker", command, self.warm)
        subprocess.run(command, env=environment, check=True, timeout=30, capture_output=True)
        self.since = time.monotonic()


@pytest.fixture
def pair(broker):
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(4))
        yield Pair(broker.url, stack, pool)


@any_broker
def test_a_turn_goes_to_the_warm_node_and_elsewhere_if_that_host_is_killed(pair):
    answer = pair.ask()
    assert (answer.node, answer.cache) == (pair.warm, "hit")
    assert answer.usage.cached_tokens > answer.usage.prompt_tokens / 2
    pair.hold()
    pair.signal(signal.SIGKILL)
    pair.is_answered_elsewhere()


@any_broker
def test_what_waits_for_a_node_that_stays_full_drains_or_freezes_is_answered_elsewhere(pair):
    pair.hold()
    pair.is_answered_elsewhere(within=20.0)
    pair.release()

    pair.begin()
    pair.hold()
    pair.drain("drain")
    pair.is_answered_elsewhere()
    pair.release()
    pair.drain("undrain")

    pair.begin()
    pair.hold()
    pair.signal(signal.SIGSTOP)
    try:
        pair.is_answered_elsewhere()
    finally:
        pair.signal(signal.SIGCONT)
