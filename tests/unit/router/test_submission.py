"""What a caller says of prompt caches, and of waiting, is checked before anything is sent."""

import math

import pytest

from fleet_worker.errors import InvalidRequest
from fleet_worker.router.submission import Submission
from fleet_worker.settings import Settings

SETTINGS = Settings(broker_url="redis://127.0.0.1:1/0", host="mini")


def asked(**options):
    return Submission.of(SETTINGS, "chat", "m", {"messages": [{"role": "user", "content": "Hi"}]}, None, options)


@pytest.mark.parametrize("value", ["", "x" * 1_001, 3, True, [], {}, b"x", "half an emoji \ud83d"])
@pytest.mark.parametrize("option", ["session", "cache_scope"])
def test_what_is_no_name_is_refused(option, value):
    with pytest.raises(InvalidRequest) as refused:
        asked(**{option: value})
    assert refused.value.metadata["param"] == option


def test_a_caller_who_says_how_long_a_request_waits_is_believed():
    assert asked().absent_timeout == SETTINGS.router.absent_timeout == 120.0
    assert asked(queue_timeout=7.0).absent_timeout == math.inf


@pytest.mark.parametrize("value", ["false", "no", 0, 1, None, []])
def test_whether_a_prompt_may_be_kept_is_never_guessed(value):
    with pytest.raises(InvalidRequest) as refused:
        asked(keep_warm=value)
    assert refused.value.metadata["param"] == "keep_warm"


@pytest.mark.parametrize(
    ("name", "meant"), [("sesion", "session"), ("cache_scpe", "cache_scope"), ("keepwarm", "keep_warm")]
)
def test_a_mistyped_option_is_told_with_the_one_that_is_meant(name, meant):
    with pytest.raises(InvalidRequest, match=f"the nearest that exists is {meant}$") as refused:
        asked(**{name: "x"})
    assert refused.value.param == name
    with pytest.raises(InvalidRequest, match=f"the nearest that exists is {meant}$"):
        Submission.of(SETTINGS, "chat", "m", {}, {"messages": []}, {name: "x"})


def test_a_mistyped_field_is_not_taken_for_an_option():
    with pytest.raises(InvalidRequest, match="max_token: unknown field, the nearest that exists is max_tokens"):
        asked(max_token=3)
    with pytest.raises(
        InvalidRequest, match="max_token: is no option of the router: with a body, it belongs into that"
    ):
        Submission.of(SETTINGS, "chat", "m", {}, {"messages": []}, {"max_token": 3})


@pytest.mark.parametrize("value", [None, 3, True, "", [], {}, "x" * 1_001])
def test_a_prompt_cache_key_that_is_no_name_counts_as_none(value):
    assert asked(prompt_cache_key=value).cache.session is None


def test_no_repr_shows_the_names_that_a_caller_has_given():
    shown = repr(asked(session="alice-7", cache_scope="team-3"))
    assert "alice-7" not in shown
    assert "team-3" not in shown
