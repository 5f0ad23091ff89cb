"""rapid-mlx and mlx-vlm's server, simulated and real: how they answer, and how our client works with them.

The real ones run where a variable names the Python that has them, since both pull in PyTorch:

    python3 -m venv /tmp/rapid && /tmp/rapid/bin/pip install rapid-mlx 'mlx[cpu]'
    python3 -m venv /tmp/vlm && /tmp/vlm/bin/pip install mlx-vlm 'mlx[cpu]'
    export RAPID_MLX_PYTHON=/tmp/rapid/bin/python MLX_VLM_PYTHON=/tmp/vlm/bin/python
    pytest tests/integration/test_other_servers.py
"""

import json
import os
from contextlib import closing
from dataclasses import dataclass

import httpx
import pytest

from fleet_worker.demo.models import chat_model, platform_problem
from fleet_worker.errors import ModelNotServed, StreamInterrupted, UnsupportedParameter
from fleet_worker.host.child_process import child
from fleet_worker.protocol.request import Resume
from fleet_worker.testing import SimulatedMLX
from tests.brokers import free_port
from tests.mlx_clients import Client

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]  # some 10 tokens a second on two cores

QUESTION = [{"role": "user", "content": "Write a poem about the sea and a storm."}]
LENGTH = 16
OPEN_END = {"add_generation_prompt": False, "continue_final_message": True}
PYTHONS = {"rapid_mlx": "RAPID_MLX_PYTHON", "mlx_vlm": "MLX_VLM_PYTHON"}
QUIET = {"HF_HUB_OFFLINE": "1", "RAPID_MLX_TELEMETRY": "0", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Server:
    kind: str
    url: str
    model: str

    def ask(self, **body):
        given = {"model": self.model, "messages": QUESTION, "max_tokens": 3, "temperature": 0, **body}
        return httpx.post(f"{self.url}/v1/chat/completions", json=given, timeout=120)

    def events(self, **body):
        lines = self.ask(stream=True, stream_options={"include_usage": True}, **body).text.split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


def command(kind, python, folder, port):
    options = ["--host", "127.0.0.1", "--port", str(port)]
    if kind == "rapid_mlx":
        return [python.replace("/python", "/rapid-mlx"), "serve", folder, *options]
    return [python, "-m", "mlx_vlm.server", "--model", folder, *options]


@pytest.fixture(scope="module", params=[f"{kind}-{which}" for kind in PYTHONS for which in ("simulated", "real")])
def server(request):
    kind, _, which = request.param.partition("-")
    if which == "simulated":
        with SimulatedMLX(flavour=kind, models=["sim-chat"], tokens=60) as simulated:
            yield Server(kind, simulated.base_url, "sim-chat")
        return
    python = os.environ.get(PYTHONS[kind])
    if not python or platform_problem():
        pytest.skip(f"{PYTHONS[kind]} does not name a Python with this server")
    port, folder = free_port(), str(chat_model(lambda *_: None))
    with child(kind, command(kind, python, folder, port), QUIET) as process:
        process.wait_for("Uvicorn running on", 300)
        yield Server(kind, f"http://127.0.0.1:{port}", folder)


@pytest.fixture(scope="module")
def client(server):
    with closing(Client(server.url, server=server.kind, model={"backend": server.model})) as client:
        yield client


@pytest.fixture(scope="module")
def whole(client):
    """The pieces of an answer, and how it ended."""
    deltas, _, answer = client.stream(QUESTION, max_tokens=LENGTH, seconds=120)
    return [delta.content for delta in deltas if delta.content], answer


# --- How it answers


def test_its_kind_shows(server, client):
    health = client.health()
    assert (health.ready, health.server) == (True, server.kind)
    assert server.model in client.models()


def test_a_stream(server):
    *chunks, usage, done = server.events()
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert len([choice for choice in choices if choice["delta"].get("content")]) == 3
    assert [choice.get("finish_reason") for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 3)
    if server.kind == "rapid_mlx":
        assert choices[0]["delta"] == {"role": "assistant"}
        assert "finish_reason" not in choices[0]
        assert choices[-1]["delta"]["content"]
    else:
        assert {choice["delta"]["role"] for choice in choices} == {"assistant"}
        assert choices[0]["finish_reason"] is None
        assert chunks[0]["usage"] is None
        assert usage["usage"]["prompt_tokens_details"].keys() == {"cached_tokens"}


def test_another_model(server):
    answer = server.ask(model="nobody/nothing")
    assert answer.status_code == {"rapid_mlx": 404, "mlx_vlm": 400}[server.kind]
    other = Client(server.url, server=server.kind, model={"backend": "nobody/nothing"})
    with closing(other), pytest.raises(ModelNotServed):
        other.ask(seconds=120)
    server.ask(max_tokens=1)


def test_it_does_not_continue_an_answer(server):
    """It begins a new turn; to the flags that vllm-mlx takes, rapid-mlx answers 500."""
    begun = [*QUESTION, {"role": "assistant", "content": "The sea is"}]
    answer = server.ask(messages=begun, chat_template_kwargs=OPEN_END)
    assert answer.status_code == {"rapid_mlx": 500, "mlx_vlm": 200}[server.kind]


@pytest.mark.parametrize("stop", ["whole token", "across tokens"])
def test_stop_strings(server, whole, stop):
    """rapid-mlx ends at them, mlx-vlm's server has no such field."""
    text = "".join(whole[0])
    word = whole[0][4] if stop == "whole token" else text[6:11]
    got = "".join(
        chunk["choices"][0]["delta"].get("content") or ""
        for chunk in server.events(max_tokens=LENGTH, stop=[word])
        if chunk != "[DONE]" and chunk["choices"]
    )
    assert got == (text[: text.index(word)] if server.kind == "rapid_mlx" else text)


def test_what_is_refused(server):
    assert server.ask(logit_bias={"5": 1.0}).status_code == {"rapid_mlx": 400, "mlx_vlm": 200}[server.kind]
    assert server.ask(temperature=None).status_code == {"rapid_mlx": 200, "mlx_vlm": 422}[server.kind]
    assert server.ask(messages=[]).status_code == {"rapid_mlx": 400, "mlx_vlm": 500}[server.kind]


# --- Our client with it


def test_our_client_gets_the_answer(client, whole):
    pieces, ended = whole
    answer = client.ask(QUESTION, max_tokens=LENGTH, seconds=120)
    assert answer.content == "".join(pieces)
    assert (answer.finish_reason, ended.finish_reason) == ("length", "length")
    assert answer.usage.completion_tokens == ended.usage.completion_tokens == LENGTH


def test_our_client_sends_nothing_that_it_refuses(server, client):
    """Every field that is passed on to this kind of server."""
    given = {
        "top_p": 0.9, "top_k": 50, "min_p": 0.01, "presence_penalty": -0.5, "frequency_penalty": 0.5,
        "repetition_penalty": 1.1, "seed": 7, "stop": ["###"], "logit_bias": {"5": 0.5}, "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False}, "user": "me", "n": 1, "parallel_tool_calls": False,
    }  # fmt: skip
    if server.kind == "rapid_mlx":
        with pytest.raises(UnsupportedParameter):
            client.ask(QUESTION, **given)
        del given["logit_bias"]
    asked = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    answer = client.ask(asked, seconds=120, max_tokens=2, temperature=0.5, **given)
    assert answer.usage.completion_tokens == 2


def test_our_client_ends_at_stop_strings(client, whole):
    text = "".join(whole[0])
    for stop in (text[6:11], text[-4:]):
        answer = client.ask(QUESTION, max_tokens=LENGTH, stop=["never", stop], seconds=120)
        assert (answer.content, answer.finish_reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("count", [1, 7, LENGTH - 1])
def test_an_interrupted_answer_is_the_same_at_temperature_0(client, whole, count):
    pieces, ended = whole
    resume = Resume(content="".join(pieces[:count]), tokens=count)
    _, rest, answer = client.stream(QUESTION, max_tokens=LENGTH, resume=resume, seconds=120)
    assert resume.content + rest["content"] == "".join(pieces)
    assert answer.finish_reason == ended.finish_reason


def test_an_answer_of_another_model_is_not_continued(client, whole):
    resume = Resume(content="".join(whole[0][:5]) + " something else", tokens=7)
    with pytest.raises(StreamInterrupted):
        client.stream(QUESTION, max_tokens=LENGTH, resume=resume, seconds=120)


def test_a_warm_answer_is_not_continued(client, whole):
    with pytest.raises(StreamInterrupted):
        client.stream(QUESTION, resume=Resume(content="".join(whole[0][:5]), tokens=5), temperature=0.7)
