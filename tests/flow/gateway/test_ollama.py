"""What clients of Ollama rely on, over real HTTP, through a real node."""

import ollama
import pytest

from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX
from tests.flow.gateway.conftest import CHAT, EMBED
from tests.gateways import gateway_of

pytestmark = pytest.mark.rest

HELLO = [{"role": "user", "content": "Hello"}]
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def mlx():
    calls = [{"name": "look", "arguments": {"at": "größer"}}]
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], reasoning=["Hm", "."], tool_calls=calls) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(mlx):
    """One of its own: the server thinks and calls tools."""
    with gateway_of(mlx) as process:
        yield process


@pytest.fixture
def client(gateway):
    client = ollama.Client(host=gateway.url, timeout=20)
    with client._client:
        yield client


def chats(mlx):
    """Return the bodies of what the MLX server was asked for."""
    return [request.body for request in mlx.requests if request.path.endswith("/chat/completions")]


def answer(max_tokens):
    return "".join(reply_tokens(HELLO, max_tokens))


@pytest.mark.parametrize("streamed", [True, False])
def test_the_sdk_chats(client, streamed):
    reply = client.chat(CHAT, HELLO, options={"num_predict": 9}, stream=streamed)
    parts = list(reply) if streamed else [reply]
    assert "".join(part.message.content for part in parts) == answer(7)
    assert "".join(part.message.thinking or "" for part in parts) == "Hm."
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 9)
    assert parts[-1].total_duration > 0


def test_the_sdk_generates(client):
    reply = client.generate(CHAT, "Hello", options={"num_predict": 9}, think=False)
    assert (reply.response, reply.done, reply.model) == (answer(7), True, CHAT)


@pytest.mark.parametrize("streamed", [True, False])
def test_tools_are_called_and_their_results_answered(client, mlx, streamed):
    reply = client.chat(CHAT, HELLO, tools=[LOOK], stream=streamed)
    *_, message = [part.message for part in (reply if streamed else [reply]) if part.message.tool_calls]
    assert message.tool_calls[0].function.arguments == {"at": "größer"}
    turns = [*HELLO, message, {"role": "tool", "tool_name": "look", "content": "seen"}]
    assert client.chat(CHAT, turns, tools=[LOOK]).message.content
    *_, called, told = chats(mlx)[-1]["messages"]
    assert told["tool_call_id"] == called["tool_calls"][0]["id"]


def test_embeddings(client, mlx):
    one, two = client.embed(EMBED, ["one", "two"]).embeddings
    assert len(one) == len(two) == 384
    assert client.embeddings(EMBED, "one").embedding == one


def test_models_are_listed_and_shown(client):
    assert [model.model for model in client.list().models] == [CHAT, EMBED]
    assert [model.model for model in client.ps().models] == [CHAT, EMBED]
    assert "completion" in client.show(CHAT).capabilities
    assert "tools" in client.show(f"{CHAT}:latest").capabilities
    assert "embedding" in client.show(EMBED).capabilities
    assert client._client.head("/api/tags").status_code == 200  # so some clients ask whether it is there


def test_a_model_is_loaded_without_a_generation(client, mlx):
    before = len(chats(mlx))
    assert client.generate(CHAT).done_reason == "load"
    assert len(chats(mlx)) == before


def test_errors_are_those_of_ollama(client):
    with pytest.raises(ollama.ResponseError, match="does not exist") as unknown:
        client.chat("nothing", HELLO)
    assert unknown.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        client.show("nothing")
    with pytest.raises(ollama.ResponseError, match="no such thing"):
        client.pull("nothing")
    with pytest.raises(ollama.ResponseError, match="suffix"):
        client.generate(CHAT, "x", suffix="y")
