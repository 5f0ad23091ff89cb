"""What clients of older APIs and of other servers call otherwise, in the words of today's OpenAI body.

A field that is given under both names counts as today's says. Values are checked afterwards, as all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Refused = Callable[[str, str], Exception]
"""Makes the error of a field: its name, and the reason."""


def replaced(body: dict[str, Any], refused: Refused) -> dict[str, Any]:
    """Return the body of a chat without the fields in `REPLACED`, and with what they mean."""
    given = {name: body[name] for name in REPLACED if name in body}
    body = {name: value for name, value in body.items() if name not in given}
    for name, value in given.items():
        meant = REPLACED[name](value)
        if meant is None:
            raise refused(name, "is not of the form that it has with other servers: leave it out")
        for field, part in meant.items():
            if field == "chat_template_kwargs" and isinstance(own := body.get(field), dict):
                part = {**part, **own}
            elif field in body:
                continue
            body[field] = part
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = _with_tool_calls(messages)
    return body


def _tools(functions: Any) -> dict[str, Any] | None:
    if not isinstance(functions, list):
        return None
    return {"tools": [{"type": "function", "function": function} for function in functions]}


def _tool_choice(choice: Any) -> dict[str, Any] | None:
    if isinstance(choice, dict):
        return {"tool_choice": {"type": "function", "function": choice}}
    return {"tool_choice": choice} if choice in ("none", "auto") else None


def _max_tokens(number: Any) -> dict[str, Any]:
    return {"max_tokens": number}


def _stop(texts: Any) -> dict[str, Any]:
    return {"stop": texts}


def _penalty(number: Any) -> dict[str, Any]:
    return {"repetition_penalty": number}


def _budget(number: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": {"thinking_budget": number}}


def _thinking(value: Any) -> dict[str, Any] | None:
    """True or false, or `{"type": "enabled"}`: "disabled", or any other type, as "adaptive"."""
    kind = value.get("type") if isinstance(value, dict) else None
    enabled = kind != "disabled" if isinstance(kind, str) else value
    return {"chat_template_kwargs": {"enable_thinking": enabled}} if isinstance(enabled, bool) else None


def _reasoning(value: Any) -> dict[str, Any] | None:
    """`{"effort": "low"}` or `{"enabled": false}`."""
    if not isinstance(value, dict):
        return None
    meant: dict[str, Any] = {}
    if (effort := value.get("effort")) is not None:
        meant["reasoning_effort"] = effort
    if (enabled := value.get("enabled")) is not None:
        meant["chat_template_kwargs"] = {"enable_thinking": enabled}
    return meant


REPLACED: dict[str, Callable[[Any], dict[str, Any] | None]] = {
    "functions": _tools,  # OpenAI until 2023
    "function_call": _tool_choice,
    "max_new_tokens": _max_tokens,  # text-generation-inference
    "max_output_tokens": _max_tokens,  # OpenAI's Responses
    "n_predict": _max_tokens,  # llama.cpp
    "stop_sequences": _stop,  # Anthropic
    "repeat_penalty": _penalty,  # llama.cpp, Ollama
    "reasoning": _reasoning,  # OpenAI's Responses, OpenRouter
    "thinking": _thinking,  # Anthropic, DeepSeek, GLM
    "enable_thinking": _thinking,  # Qwen
    "think": _thinking,  # Ollama
    "thinking_budget": _budget,  # Qwen
}
"""Returns the fields that say the same as this value; None if it has not the form that it has there."""


def _with_tool_calls(messages: list[Any]) -> list[Any]:
    """Replace the `function_call` of an assistant and the answer of the role `function`, which have no ids."""
    replaced, call_id = [], "call_0"
    for at, message in enumerate(messages):
        if isinstance(message, dict) and isinstance(call := message.get("function_call"), dict):
            call_id = f"call_{at}"
            if not message.get("tool_calls"):
                message = {**message, "tool_calls": [{"id": call_id, "type": "function", "function": call}]}
        elif isinstance(message, dict) and message.get("role") == "function":
            message = {**message, "role": "tool", "tool_call_id": call_id}
        replaced.append(message)
    return replaced
