"""What a simulated model answers to one chat request: reasoning, text and tool calls, token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_worker.simulator.chunks import tool_call
from fleet_worker.simulator.machine import Machine
from fleet_worker.simulator.refusals import Body
from fleet_worker.simulator.texts import first_characters, first_of, json_tokens, reply_tokens, whole_tokens, without


@dataclass(frozen=True, slots=True)
class Script:
    """The content of a reply: its tokens, of which the first `thinking` are reasoning, and then tool calls."""

    tokens: Sequence[str]
    thinking: int
    silent: int  # tokens of the tool calls, which are no text
    calls: Sequence[Mapping[str, Any]]
    finish: str


def script_of(machine: Machine, body: Body) -> Script:
    """Write the reply of this machine to a request: always the same one."""
    flavour = machine.behaviour
    limit = flavour.limit(body)
    thoughts = _thoughts(machine, body)
    has_results = body["messages"][-1].get("role") == "tool"
    calls = machine.tool_calls if body.get("tools") and not has_results else ()
    content, natural = ([], 0) if calls else _stopped(machine, body, *_content(machine, body, limit))
    silent = sum(len(json.dumps(call)) // 4 for call in calls)
    cut = len(thoughts) + natural + silent >= limit
    tokens = [*thoughts, *content][: limit - 1 if cut and flavour.drops_last else limit]
    unlimited = "tool_calls" if calls else "stop"
    limited = "length" if flavour.says_length else "stop"
    return Script(
        tokens=tokens,
        thinking=0 if machine.think_tags else min(len(thoughts), len(tokens)),
        silent=min(silent, limit - len(tokens)),
        calls=[] if cut else [tool_call(call, index) for index, call in enumerate(calls)],
        finish=limited if cut else unlimited,
    )


def _thoughts(machine: Machine, body: Body) -> list[str]:
    """The tokens of reasoning. A continued reply has none: they came with its beginning."""
    reasoning = () if machine.behaviour.continues(body) else machine.reasoning
    return ["<think>", *reasoning, "</think>"] if reasoning and machine.think_tags else list(reasoning)


def _content(machine: Machine, body: Body, limit: int) -> tuple[list[str], int]:
    """The visible tokens, as far as the limit allows, and how many there would be without one."""
    flavour, wanted = machine.behaviour, body.get("response_format") or {}
    if wanted.get("type") in flavour.json_formats:
        whole = json_tokens(wanted)
        return whole[:limit], len(whole)
    whole = _reply(machine, body["messages"], limit)
    if not flavour.continues(body):
        return whole, machine.tokens
    *before, partial = body["messages"]
    rest, said = _reply(machine, before, machine.tokens), str(partial.get("content"))
    said = said.rstrip() if flavour.trims_partial else said
    if not "".join(rest).startswith(said):
        return whole, machine.tokens  # this model would not have begun so: continue with any text
    left = len(said)
    while rest and left >= len(rest[0]):
        left -= len(rest.pop(0))
    if rest:
        rest[0] = rest[0][left:] if flavour.keeps_space else rest[0][left:].removeprefix(" ")
    if machine.drift is not None:
        rest[machine.drift :] = reversed(rest[machine.drift :])
    return rest, len(rest)


def _stopped(machine: Machine, body: Body, content: list[str], natural: int) -> tuple[list[str], int]:
    """What a stop string of the request leaves of the content, and how many tokens there would be."""
    stop, manner = body.get("stop") or [], machine.behaviour.stop
    texts = [stop] if isinstance(stop, str) else stop
    if manner == "ignored":
        return content, natural
    ending = texts if manner == "ends" else whole_tokens(content, texts)
    end = first_of(ending, "".join(content))
    if end is not None:
        content = first_characters(content, end)
        return content, len(content)
    return without(content, texts) if manner == "cut" else content, natural


def _reply(machine: Machine, messages: Sequence[Body], limit: int) -> list[str]:
    return reply_tokens(messages, limit, tokens=machine.tokens, separators=machine.separators)
