"""The prompt of a chat request as the tokens that a chat template renders, and how it goes on with the answer.

A token is a word or a marker. The next turn of a conversation renders to the same tokens,
if it repeats the answer as the message of the assistant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fleet_worker.simulator.prompt_cache import Kind, Tokens, common
from fleet_worker.simulator.refusals import Body

START, END, THINK, THOUGHT, CALL = "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|tool_call|>"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a server prefills.

    `boundaries`: the lengths at which mlx_lm.server 0.32 caches what it has prefilled so far, as what: after the system
    prompt, and before the last token.
    """

    tokens: Tokens
    boundaries: Sequence[tuple[int, Kind]]
    opening: str = ""  # the partial answer, with which `tokens` end

    def answered(self, thoughts: str, content: str, calls: Sequence[Body], *, ended: bool) -> Tokens:
        """Return the prompt with its answer. Without `ended`, the answer was cut: its turn is left open."""
        head = self.tokens[: len(self.tokens) - len(_words(self.opening))]
        reasoning = [*_words(thoughts), THOUGHT] if thoughts else []
        return (*head, *reasoning, *_words(self.opening + content), *_calls(calls), *([END] if ended else []))


def prompt_of(body: Body, *, opening: str | None, thinks: bool) -> Prompt:
    """Render a request: tools, messages, and the beginning of the answer.

    Args:
        opening: the text that the last message, a partial answer, begins the answer with; None: there is none.
        thinks: the template opens the reasoning.
    """
    messages: Sequence[Body] = body["messages"]
    asked = messages if opening is None else messages[:-1]
    tools = [f"{START}tools", *_words(json.dumps(body["tools"])), END] if body.get("tools") else []
    head = [*tools, *_turns(asked), f"{START}assistant", *([THINK] if thinks and opening is None else [])]
    tokens = (*head, *_words(opening or ""))
    last: tuple[int, Kind] = (len(tokens) - 1, "user" if messages[-1].get("role") == "user" else "assistant")
    return Prompt(tokens, [*_system(tools, messages, tokens), last], opening or "")


def _system(tools: Sequence[str], messages: Sequence[Body], tokens: Tokens) -> list[tuple[int, Kind]]:
    """Return where the system prompt ends: what another question to it would share."""
    first = next((at for at, message in enumerate(messages) if message.get("role") != "system"), 0)
    if not first or messages[-1].get("role") != "user":
        return []
    other = (*tools, *_turns([*messages[:first], {"role": "user"}]))
    shared = common(other, tokens)
    return [(shared, "system")] if shared < len(other) else []


def _turns(messages: Sequence[Body]) -> list[str]:
    return [token for message in messages for token in _turn(message)]


def _turn(message: Body) -> list[str]:
    text = _text(message.get("content")).strip()
    return [sys.intern(f"{START}{message.get('role')}"), *_words(text), *_calls(message.get("tool_calls") or ()), END]


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = (part if isinstance(part, Mapping) else {} for part in content)
        return "".join(str(part["text"]) if "text" in part else json.dumps(part) for part in parts)
    return "" if content is None else str(content)


def _calls(calls: Sequence[Body]) -> list[str]:
    return [token for call in calls for token in (CALL, *_words(json.dumps(_function(call))))]


def _function(call: Body) -> Any:
    """The name and arguments of a call. A template gets the arguments as an object, whatever form they came in."""
    function = call.get("function") or {}
    arguments = function.get("arguments")
    with suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return [function.get("name"), arguments]


def _words(text: str) -> list[str]:
    """Split before every space and line end, without a loss. Interned, so that long prompts are compared quickly."""
    return list(map(sys.intern, text.replace("\n", " \n").split(" "))) if text else []
