"""What is reserved for a request, before anybody has counted its tokens."""

import pytest

from fleet_worker.gateway.token_counts import most_generated, quick_estimate


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
