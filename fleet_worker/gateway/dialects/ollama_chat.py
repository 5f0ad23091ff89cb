"""`/api/chat`: Ollama's chats. Its parts: `ollama_request`, `ollama_fields` and, for the other direction,
`ollama_answer`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fleet_worker.gateway.dialects.chat_fields import tool_call
from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import ChatAsked, LoadAsked
from fleet_worker.gateway.dialects.ollama_answer import AnswerWriter, problem_body
from fleet_worker.gateway.dialects.ollama_fields import content, fields, unloads
from fleet_worker.gateway.dialects.ollama_request import WAYS_OUT, ChatRequest, Message, ToolCall

__all__ = ["asked", "problem_body"]


def asked(body: dict[str, Any], request_id: str, created: int) -> ChatAsked | LoadAsked:
    given = read(ChatRequest, body, WAYS_OUT)
    writer = AnswerWriter(given.model, created, "message", thinks=given.think is not False)
    if not given.messages:
        return LoadAsked(given.model, writer.loaded("unload" if unloads(given) else "load"))
    tools = {"tools": [{"type": "function", **tool} for tool in given.tools]} if given.tools else {}
    return ChatAsked(
        given.model, {"messages": _messages(given.messages), **tools, **fields(given)}, given.stream, writer
    )


def _messages(given: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages of OpenAI. A result of a tool belongs to the first call of that name that has none yet."""
    messages: list[dict[str, Any]] = []
    open_calls: list[dict[str, Any]] = []
    for message in given:
        said: dict[str, Any] = {"role": message.role, "content": content(message.content or "", message.images or ())}
        if message.role == "tool":
            said["tool_call_id"] = message.tool_call_id or _taken(open_calls, message.tool_name or message.name)
        if message.tool_calls:
            made = sum(len(each.get("tool_calls", ())) for each in messages)
            open_calls = [_call(call, made + at) for at, call in enumerate(message.tool_calls)]
            said["tool_calls"] = [*open_calls]
        messages.append(said)
    return messages


def _taken(open_calls: list[dict[str, Any]], name: str | None) -> str:
    """Remove a call and return its id: the first one of that name, or else the first."""
    if not open_calls:
        return "call_unknown"
    call = next((call for call in open_calls if call["function"]["name"] == name), open_calls[0])
    open_calls.remove(call)
    call_id: str = call["id"]
    return call_id


def _call(call: ToolCall, number: int) -> dict[str, Any]:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return tool_call(call.id or f"call_{number}", call.function.name, text)
