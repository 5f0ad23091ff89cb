"""A node finds the chat template of its model when it begins, and again when its server has another model."""

import time

import pytest

from fleet_worker.protocol.request import FleetRequest, Resume
from fleet_worker.simulator import CHAT_TEMPLATE, reply_tokens
from fleet_worker.testing import SimulatedMLX, running_node
from tests.brokers import any_broker
from tests.flow.conftest import CHAT, work
from tests.mlx_clients import until

HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = reply_tokens(HELLO, 32)
RESUME = Resume(content="".join(TOKENS[:10]), tokens=10)


def looks(mlx):
    """How often the server was asked for its models."""
    return sum(request.path == "/v1/models" for request in mlx.requests)


@pytest.fixture
def resuming(monkeypatch):
    addressed_to = FleetRequest.addressed_to

    def submitted(request, *where):
        return addressed_to(request, *where).model_copy(update={"resume": RESUME})

    monkeypatch.setattr(FleetRequest, "addressed_to", submitted)


@pytest.mark.rest
@any_broker
def test_a_template_is_looked_up_when_the_list_of_models_is_read(broker, router, tmp_path, resuming):
    """When the node begins, and now and then; not for each answer that goes on. That it is missing is said once."""
    file = tmp_path / "chat_template.jinja"
    file.write_text(CHAT_TEMPLATE, "utf-8")
    models = {CHAT: {"backend": "default_model"}, "other": {"backend": "somebody/other"}}
    often = {"FLEET_WORKER__MODELS_INTERVAL": "1"}
    with (
        SimulatedMLX(flavour="mlx_lm", models=[CHAT], listed=[str(tmp_path)]) as mlx,
        running_node(broker.url, base_url=mlx.base_url, models=models, env=often) as node,
    ):
        seen, started = looks(mlx), time.monotonic()
        for _ in range(10):
            with router.stream_chat(CHAT, HELLO, temperature=0.5, timeout=20) as stream:
                assert "".join(delta.content or "" for delta in stream) == "".join(TOKENS[10:])
        assert looks(mlx) <= seen + 1 + (time.monotonic() - started)
        assert all(request.body["messages"][-1]["role"] == "assistant" for request in work(mlx))
        file.unlink()
        until(lambda: f"no chat template of {CHAT}" in node.output)
        seen = looks(mlx)
        until(lambda: looks(mlx) > seen + 1)
        assert [node.output.count(f"no chat template of {model}") for model in models] == [1, 1]
