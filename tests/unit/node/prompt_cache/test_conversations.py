"""Which prompts change at their beginning. A turn is the list of its messages."""

import pytest

from fleet_worker.node.prompt_cache.conversations import REMEMBERED, USUAL_BEGINNINGS, Conversations
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

TOOLS = "tools"


def prompt(*messages, conversation=None, session=None, size=100):
    chain = tuple((str(messages[:number]), number * size) for number in range(1, len(messages) + 1))
    return PromptPrefixes(session, conversation, chain)


@pytest.fixture
def conversations():
    return Conversations()


@pytest.mark.parametrize("ids", [{"conversation": "c"}, {"session": "s"}, {"conversation": "c", "session": "s"}])
def test_a_conversation_that_only_grows_does_not_change(conversations, ids):
    messages = ["system"]
    assert conversations.changes(prompt(*messages, "hello", **ids)) is None
    for number in range(10):
        messages += [f"question {number}", f"answer {number}"]
        assert conversations.changes(prompt(*messages, "more", **ids)) is False


def test_a_time_stamp_in_the_system_prompt_is_seen_in_each_turn(conversations):
    turns = [prompt(f"It is {hour} h", "hello", *["hi", "and?"] * hour, conversation="c") for hour in range(1, 5)]
    assert [conversations.changes(turn) for turn in turns] == [None, True, True, True]


def test_a_time_stamp_behind_tools_is_seen_once_the_conversation_is_longer(conversations):
    turns = [prompt(TOOLS, f"It is {hour} h", *["hi"] * 2 * hour, conversation="c") for hour in range(1, 5)]
    assert [conversations.changes(turn) for turn in turns] == [None, True, True, True]


def test_an_edited_last_message_is_no_change(conversations):
    said = ["system", "hello", "hi"]
    for last in ("a", "b", "c"):
        changes = conversations.changes(prompt(*said, last, conversation="c", session="s"))
        assert not changes


def test_the_helpers_of_an_agent_may_begin_differently(conversations):
    """They have prompts of their own in one session, some a new one each time they are started."""
    for number in range(40):
        for beginning in ("main", "title", "helper"):
            assert not conversations.changes(prompt(beginning, f"task {number}", session="s"))


def test_a_session_whose_prompts_all_begin_differently_is_seen(conversations):
    """Where the time stamp is in the first message of all, no two turns have the same conversation."""
    found = [
        conversations.changes(prompt(f"It is {hour} h", session="s", conversation=f"c{hour}")) for hour in range(20)
    ]
    assert found == [None, *[False] * (USUAL_BEGINNINGS - 1), *[True] * (20 - USUAL_BEGINNINGS)]


def test_nothing_is_known_of_other_requests(conversations):
    assert conversations.changes(PromptPrefixes()) is None
    assert conversations.changes(PromptPrefixes("s", "c")) is None
    for number in range(3):
        assert conversations.changes(prompt(f"It is {number} h")) is None


def test_it_remembers_the_last_ones_only(conversations):
    for number in range(REMEMBERED + 1):
        conversations.changes(prompt("a", conversation=f"c{number}", session=f"s{number}"))
    assert conversations.changes(prompt("b", conversation="c0", session="s0")) is None
    assert conversations.changes(prompt("b", conversation=f"c{REMEMBERED}")) is True
    assert len(conversations._last) == len(conversations._sessions) == REMEMBERED
