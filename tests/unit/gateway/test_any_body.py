# ruff: noqa: E501 - a body is easier to read in long lines
"""Bodies of all shapes: what is wrong is refused as the client's mistake, in each API, before anything is sent."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker import FleetError, Settings
from fleet_worker.gateway.dialects import (
    anthropic_count,
    anthropic_messages,
    ollama_chat,
    ollama_embed,
    ollama_embeddings,
    ollama_generate,
    openai_completions,
    openai_embeddings,
    openai_responses,
)
from fleet_worker.gateway.dialects.dialect import ChatAsked, CountAsked, EmbedAsked
from fleet_worker.gateway.dialects.openai_chat import OpenAIChat
from fleet_worker.gateway.http.request import parsed
from fleet_worker.gateway.problems import Refused
from fleet_worker.gateway.token_counts import estimated_tokens, most_generated, quick_estimate
from fleet_worker.router.submission import Submission

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"
TOOL = {"name": "look", "description": "d", "parameters": {"type": "object", "properties": {}}}
IMAGE = "data:image/png;base64,AAAA"
VALID = {
    OpenAIChat(): {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": IMAGE}}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ],
        "tools": [{"type": "function", "function": TOOL}],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        "stop": ["x"],
        "max_tokens": 3,
        "temperature": 0.5,
        "logit_bias": {"1": 2},
        "metadata": {"a": "b"},
    },
    openai_completions: {"model": "m", "prompt": "p", "max_tokens": 3, "stop": "x", "stream": False},
    openai_embeddings: {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 3},
    openai_responses: {
        "model": "m",
        "instructions": "i",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
            {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]},
            {"type": "reasoning", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "r"},
        ],
        "tools": [{"type": "function", **TOOL}, {"type": "web_search"}],
        "tool_choice": "auto",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "reasoning": {"effort": "low"},
        "store": False,
        "stream": True,
        "max_output_tokens": 3,
    },
    anthropic_messages: {
        "model": "m",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "tool_use", "id": "c", "name": "look", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}]}]},
        ],
        "tools": [{"name": "look", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "look"},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["x"],
        "metadata": {"user_id": "u"},
        "stream": True,
    },
    anthropic_count: {"model": "m", "system": "s", "messages": [{"role": "user", "content": "a"}]},
    ollama_chat: {
        "model": "m",
        "messages": [{"role": "user", "content": "a", "images": ["iVBORw0KGgo="]}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}],
        "tools": [{"type": "function", "function": TOOL}],
        "options": {"num_predict": 3, "temperature": 0.1, "stop": ["x"]},
        "format": {"type": "object"},
        "think": True,
        "keep_alive": "5m",
    },
    ollama_generate: {"model": "m", "prompt": "p", "system": "s", "images": ["iVBORw0KGgo="], "options": {"seed": 1}, "raw": False},
    ollama_embed: {"model": "m", "input": ["a"], "truncate": True},
    ollama_embeddings: {"model": "m", "prompt": "a"},
}  # fmt: skip
"""By dialect: a body with a bit of everything."""
NAMES = [getattr(dialect, "__name__", type(dialect).__name__).rpartition(".")[2] for dialect in VALID]

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
anything = st.recursive(
    scalars,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """The paths of all parts of a body."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


@st.composite
def broken(draw, body):
    """A body of which one part is anything else, or missing."""
    changed = json.loads(json.dumps(body))
    *way, last = draw(st.sampled_from([path for path in places(body) if path]))
    place = changed
    for key in way:
        place = place[key]
    if isinstance(place, dict) and draw(st.booleans()):
        del place[last]
    else:
        place[last] = draw(anything)
    return changed


def submit(dialect, body):
    """Take a body as far as the router does before it sends anything."""
    content = json.dumps(body).encode()
    asked = dialect.asked(parsed(content), ID, 1)
    if isinstance(asked, ChatAsked | EmbedAsked):
        assert quick_estimate(asked.body, len(content)) + most_generated(asked.body) >= 0
        operation = "stream_chat" if isinstance(asked, ChatAsked) else "embed"
        Submission.of(Settings(), operation, asked.model, {}, asked.body, {})
    if isinstance(asked, CountAsked):
        estimated_tokens(asked.body)


@pytest.mark.parametrize("dialect", VALID, ids=NAMES)
def test_a_body_with_a_bit_of_everything_is_accepted(dialect):
    submit(dialect, VALID[dialect])


@pytest.mark.parametrize("dialect", VALID, ids=NAMES)
@given(data=st.data())
def test_a_body_that_is_wrong_anywhere_is_refused_as_such(dialect, data):
    try:
        submit(dialect, data.draw(broken(VALID[dialect])))
    except (FleetError, Refused) as error:
        status = getattr(error, "problem", None)
        assert status is None or status.status == 400
