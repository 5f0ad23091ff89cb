"""A fleet that is asked for twice what it can do: who is refused, how soon, and how long the others wait."""

import threading
import time
import uuid

import pytest

from fleet_worker import FleetSaturated, QueueTimeout, Router, Settings
from fleet_worker.testing import SimulatedMLX, running_host
from tests.mlx_clients import took_less_than, until

pytestmark = pytest.mark.rest
HELLO = [{"role": "user", "content": "Hello"}]
SLOTS, TOKENS, INTERVAL = 8, 20, 0.02
CAPACITY = SLOTS / (TOKENS * INTERVAL)
"""Requests a second."""
MAX_WAIT = 2.0


@pytest.fixture
def model():
    return f"busy-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def mlx(model):
    with SimulatedMLX(models=[model], token_interval=INTERVAL) as server:
        yield server


@pytest.fixture
def router(broker, mlx, model):
    instance = {"base_url": mlx.base_url, "models": {model: {}}, "limits": {"concurrency": SLOTS}}
    env = {"FLEET_WORKER__CANARY_INTERVAL": "1"}
    with running_host(broker.url, {"one": instance}, env=env), Router(Settings(broker_url=broker.url)) as router:
        router.registry.wait_for(model, 10)
        yield router


class Crowd:
    """Asks `rate` times a second; notes how long each refusal took, and how long each of the others waited."""

    def __init__(self, router, model, priority):
        self.router, self.model, self.priority = router, model, priority
        self.refused, self.retry_after, self.waits = [], [], []

    def ask(self):
        began = time.monotonic()
        options = {"priority": self.priority, "max_wait": MAX_WAIT, "max_tokens": TOKENS, "timeout": 60}
        try:
            reply = self.router.chat(self.model, HELLO, **options)
        except FleetSaturated as error:
            self.refused.append(time.monotonic() - began)
            self.retry_after.append(error.metadata["retry_after"])
        else:
            self.waits.append(reply.timings.queue_wait)

    def come(self, rate, seconds):
        threads, began = [], time.monotonic()
        for number in range(int(rate * seconds)):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            threads.append(threading.Thread(target=self.ask))
            threads[-1].start()
        for thread in threads:
            thread.join()


def percent(values, percent):
    return sorted(values)[int(len(values) * percent / 100)]


def test_at_twice_the_capacity_half_is_refused_at_once_and_nobody_else_waits_for_long(router, model):
    crowd = Crowd(router, model, "normal")
    crowd.come(2 * CAPACITY, 20)
    offered = len(crowd.refused) + len(crowd.waits)
    assert 0.35 < len(crowd.refused) / offered < 0.6
    assert percent(crowd.refused, 95) < 0.05
    assert percent(crowd.waits, 95) < 1.2 * MAX_WAIT
    assert max(crowd.waits) < 2 * MAX_WAIT
    assert all(1 <= each <= 60 for each in crowd.retry_after)
    with took_less_than(5):
        until(lambda: not crowd.refused.clear() and not crowd.ask() and not crowd.refused, 5)


def test_a_higher_priority_is_served_before_and_refused_less(router, model):
    crowds = [Crowd(router, model, priority) for priority in ("high", "low")]
    threads = [threading.Thread(target=each.come, args=(CAPACITY, 15)) for each in crowds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    high, low = crowds
    assert len(high.refused) < 0.35 * (len(high.refused) + len(high.waits))
    assert len(high.waits) > 2 * len(low.waits)
    assert percent(high.waits, 95) < 1.2 * MAX_WAIT


def test_who_may_not_wait_for_as_long_as_all_are_away_is_told_at_once(router, mlx, model):
    mlx.kill()
    until(lambda: router.registry.offerings(model, ready=False), 10)
    until(lambda: (router.registry.away_for(model, "chat") or 0) > 1, 10)
    with took_less_than(0.5), pytest.raises(QueueTimeout, match="nobody has served chat of that model for"):
        router.chat(model, HELLO, timeout=60, max_wait=0.5)
    with took_less_than(4), pytest.raises(QueueTimeout):
        router.chat(model, HELLO, timeout=60, max_wait=60, queue_timeout=0.5)
