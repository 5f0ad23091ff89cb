"""One fleet and one gateway for all tests of this folder."""

import httpx
import openai
import pytest

from fleet_worker.testing import SimulatedMLX, embedded_broker, running_host
from tests.gateways import running_gateway

CHAT, EMBED = "sim-chat", "sim-embed"


@pytest.fixture(scope="session")
def mlx():
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], token_interval=0.002) as server:
        yield server


@pytest.fixture(scope="session")
def fleet(mlx):
    models = {CHAT: {"features": {"vision": True, "tools": True}}, EMBED: {}}
    instance = {"base_url": mlx.base_url, "limits": {"concurrency": 8}, "models": models}
    with embedded_broker() as url, running_host(url, {"sim": instance}):
        yield url


@pytest.fixture(scope="session")
def gateway(fleet):
    with running_gateway(fleet) as process:
        yield process


@pytest.fixture
def http(gateway):
    with httpx.Client(base_url=gateway.url, timeout=20) as client:
        yield client


@pytest.fixture
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client
