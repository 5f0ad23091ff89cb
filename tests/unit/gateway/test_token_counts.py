"""How many tokens a prompt has, about."""

import pytest

from fleet_worker.gateway.token_counts import counted_tokens, estimated_tokens

PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "' + "x" * 400 + '"}'}}


@pytest.mark.parametrize(
    ("message", "least", "most"),
    [
        ({"role": "user", "content": "a word or two, " * 100}, 300, 500),
        ({"role": "user", "content": "\u5b57" * 400}, 200, 500),
        ({"role": "user", "content": [{"type": "text", "text": "x" * 400}, PIXEL]}, 1000, 1200),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, 80, 130),
    ],
)
def test_an_estimate_is_not_far_off(message, least, most):
    body = {"messages": [message]}
    assert least < estimated_tokens(body) < most
    assert counted_tokens("a model that is not here", body) == estimated_tokens(body)


def test_tools_are_read_by_the_model_too():
    tools = [{"type": "function", "function": {"name": "look", "description": "x" * 4000}}]
    plain = {"messages": [{"role": "user", "content": "hi"}]}
    assert 900 < estimated_tokens({**plain, "tools": tools}) - estimated_tokens(plain) < 1200
