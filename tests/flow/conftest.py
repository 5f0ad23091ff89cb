"""A fleet for a whole module: a real broker, a simulated MLX server, a real node. Every flow runs on both brokers."""

import pytest

from fleet_worker import Router, Settings
from fleet_worker.testing import SimulatedMLX, running_node
from tests.brokers import BROKERS
from tests.callers import Caller

CHAT, EMBED = "sim-chat", "sim-embed"


def work(mlx):
    """The requests that a simulated server had to work for, without the node's own canary."""
    return [request for request in mlx.requests if request.method == "POST" and not is_canary(request)]


def is_canary(request):
    said = request.body or {}  # its head may have arrived, and not its body
    return said.get("input") == ["canary"] or said.get("messages") == [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="session", params=BROKERS)
def broker(request):
    with BROKERS[request.param]() as broker:
        yield broker


@pytest.fixture(scope="module")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], token_interval=0.002) as server:
        yield server


@pytest.fixture(scope="module")
def node(broker, mlx):
    models = {CHAT: {"features": {"vision": True}}, EMBED: {}}
    with running_node(broker.url, base_url=mlx.base_url, limits={"concurrency": 4}, models=models) as process:
        yield process


@pytest.fixture
def caller(broker):
    with Caller(broker) as caller:
        yield caller


@pytest.fixture
def router(broker):
    with Router(Settings(broker_url=broker.url)) as router:
        yield router
