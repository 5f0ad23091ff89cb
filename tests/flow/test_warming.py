"""A server that was restarted is warmed again by the routers, before its conversations go on."""

import time
import uuid
from contextlib import ExitStack

import pytest

from fleet_worker import Router, Settings
from fleet_worker.testing import SimulatedMLX, running_host
from tests.brokers import any_broker
from tests.flow.conftest import work
from tests.mlx_clients import until

pytestmark = [
    pytest.mark.rest,
    any_broker,
]

PREFILL_RATE = 500.0
PAUSE = 1.1
"""Seconds to read an answer. Meanwhile its node tells what it holds now."""
WITHIN = 20.0


@pytest.fixture(scope="module")
def servers(broker):
    """Two minis, by the names of their nodes. A cold prompt of these tests takes four seconds, what a turn adds 0.4."""
    model, host = f"m-{uuid.uuid4().hex[:8]}", f"host-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        served = {
            name: stack.enter_context(SimulatedMLX(models=[model], prefill_rate=PREFILL_RATE, token_interval=0.005))
            for name in ("one", "two")
        }
        limits = {"limits": {"concurrency": 2}, "models": {model: {}}}
        instances = {name: {"base_url": server.base_url, **limits} for name, server in served.items()}
        stack.enter_context(running_host(broker.url, instances, host=host))
        yield {f"{name}@{host}": server for name, server in served.items()}


@pytest.fixture
def router(broker, servers):
    with Router(Settings(broker_url=broker.url)) as router:
        model = next(iter(servers.values())).models[0]
        until(lambda: len(router.registry.offerings(model, ready=True)) == 2, WITHIN)
        yield router


class Conversation:
    """Each question is 200 words, after 2,000 words of instructions."""

    def __init__(self, router, model, **options):
        self._router, self._model, self._options = router, model, options
        self._name = uuid.uuid4().hex[:8]
        self._messages = [{"role": "system", "content": self._words("instructions", 2_000)}]
        self.ttft = []
        """Of each turn so far, in seconds."""

    def ask(self):
        """Have one more turn, and read the answer; return it."""
        self._messages.append({"role": "user", "content": self._words(len(self.ttft), 200)})
        began = time.monotonic()
        with self._router.stream_chat(self._model, self._messages, max_tokens=20, **self._options) as stream:
            next(iter(stream))
            self.ttft.append(time.monotonic() - began)
            for _ in stream:
                pass
        self._messages.append({"role": "assistant", "content": stream.response.content})
        time.sleep(PAUSE)
        return stream.response

    def _words(self, of, count):
        return " ".join(f"{self._name}-{of}-{n}" for n in range(count))


def test_the_next_turn_after_a_restart_is_as_warm_as_ever(router, servers):
    model = next(iter(servers.values())).models[0]
    conversation = Conversation(router, model)
    answer = [conversation.ask() for _ in range(3)][-1]
    server = servers[answer.node]
    Conversation(router, model, node=answer.node, keep_warm=False).ask()
    before = len(work(server))
    server.kill()
    time.sleep(1.0)  # so long takes the quickest of real servers, and the node finds it gone
    server.restart()
    until(lambda: [each for each in work(server)[before:] if each.finished], WITHIN)
    cold, *warm = conversation.ttft
    after = conversation.ask()
    assert (after.node, after.cache) == (answer.node, "hit")
    assert after.usage.cached_tokens > after.usage.prompt_tokens / 2
    assert conversation.ttft[-1] <= 2 * max(warm) < cold
    assert [each.body["max_tokens"] for each in work(server)[before:]] == [1, 20]  # the other was not to be kept
