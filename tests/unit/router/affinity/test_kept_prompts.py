"""Which prompts a router keeps, and for how long."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from typing import Any

import pytest

from fleet_worker.protocol.openai import ChatParams
from fleet_worker.protocol.request import FleetRequest
from fleet_worker.router.affinity.kept_prompts import KEPT_FOR, LEAST_SIZE, KeptPrompts, memory_of
from fleet_worker.router.affinity.prefixes import prefixes_of
from tests.envelopes import IMAGE, envelope, tool, user

SECRET = "my password is " + "x" * LEAST_SIZE
IDS = itertools.count()


def conversation(text: str, turns: int = 1) -> list[dict[str, Any]]:
    later = ({"role": role, "content": f"{role} {n}"} for n in range(1, turns) for role in ("assistant", "user"))
    return [user(text), *later]


class Kept(KeptPrompts):
    """What a test keeps is asked for and answered now, by `local@a` unless it says otherwise."""

    def __init__(self, most_bytes: int = 10_000_000) -> None:
        super().__init__(most_bytes)
        self.now = 1_000.0

    def chat(
        self, messages: list[dict[str, Any]], node: str = "local@a", session: str | None = None, **body: Any
    ) -> FleetRequest:
        changes = {key: body.pop(key) for key in ("operation", "caller", "priority") if key in body}
        params = {"messages": messages, **body}
        request = FleetRequest.build(envelope(request_id=f"r-{next(IDS)}", params=params, **changes))
        prefixes = prefixes_of(request, b"key", session)
        self.keep(request, prefixes, tokens=prefixes.size // 4, node=node, epoch=1, now=self.now)
        return request

    def texts(self, node: str = "local@a") -> list[str]:
        """The last message of each prompt of this node, the oldest first."""
        kept = sorted(self.answered_by(node), key=lambda prompt: prompt.answered_at)
        params = [prompt.request.params for prompt in kept]
        return [str(each.messages[-1].content)[:20] for each in params if isinstance(each, ChatParams)]


def test_a_later_turn_replaces_the_earlier_one() -> None:
    kept = Kept()
    kept.chat(conversation(SECRET))
    kept.chat(conversation(SECRET, turns=2), node="local@b")
    kept.chat(conversation("another " + SECRET))
    assert (len(kept.texts("local@a")), kept.texts("local@b"), len(kept)) == (1, ["user 1"], 2)


@pytest.mark.parametrize(("session", "expected"), [("s", 1), (None, 2)])
def test_instructions_that_change_do_not_make_a_second_conversation(session: str | None, expected: int) -> None:
    """Without a session, they may be of two people who began with the same words."""
    kept = Kept()
    for date in ("Monday", "Tuesday"):
        kept.chat([{"role": "system", "content": date}, *conversation(SECRET, turns=2)], session=session)
    assert len(kept) == expected


def test_what_only_shapes_the_answer_is_left_off() -> None:
    kept = Kept()
    request = kept.chat(
        conversation(SECRET),
        operation="stream_chat",
        caller={"name": "Ann"},
        priority="high",
        max_tokens=500,
        seed=7,
        stop="END",
        temperature=1.5,
        tools=[tool({})],
        tool_choice="required",
        response_format={"type": "json_object"},
        chat_template_kwargs={"enable_thinking": False},
    )
    (prompt,) = kept.answered_by("local@a")
    assert prompt.request.params.model_dump(exclude_none=True) == {
        **request.params.model_dump(exclude_none=True, include={"messages", "tools", "chat_template_kwargs"}),
        "max_tokens": 1,
        "temperature": 0.0,
    }
    assert (prompt.request.priority, prompt.request.operation, prompt.request.caller) == ("low", "stream_chat", {})
    assert FleetRequest.decode(prompt.request.encode(), max_bytes=10_000_000) == prompt.request


def test_tools_that_a_model_was_not_to_see_are_not_shown_to_it() -> None:
    kept = Kept()
    kept.chat(conversation(SECRET), tools=[tool({})], tool_choice="none")
    (prompt,) = kept.answered_by("local@a")
    assert prompt.request.encode()["params"]["tool_choice"] == "none"


@pytest.mark.parametrize(
    "messages",
    [
        conversation("short"),
        [user([{"type": "text", "text": SECRET}, {"type": "image_url", "image_url": {"url": IMAGE}}])],
    ],
)
def test_what_no_cache_helps_is_not_kept(messages: list[dict[str, Any]]) -> None:
    kept = Kept()
    kept.chat(messages)
    assert len(kept) == 0


def test_the_oldest_go_when_memory_is_full() -> None:
    kept = Kept(most_bytes=50_000)
    for n in range(20):
        kept.now += 1
        kept.chat(conversation(f"{n} {SECRET}"))
    assert 0 < kept.memory <= 50_000
    assert [text.split()[0] for text in kept.texts()] == ["15", "16", "17", "18", "19"]
    kept.chat(conversation("x" * 100_000))
    assert len(kept) == 0
    assert kept.memory == 0


def test_a_prompt_is_kept_for_a_quarter_of_an_hour() -> None:
    kept = Kept()
    kept.chat(conversation("old " + SECRET))
    kept.now += 1
    kept.chat(conversation("new " + SECRET), node="local@b")
    kept.forget_old(kept.now + KEPT_FOR - 1)
    assert (kept.has_any_of("local@a"), kept.has_any_of("local@b")) == (False, True)
    kept.forget_old(kept.now + KEPT_FOR)
    assert (len(kept), kept.memory) == (0, 0)


def test_a_prompt_that_was_replaced_meanwhile_is_not_forgotten() -> None:
    kept = Kept()
    kept.chat(conversation(SECRET))
    (earlier,) = kept.answered_by("local@a")
    kept.chat(conversation(SECRET))
    kept.forget(earlier)
    assert len(kept) == 1
    kept.forget(*kept.answered_by("local@a"))
    assert (len(kept), kept.memory, kept.has_any_of("local@a")) == (0, 0, False)


def test_nothing_of_a_prompt_is_shown() -> None:
    kept = Kept()
    kept.chat(conversation(SECRET), session="my session")
    assert "password" not in repr(kept.answered_by("local@a"))


@pytest.mark.parametrize("text", ["", "x" * 500, "\u4f60" * 500, "\U0001f600" * 100])
def test_memory_is_estimated_as_it_is(text: str) -> None:
    """Within a fifth, whatever the alphabet."""
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        params = ChatParams.model_validate({"messages": [user(f"{n} {text}") for n in range(500)]})
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert memory_of(params) == pytest.approx(taken, rel=0.2)
