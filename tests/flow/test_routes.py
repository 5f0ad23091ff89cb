"""Requests for one instance of several that serve the same model."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker.testing import SimulatedMLX, running_host
from tests.flow.conftest import CHAT, work
from tests.flow.test_readiness import HELLO, wait_until

QUICK = {"FLEET_WORKER__CANARY_INTERVAL": "1", "FLEET_REGISTRY__READINESS_INTERVAL": "1"}


@pytest.mark.rest
def test_a_request_for_an_instance_waits_for_it_whoever_else_is_there(broker, router):
    with SimulatedMLX(models=[CHAT]) as one, SimulatedMLX(models=[CHAT]) as two, ThreadPoolExecutor(1) as pool:
        instances = {
            name: {"base_url": mlx.base_url, "models": {CHAT: {}}} for name, mlx in [("one", one), ("two", two)]
        }
        with running_host(broker.url, instances, env=QUICK):

            def ready():
                return sorted(each.instance.name for each in router.registry.offerings(CHAT, ready=True))

            def chat():
                return router.chat(CHAT, HELLO, max_tokens=2, instance="two", timeout=40)

            wait_until(lambda: ready() == ["one", "two"], 20)
            assert [(reply.instance, len(reply.attempts)) for reply in (chat(), chat(), chat())] == [("two", 1)] * 3
            two.kill()
            wait_until(lambda: ready() == ["one"], 20)
            reply = pool.submit(chat)
            assert router.chat(CHAT, HELLO, max_tokens=2, timeout=20).instance == "one"
            two.restart()
            assert (reply.result().instance, len(reply.result().attempts)) == ("two", 1)
            assert len(work(one)) == 1
