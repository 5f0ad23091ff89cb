"""Which prompts change at their beginning. A turn is the list of its messages."""

import pytest

from fleet_worker.node.prompt_cache.conversations import HELPERS, LAST, REMEMBERED, Conversations
from fleet_worker.protocol.prompt_prefixes import PromptPrefixes

TOOLS = "tools"


def prompt(*messages, conversation=None, session=None, opening=3):
    """With a conversation, the first `opening` messages are those up to the first answer."""
    chain = tuple((str(messages[:number]), number * 100) for number in range(1, len(messages) + 1))
    return PromptPrefixes(session, conversation, chain, str(messages[:opening]) if conversation else None)


@pytest.fixture
def conversations():
    return Conversations()


@pytest.mark.parametrize("ids", [{"conversation": "c"}, {"session": "s"}, {"conversation": "c", "session": "s"}])
def test_a_conversation_that_only_grows_does_not_change(conversations, ids):
    messages = ["system", "hello", "hi"]
    assert conversations.changes(prompt(*messages, "more", **ids)) is None
    for number in range(10):
        messages += [f"question {number}", f"answer {number}"]
        assert conversations.changes(prompt(*messages, "more", **ids)) is False


@pytest.mark.parametrize("before", [(), (TOOLS,), (TOOLS, "long", "rules")], ids=len)
@pytest.mark.parametrize("session", [None, "s"])
def test_a_time_stamp_before_the_first_question_is_seen(conversations, before, session):
    def turn(hour):
        ids = {"conversation": "c", "session": session, "opening": len(before) + 3}
        return prompt(*before, f"It is {hour} h", "hello", *["hi", "and?"] * hour, **ids)

    assert [conversations.changes(turn(hour)) for hour in range(1, 6)] == [None, True, True, True, True]


def test_conversations_with_the_same_first_question_and_answer_are_not_one_that_changes(conversations):
    """Everybody says hello, to applications with prompts of their own."""
    found = []
    for number in range(12):
        for application in ("shop", "school", "bank"):
            said = ["hello", "hi", f"question {number}", f"answer {number}", "thanks"]
            found.append(conversations.changes(prompt(application, *said, conversation="c")))
    assert found == [None, True, True, *[False] * 33]


def test_a_prompt_that_was_edited_now_and_then_does_not_change_in_each_turn(conversations):
    found = []
    for version in range(10):
        for _ in range(3):
            found.append(conversations.changes(prompt(f"version {version}", "hello", "hi", conversation="c")))
    assert not any(found)


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
    assert found == [None, *[False] * (HELPERS - 1), *[True] * (20 - HELPERS)]


def test_nothing_is_known_of_other_requests(conversations):
    assert conversations.changes(PromptPrefixes()) is None
    assert conversations.changes(PromptPrefixes("s", "c")) is None
    for number in range(3):
        assert conversations.changes(prompt(f"It is {number} h")) is None


def test_it_remembers_the_last_ones_only(conversations):
    for number in range(REMEMBERED + 1):
        conversations.changes(prompt("a", conversation=f"c{number}"))
    assert conversations.changes(prompt("b", conversation="c0")) is None
    assert conversations.changes(prompt("b", conversation=f"c{REMEMBERED}")) is True
    assert len(conversations._seen) == REMEMBERED
    for number in range(100):
        conversations.changes(prompt(f"{number}", conversation="c"))
    assert len(conversations._seen[None, "c"].beginnings) == LAST
