"""What tells a node that the beginning of a conversation has changed."""

import pytest

from fleet_worker.router.affinity.prefixes import prefixes_of
from tests.envelopes import decode, envelope

TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
ANSWER, MORE = {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And?"}


def ids(*messages, model="m", **params):
    """The ids of the conversation and of its opening."""
    request = decode(envelope(operation="chat", model=model, params={"messages": list(messages), **params}))
    found = prefixes_of(request, b"key")
    return found.conversation, found.opening


def test_a_first_turn_has_none():
    for messages in ([QUESTION], [SYSTEM, QUESTION], [SYSTEM, ANSWER, QUESTION], [SYSTEM]):
        assert ids(*messages) == (None, None)


@pytest.mark.parametrize("params", [{}, {"tools": [TOOL]}, {"reasoning_effort": "low"}])
def test_both_stay_the_same_when_a_conversation_grows(params):
    said = [SYSTEM, QUESTION, ANSWER, MORE]
    first = ids(*said, **params)
    assert first == ids(*said, ANSWER, MORE, **params)
    assert None not in first
    assert len(set(first)) == 2


@pytest.mark.parametrize(
    "changed",
    [
        ids({"role": "system", "content": "Be brief. It is noon."}, QUESTION, ANSWER, MORE),
        ids(QUESTION, ANSWER, MORE),
        ids(SYSTEM, QUESTION, ANSWER, MORE, tools=[TOOL]),
        ids(SYSTEM, QUESTION, ANSWER, MORE, reasoning_effort="low"),
    ],
    ids=["system", "no system", "tools", "effort"],
)
def test_only_the_opening_changes_with_what_is_before_the_first_question(changed):
    conversation, opening = ids(SYSTEM, QUESTION, ANSWER, MORE)
    assert changed[0] == conversation
    assert changed[1] not in (None, opening)


def test_another_question_or_answer_or_model_is_another_conversation():
    conversations = {
        ids(SYSTEM, QUESTION, ANSWER, MORE),
        ids(SYSTEM, MORE, ANSWER, MORE),
        ids(SYSTEM, QUESTION, {"role": "assistant", "content": "Good day"}, MORE),
        ids(SYSTEM, QUESTION, ANSWER, MORE, model="n"),
    }
    assert len({conversation for conversation, _ in conversations}) == 4
