"""What a key allows."""

import pytest

from fleet_worker.gateway.accounts.key import Key


def key(**fields):
    return Key(name="alice", **fields)


@pytest.mark.parametrize(
    ("models", "asked", "allowed"),
    [
        (["*"], "anything/at-all", True),
        (["qwen3-*"], "qwen3-14b", True),
        (["qwen3-*"], "Qwen3-14b", False),
        (["qwen3-*"], "llama", False),
        (["a", "b"], "b", True),
        (["mlx-community/*"], "mlx-community/x/y", True),
        (["odd[1]"], "odd[1]", True),
        ([], "x", False),
        ("qwen3-*", "qwen3-14b", True),
    ],
)
def test_models_are_named_or_globs(models, asked, allowed):
    assert key(models=models).allows(asked) == allowed
    assert key(models=models).models_for(asked) == ([asked] if allowed else [])


def test_an_alias_stands_for_a_model_or_for_several():
    alice = key(models=[], aliases={"gpt-4o": "large", "claude-*": ["large", "small"], "claude-haiku": "small"})
    assert alice.models_for("gpt-4o") == ["large"]
    assert alice.models_for("claude-opus-4") == ["large", "small"]
    assert alice.models_for("claude-haiku") == ["small"]
    assert alice.models_for("large") == []


def test_the_first_glob_counts():
    assert key(aliases={"a*": "first", "ab*": "second"}).models_for("abc") == ["first"]


def test_fallbacks_follow_the_first_choices_once():
    alice = key(aliases={"x": ["a", "b"]}, fallbacks={"a": ["c", "b", "a"], "c": "d"})
    assert alice.models_for("a") == ["a", "c", "b"]
    assert alice.models_for("x") == ["a", "b", "c"]
    assert alice.models_for("c") == ["c", "d"]


def test_no_other_model_answers_unless_it_is_named():
    assert key().models_for("a") == ["a"]


def test_a_client_sees_its_own_models_and_the_aliases_that_work():
    alice = key(models=["a*"], aliases={"gpt": ["z", "b"], "old": "gone", "claude-*": "a1", "a2": "a1"})
    assert alice.visible(["a1", "a2", "b"]) == ["a1", "a2", "gpt"]
    assert key(models=["b"]).visible([]) == []


@pytest.mark.parametrize(
    ("highest", "asked", "given"),
    [
        ("normal", None, "normal"),
        ("normal", "critical", "normal"),
        ("normal", "low", "low"),
        ("critical", None, "normal"),
        ("critical", "high", "high"),
        ("low", None, "low"),
        ("low", "normal", "low"),
    ],
)
def test_no_request_has_a_higher_priority_than_its_key(highest, asked, given):
    assert key(highest_priority=highest).priority(asked) == given


def test_a_key_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        key().rpm = 5
