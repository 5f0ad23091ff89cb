"""The registry with a real `mlx_lm.server`, under `fleet-worker up`: killed, started again, used again."""

import signal

import pytest

from fleet_worker import Router, Settings
from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.host.child_process import child, python
from fleet_worker.testing import embedded_broker, worker_toml
from tests.brokers import free_port, missing
from tests.flow.test_readiness import statuses, wait_until
from tests.ups import running_up

pytestmark = pytest.mark.timeout(300)  # the first run downloads the model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def mlx_server(port):
    folder = str(chat_model(lambda *_: None))
    command = python("-m", "mlx_lm", "server", "--model", folder, "--host", "127.0.0.1", "--port", str(port))
    return child("mlx_lm.server", command, {"HF_HUB_OFFLINE": "1"})


@pytest.mark.rest
def test_a_real_server_that_is_killed_and_started_again_is_used_again(tmp_path):
    if problem := platform_problem():
        missing(problem)
    port, config = free_port(), tmp_path / "worker.toml"
    instance = {"base_url": f"http://127.0.0.1:{port}", "models": {"smollm2": {"backend": "default_model"}}}
    config.write_text(f'host = "mini"\nstate_dir = "{tmp_path}"\n' + worker_toml("local", instance), "utf-8")
    with embedded_broker() as broker_url, Router(Settings(broker_url=broker_url)) as router:
        environment = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": broker_url}
        with mlx_server(port) as first, running_up(python("-m", "fleet_worker", "up"), environment):
            wait_until(lambda: statuses(router) == {"local": "available"}, 120)
            answer = router.chat("smollm2", QUESTION, max_tokens=8, temperature=0.0, timeout=60)
            first.signal(signal.SIGKILL)
            wait_until(lambda: statuses(router) == {"local": "unavailable"}, 5)
            with mlx_server(port):
                again = router.chat("smollm2", QUESTION, max_tokens=8, temperature=0.0, timeout=120)
                assert again.content == answer.content
                wait_until(lambda: statuses(router) == {"local": "available"}, 10)
