"""A conversation through two routers finds the real mlx_lm.server again that has it in its cache."""

import random
from contextlib import ExitStack

import pytest

from fleet_worker import Router, Settings
from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.host.child_process import child, python
from fleet_worker.testing import running_host
from tests.brokers import Valkey, free_port, missing
from tests.mlx_clients import until

pytestmark = [pytest.mark.timeout(300), pytest.mark.rest]  # the first run downloads the model

MODEL = "smollm2"
TURNS = 3
TALES = [
    "In the harbour an old captain counts the ships that the storm has left. ",
    "High in the mountains a shepherd tells the same tale to each of his dogs. ",
]
PARAGRAPH = 3
"""Repetitions: about 60 tokens. Without a GPU the server reads some ten of them a second."""


@pytest.fixture(scope="module")
def routers():
    if problem := platform_problem():
        missing(problem)
    folder = str(chat_model(lambda *_: None))
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey())
        instances = {}
        for name in ("one", "two"):
            port = free_port()
            command = python("-m", "mlx_lm", "server", "--model", folder, "--host", "127.0.0.1", "--port", str(port))
            server = stack.enter_context(child("mlx_lm.server", command, {"HF_HUB_OFFLINE": "1"}))
            instances[name] = {
                "base_url": f"http://127.0.0.1:{port}",
                "server": "mlx_lm",
                "models": {MODEL: {"backend": folder}},
                "limits": {"concurrency": 2},
            }
            server.wait_for("Starting httpd", 120)
        stack.enter_context(running_host(valkey.url, instances, ready_within=60))
        made = [stack.enter_context(Router(Settings(broker_url=valkey.url))) for _ in range(2)]
        for router in made:
            until(lambda: len(router.registry.offerings(MODEL, capability="chat", ready=True)) == 2, 20)  # noqa: B023
        yield made


def test_every_later_turn_finds_what_is_cached(routers):
    """The conversations take turns, so each meets a server that the other one has used meanwhile."""
    rng = random.Random(7)
    talks = [[{"role": "system", "content": tale * PARAGRAPH}] for tale in TALES]
    cached = []
    for turn in range(TURNS):
        for messages in talks:
            messages.append({"role": "user", "content": f"Tell me part {turn + 1} of it."})
            answer = rng.choice(routers).chat(MODEL, messages, max_tokens=4, timeout=120)
            messages.append({"role": "assistant", "content": answer.content})
            cached.append((turn, answer.usage.cached_tokens, answer.usage.prompt_tokens, answer.cache))
    assert all(found > total / 2 and outcome == "hit" for turn, found, total, outcome in cached if turn), cached
