"""The ids of the beginnings of prompts: equal beginnings have equal ids, and nothing else has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_worker.protocol.prompt_prefixes import MOST_PREFIXES, PromptPrefixes
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.affinity.prefixes import STEP, fleet_key, prefixes_of
from tests.envelopes import IMAGE, envelope, tool

KEY = b"key"
SYSTEM = {"role": "system", "content": "You are brief."}
ASKED, ANSWERED, AGAIN = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And now?"},
)


def _prefixes(*messages: dict[str, Any], key: bytes = KEY, model: str = "m", **rest: Any) -> PromptPrefixes:
    session, scope = rest.pop("session", None), rest.pop("scope", None)
    params = {"messages": list(messages), **rest}
    return prefixes_of(FleetRequest.build(envelope(model=model, params=params)), key, session, scope)


def _shared(one: PromptPrefixes, other: PromptPrefixes) -> int:
    """Return how many bytes of the second prompt a server has that was asked the first."""
    held = {id_ for id_, _ in one.chain}
    return next((length for id_, length in reversed(other.chain) if id_ in held), 0)


def test_a_following_turn_begins_with_the_whole_prompt_and_its_answer() -> None:
    """All but its last message is cached."""
    first = _prefixes(SYSTEM, ASKED)
    second = _prefixes(SYSTEM, ASKED, ANSWERED, AGAIN)
    assert len(second.chain) == 3
    assert first.chain[0] == second.chain[0]
    assert second.size - _shared(first, second) == _prefixes(AGAIN).size
    assert second.chain[1][0] == first.chain[1][0]


def test_what_differs_at_the_beginning_shares_nothing() -> None:
    assert not _shared(_prefixes(SYSTEM, ASKED), _prefixes({"role": "system", "content": "12:01"}, ASKED))


def test_what_differs_at_the_end_shares_its_beginning() -> None:
    asked, other = _prefixes(SYSTEM, ASKED), _prefixes(SYSTEM, AGAIN)
    assert _shared(asked, other) == _prefixes(SYSTEM).size


def test_long_messages_part_inside() -> None:
    document = "x" * (5 * STEP)
    one, other = (_prefixes({"role": "user", "content": document + question}) for question in ("Who?", "Why?"))
    assert len(one.chain) == 6
    assert _shared(one, other) == 5 * STEP


@pytest.mark.parametrize(
    "other",
    [
        {"key": b"other"},
        {"model": "m2"},
        {"scope": "team-1"},
        {"tools": [tool({"type": "object"})]},
        {"reasoning_effort": "high"},
        {"chat_template_kwargs": {"reasoning_effort": "high"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_prompts_of_the_same_messages_share_nothing(other: dict[str, Any]) -> None:
    ids = {id_ for id_, _ in _prefixes(SYSTEM, ASKED, session="s").chain}
    assert ids.isdisjoint(id_ for id_, _ in _prefixes(SYSTEM, ASKED, session="s", **other).chain)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (ASKED, {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}),
        (ASKED, {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}),
        (SYSTEM, {**SYSTEM, "role": "developer"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "2", "function": {"name": "f"}}]},
        ),
        ({**AGAIN, "role": "tool", "tool_call_id": "1"}, {**AGAIN, "role": "tool", "tool_call_id": "2"}),
        (ANSWERED, {**ANSWERED, "reasoning_content": "They greet."}),
    ],
    ids=["parts", "two parts", "developer", "ids of calls", "ids of results", "reasoning"],
)
def test_two_forms_of_a_message_are_equal(one: dict[str, Any], same: dict[str, Any]) -> None:
    assert _prefixes(ASKED, one, AGAIN).chain == _prefixes(ASKED, same, AGAIN).chain


def test_calls_and_names_count() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    chains = {_prefixes(ASKED, each, AGAIN).chain for each in (call, {**call, "tool_calls": []}, {**call, "name": "n"})}
    assert len(chains) == 3


def test_an_image_counts_as_four_kilobytes_whatever_it_takes() -> None:
    small, large = (
        _prefixes({"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE + more}}]})
        for more in ("", "A" * 100_000)
    )
    assert 2_500 < small.size == large.size < 5_000
    assert not _shared(small, large)


def test_the_key_of_a_session_is_an_id_of_its_own() -> None:
    one, other = _prefixes(SYSTEM, session="s"), _prefixes(ASKED, session="s")
    assert one.session == other.session is not None
    assert one.session != _prefixes(SYSTEM, session="t").session
    assert one.session != _prefixes(SYSTEM, session="s", scope="team-1").session
    assert _prefixes(SYSTEM).session is None


def test_a_conversation_is_known_by_its_first_question_and_answer() -> None:
    first = _prefixes(SYSTEM, ASKED, ANSWERED, AGAIN)
    assert first.conversation is not None
    assert first.conversation == _prefixes({**SYSTEM, "content": "12:01"}, ASKED, ANSWERED, AGAIN).conversation
    assert first.conversation == _prefixes(SYSTEM, ASKED, ANSWERED, AGAIN, ANSWERED, ASKED).conversation
    assert first.conversation != _prefixes(SYSTEM, AGAIN, ANSWERED, AGAIN).conversation
    assert _prefixes(SYSTEM, ASKED).conversation is None


def test_an_embedding_has_none() -> None:
    request = FleetRequest.build(envelope(operation="embed", params={"input": ["x"]}))
    assert prefixes_of(request, KEY, "s") == PromptPrefixes()


lengths = st.lists(st.integers(1, 9 * STEP), min_size=1, max_size=60)


@given(lengths, st.integers(1, 20))
def test_whatever_the_lengths_a_following_turn_finds_the_one_before(sizes: list[int], more: int) -> None:
    """With many boundaries only some get an id."""
    roles = ("user", "assistant", "tool")
    messages = [{"role": roles[n % 3], "content": f"{n}" + "x" * size} for n, size in enumerate([*sizes, *range(more)])]
    before, after = _prefixes(*messages[: len(sizes)]), _prefixes(*messages)
    assert len(after.chain) <= MOST_PREFIXES
    assert PromptPrefixes.decode(after.encode()) == after
    assert _shared(before, after) >= before.size


def test_a_long_text_that_follows_does_not_hide_the_turn_before() -> None:
    """A tool's result of a megabyte has 250 boundaries."""
    turns = [each for _ in range(15) for each in (ASKED, ANSWERED)]
    before = _prefixes(SYSTEM, *turns, AGAIN)
    after = _prefixes(SYSTEM, *turns, AGAIN, ANSWERED, {"role": "tool", "content": "x" * 1_000_000})
    assert _shared(before, after) >= before.size


def test_two_long_prompts_share_most_of_their_middle() -> None:
    text = "x" * 2_000_000
    one, other = (_prefixes(SYSTEM, {"role": "user", "content": text + end}) for end in ("Who?", "y" * 400_000))
    assert _shared(one, other) > 0.75 * one.size


def test_all_routers_of_a_broker_have_the_same_key() -> None:
    assert fleet_key(None, "redis://:pass%20word@one:6379/0") == fleet_key(None, "amqp://me:pass%20word@two//")
    assert fleet_key(None, "redis://:other@one:6379/0") != fleet_key(None, "redis://:password@one:6379/0")
    assert fleet_key("secret", "redis://:a@one") == fleet_key("secret", "redis://:b@one")
    assert len(fleet_key(None, "redis://localhost")) == 32
