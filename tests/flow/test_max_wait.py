"""Who would wait for too long is refused. How well that is known under load, `benchmarks/gateway.py overload` tells."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleet_worker import FleetSaturated, QueueTimeout, Router, Settings
from fleet_worker.testing import SimulatedMLX, running_host
from tests.mlx_clients import took_less_than, until

pytestmark = pytest.mark.rest
HELLO = [{"role": "user", "content": "Hello"}]
SLOTS, TOKENS, INTERVAL = 8, 20, 0.02


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


def test_what_would_wait_longer_is_refused_at_once_and_what_may_wait_is_not(router, mlx, model):
    for _ in range(3):
        router.chat(model, HELLO, max_tokens=TOKENS, timeout=20)  # how fast the lane is
    with mlx.held(at_token=1), ThreadPoolExecutor(2 * SLOTS) as threads:
        waiting = [threads.submit(router.chat, model, HELLO, max_tokens=TOKENS, timeout=60) for _ in range(2 * SLOTS)]
        until(lambda: mlx.counters["running"] == SLOTS, 10)
        with took_less_than(0.5), pytest.raises(FleetSaturated, match="would wait about") as refused:
            router.chat(model, HELLO, timeout=60, max_wait=0.001)
        assert 1 <= refused.value.metadata["retry_after"] <= 60
        waiting.append(threads.submit(router.chat, model, HELLO, max_tokens=1, timeout=60, max_wait=30))
        mlx.release()
        assert all(each.result(60).content for each in waiting)


def test_who_may_not_wait_for_as_long_as_all_are_away_is_told_at_once(router, mlx, model):
    mlx.kill()
    until(lambda: router.registry.offerings(model, ready=False), 10)
    until(lambda: (router.registry.away_for(model, "chat") or 0) > 1, 10)
    with took_less_than(0.5), pytest.raises(QueueTimeout, match="nobody has served chat of that model for"):
        router.chat(model, HELLO, timeout=60, max_wait=0.5)
    with took_less_than(4), pytest.raises(QueueTimeout):
        router.chat(model, HELLO, timeout=60, max_wait=60, queue_timeout=0.5)
