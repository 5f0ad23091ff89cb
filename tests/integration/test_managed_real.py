"""A real `mlx_lm.server` that `fleet-worker up` starts, restarts and ends."""

import os
import re
import shlex
import signal

import psutil
import pytest

from fleet_worker import Router, Settings
from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.host.child_process import python
from fleet_worker.testing import embedded_broker, worker_toml
from tests.brokers import free_port, missing
from tests.flow.test_readiness import statuses, wait_until
from tests.ups import running_up

pytestmark = [pytest.mark.rest, pytest.mark.timeout(300)]  # the first run downloads the model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_real_server_is_started_killed_started_again_and_ends_with_up(tmp_path):
    if problem := platform_problem():
        missing(problem)
    folder, config = str(chat_model(lambda *_: None)), tmp_path / "worker.toml"
    instance = {
        "base_url": f"http://127.0.0.1:{free_port()}",
        "serve": f"mlx_lm.server --model {shlex.quote(folder)} --port {{port}}",
        "models": {"smollm2": {"backend": "default_model"}},
    }
    config.write_text(f'host = "mini"\nstate_dir = "{tmp_path}"\n' + worker_toml("local", instance), "utf-8")
    with embedded_broker() as broker_url, Router(Settings(broker_url=broker_url)) as router:
        environment = {"FLEET_CONFIG": str(config), "FLEET_BROKER_URL": broker_url, "HF_HUB_OFFLINE": "1"}
        environment["HF_HOME"] = str(tmp_path / "nothing-yet")  # as on a new Mac
        with running_up(python("-m", "fleet_worker", "up"), environment) as up:
            wait_until(lambda: statuses(router) == {"local": "available"}, 120)
            answer = router.chat("smollm2", QUESTION, max_tokens=8, temperature=0.0, timeout=60)
            (pid,) = set(re.findall(r"the server of local starts, pid (\d+)", up.output))
            assert "[local] " in up.output  # what it prints
            assert "France" not in up.output
            assert "Traceback" not in up.output
            assert "no chat template" not in up.output  # the server tells its folder
            os.kill(int(pid), signal.SIGKILL)
            again = router.chat("smollm2", QUESTION, max_tokens=8, temperature=0.0, timeout=120)
            assert again.content == answer.content
            assert "the server of local was killed by signal 9; starts again at once" in up.output
            (pid,) = set(re.findall(r"the server of local starts, pid (\d+)", up.output)) - {pid}
            server = psutil.Process(int(pid))
            up.signal(signal.SIGTERM)
            assert up.wait(60) == 0
        assert not server.is_running()
    assert not list(tmp_path.glob("server-*"))
