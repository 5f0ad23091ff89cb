"""A fleet for a whole module: a simulated MLX server and a real node."""

import pytest

from fleet_worker.testing import SimulatedMLX, running_node
from tests.callers import Caller

CHAT, EMBED = "sim-chat", "sim-embed"


def work(mlx):
    """The requests that a simulated server had to work for, without the node's own canary."""
    return [request for request in mlx.requests if request.method == "POST" and not is_canary(request)]


def is_canary(request):
    said = request.body or {}  # its head may have arrived, and not its body
    return said.get("input") == ["canary"] or said.get("messages") == [{"role": "user", "content": "Hi"}]


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
