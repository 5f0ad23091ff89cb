"""How many tokens a prompt has, about, and what is reserved for a request before anybody has counted them."""

import pytest

from fleet_worker.gateway.token_counts import counted_tokens, estimated_tokens, most_generated, quick_estimate

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


def test_a_text_has_about_a_token_for_four_bytes():
    assert quick_estimate({"messages": [{"role": "user", "content": "x" * 4000}]}, 4050) == 1012


def test_an_image_counts_as_one_and_not_by_its_bytes():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    text = {"type": "text", "text": "What is this?"}
    assert 900 < quick_estimate({"messages": [{"role": "user", "content": [text, image]}]}, 1_000_150) < 1100


@pytest.mark.parametrize(
    "body", [{}, {"messages": None}, {"messages": [1, {"content": 5}, {"content": [3, {"type": 1}]}]}, {"input": "x"}]
)
def test_a_body_that_is_not_valid_has_an_estimate_too(body):
    assert quick_estimate(body, 400) == 100


@pytest.mark.parametrize(
    ("body", "most"),
    [
        ({"messages": [], "max_tokens": 5}, 5),
        ({"messages": [], "max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"messages": [], "max_completion_tokens": 1, "max_tokens": 5}, 5),
        ({"messages": [], "max_tokens": -1}, 1000),
        ({"messages": [], "max_tokens": "many"}, 1000),
        ({"input": "x"}, 0),
    ],
)
def test_an_answer_has_as_many_as_are_asked_for(body, most):
    assert most_generated(body) == most
