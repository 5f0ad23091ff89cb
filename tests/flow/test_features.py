"""Tool calls, structured output and reasoning travel both ways."""

import json

import pytest

from fleet_worker.errors import UnsupportedParameter
from fleet_worker.testing import SimulatedMLX, running_node
from tests.brokers import any_broker
from tests.flow.conftest import work

pytestmark = any_broker

QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "weather", "arguments": {"city": "Paris", "unit": "°C"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "weather", "schema": {"type": "object"}}}


@pytest.fixture(
    scope="module",
    params=["mlx_lm", *(pytest.param(name, marks=pytest.mark.rest) for name in ("vllm_batched", "mlx_openai"))],
)
def able(request, broker):
    """A server of each kind that thinks, and calls a tool if it is given one."""
    model = f"able-{request.param}"
    with (
        SimulatedMLX(
            flavour=request.param, models=[model], tool_calls=[CALL], reasoning=["Let", " me", " see."], tokens=6
        ) as mlx,
        running_node(broker.url, "able@test", base_url=mlx.base_url, models={model: {}}),
    ):
        yield mlx


@pytest.fixture(scope="module")
def tagging(broker):
    """A server that leaves its reasoning in the text, between tags."""
    with (
        SimulatedMLX(models=["tagging"], reasoning=["Let", " me", " see."], think_tags=True, tokens=6) as mlx,
        running_node(broker.url, "tagging@test", base_url=mlx.base_url, models={"tagging": {}}),
    ):
        yield mlx


def test_a_tool_call_arrives_whole_and_in_pieces(router, able):
    [model] = able.models
    reply = router.chat(model, QUESTION, tools=[TOOL], max_tokens=100, timeout=20)
    with router.stream_chat(model, QUESTION, tools=[TOOL], max_tokens=100, timeout=20) as stream:
        pieces = [delta for delta in stream if delta.tool_calls]
    for response in (reply, stream.response):
        assert response.finish_reason == "tool_calls"
        [call] = response.tool_calls
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == CALL["arguments"]
    assert pieces
    assert work(able)[-1].body["tools"] == [TOOL]


def test_the_answer_to_a_tool_call_goes_back(router, able):
    [model] = able.models
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answer = {"role": "tool", "tool_call_id": "c1", "content": "12 °C"}
    messages = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}, answer]
    router.chat(model, messages, max_tokens=20, timeout=20)
    sent = work(able)[-1].body["messages"]
    assert sent[1]["tool_calls"] == [call]
    assert sent[2] == answer


def test_structured_output_is_asked_for_where_the_server_knows_it(router, able):
    [model] = able.models
    if able.flavour == "mlx_lm":
        with pytest.raises(UnsupportedParameter) as raised:
            router.chat(model, QUESTION, response_format=SCHEMA, max_tokens=20, timeout=20)
        assert raised.value.metadata["param"] == "response_format"
        return
    reply = router.chat(model, QUESTION, response_format=SCHEMA, max_tokens=20, timeout=20)
    assert json.loads(reply.content) == {}
    assert work(able)[-1].body["response_format"] == SCHEMA


def test_a_reply_names_the_parameters_that_had_no_influence(router, able):
    [model] = able.models
    reply = router.chat(model, QUESTION, user="me", seed=7, temperature=0, max_tokens=3, timeout=20)
    assert reply.metadata == {"dropped_parameters": ["user"] if able.flavour == "mlx_lm" else ["user", "seed"]}
    assert router.chat(model, QUESTION, max_tokens=3, timeout=20).metadata == {}


def test_reasoning_is_kept_apart(router, able):
    [model] = able.models
    reply = router.chat(model, QUESTION, max_tokens=50, timeout=20)
    with router.stream_chat(model, QUESTION, max_tokens=50, timeout=20) as stream:
        pieces = list(stream)
    assert reply.reasoning == stream.response.reasoning == "Let me see."
    assert reply.content == stream.response.content
    assert "Let" not in reply.content
    assert "".join(delta.reasoning or "" for delta in pieces) == "Let me see."


def test_reasoning_between_tags_is_kept_apart(router, tagging):
    reply = router.chat("tagging", QUESTION, max_tokens=50, timeout=20)
    with router.stream_chat("tagging", QUESTION, max_tokens=50, timeout=20) as stream:
        visible = "".join(delta.content or "" for delta in stream)
    assert reply.reasoning == stream.response.reasoning == "Let me see."
    assert reply.content == stream.response.content == visible
    assert "think" not in visible
