"""What clients of Anthropic rely on, over real HTTP, through a real node."""

import anthropic
import pytest

from fleet_worker.simulator import reply_tokens
from fleet_worker.testing import SimulatedMLX
from tests.flow.gateway.conftest import CHAT, EMBED
from tests.gateways import gateway_of

pytestmark = pytest.mark.rest

HELLO = [{"role": "user", "content": "Hello"}]
THOUGHTS = ("The", " sea", ".")
LOOK = {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}


@pytest.fixture(scope="module")
def mlx():
    calls = [{"name": "look", "arguments": {"at": "größer"}}, {"name": "look", "arguments": {}}]
    options = {"reasoning": THOUGHTS, "tool_calls": calls, "token_interval": 0.002}
    with SimulatedMLX(flavour="vllm_batched", models=[CHAT, EMBED], **options) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(mlx):
    """One of its own: the server thinks and calls tools."""
    with gateway_of(mlx) as process:
        yield process


@pytest.fixture
def client(gateway):
    with anthropic.Anthropic(base_url=gateway.url, api_key="any", max_retries=0, timeout=20) as client:
        yield client


def chats(mlx):
    """Return the bodies of what the MLX server was asked for."""
    return [request.body for request in mlx.requests if request.path.endswith("/chat/completions")]


def answer(messages, max_tokens):
    return "".join(reply_tokens(messages, max_tokens))


def test_the_sdk_gets_a_whole_message(client):
    message = client.messages.create(model=CHAT, messages=HELLO, max_tokens=10)
    thinking, text = message.content
    assert (thinking.thinking, text.text) == ("".join(THOUGHTS), answer(HELLO, 7))
    assert (message.stop_reason, message.usage.output_tokens, message.model) == ("max_tokens", 10, CHAT)
    assert message._request_id.replace("-", "") == message.id.removeprefix("msg_")


def test_the_sdk_puts_a_stream_together(client):
    with client.messages.stream(model=CHAT, messages=HELLO, max_tokens=100) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert len(texts) > 1
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert "".join(texts) == message.content[1].text == answer(HELLO, 97)
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", len(reply_tokens(HELLO, 97)) + 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_are_called_and_their_results_answered(client, mlx, streamed):
    asked = {"model": CHAT, "max_tokens": 500, "tools": [LOOK], "thinking": {"type": "disabled"}}
    if streamed:
        with client.messages.stream(messages=HELLO, **asked) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(messages=HELLO, **asked)
    assert message.stop_reason == "tool_use"
    assert [(call.name, call.input) for call in message.content] == [("look", {"at": "größer"}), ("look", {})]
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": call.id} for call in message.content]
    turns = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    assert client.messages.create(messages=turns, **asked).stop_reason == "end_turn"
    _, called, *told = chats(mlx)[-1]["messages"]
    given = [call["id"] for call in called["tool_calls"]]
    assert [message["tool_call_id"] for message in told] == given
    assert [message["content"] for message in told] == [f"toolu_{call_id}" for call_id in given]


def test_tokens_are_counted_without_a_generation(client, mlx):
    before = len(chats(mlx))
    words = [{"role": "user", "content": "a b " * 200}]
    assert 100 < client.messages.count_tokens(model=CHAT, messages=words).input_tokens < 300
    assert len(chats(mlx)) == before


def test_an_unknown_model_and_a_wrong_field_have_errors_of_anthropic(client):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="sim-chatt", messages=HELLO, max_tokens=1)
    assert unknown.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="max_tokens") as wrong:
        client.messages.create(model=CHAT, messages=HELLO, max_tokens=0)
    assert wrong.value.type == "invalid_request_error"
    assert wrong.value.body["request_id"] == wrong.value.request_id


def test_a_base_url_with_v1_is_named_as_the_mistake(client):
    wrong = client.copy(base_url=f"{str(client.base_url).rstrip('/')}/v1")
    with pytest.raises(anthropic.NotFoundError, match="base URL of this client must not end in /v1"):
        wrong.messages.create(model=CHAT, messages=HELLO, max_tokens=1)


def test_models_are_listed_for_the_sdk(client):
    models = list(client.models.list())
    assert [(model.id, model.display_name, model.type) for model in models] == [
        (name, name, "model") for name in (CHAT, EMBED)
    ]
    assert client.models.retrieve(CHAT).id == CHAT
