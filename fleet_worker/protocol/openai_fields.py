"""What clients put into a body of OpenAI that is changed before it is checked: dropped where it makes no difference to
an answer of this fleet, or replaced by what means the same here. Everything else is checked as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

_NO_EFFECT = {
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "verbosity",
}
"""Dropped, whatever their value: they say how OpenAI stores, bills or hurries an answer, how long it is likely to be,
and what its stream ends with (here always with the usage)."""
_NO_EFFECT_IF: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((False,), "answers come without log probabilities: leave it out"),
    "top_logprobs": ((0,), "answers come without log probabilities: leave it out"),
    "modalities": ((["text"],), "answers are text: leave it out"),
    "functions": (([],), "OpenAI replaced it: use tools"),
    "function_call": (("none",), "OpenAI replaced it: use tool_choice"),
    "audio": ((), "answers are text: leave it out"),
    "web_search_options": ((), "nothing here searches the web: leave it out"),
    "stream": ((False,), "call stream_chat for a stream, and leave it out"),
}
"""Dropped with one of these values, refused with any other: then the text tells what to do."""
_UNSET: dict[str, Callable[[int], bool]] = {
    "max_tokens": lambda number: number <= 0,
    "max_completion_tokens": lambda number: number <= 0,
    "seed": lambda number: number < 0,
    "top_k": lambda number: number == -1,
}
"""Integers that mean the same as nothing."""
_EFFORTS = {"xhigh": "high", "max": "high"}


def prepared_chat(body: Any) -> Any:
    """Return the body of a chat without what has no effect.

    Clients of llama.cpp, LM Studio and Ollama send `max_tokens` -1 or 0 for no limit, and a `seed` below 0 for any;
    vLLM takes `top_k` -1 for no limit.
    """
    if not isinstance(body, dict):
        return body
    body = _without_effect(body)
    for name, is_unset in _UNSET.items():
        if isinstance(given := body.get(name), int) and not isinstance(given, bool) and is_unset(given):
            del body[name]
    if isinstance(tools := body.get("tools"), list):
        body["tools"] = [_without(tool, "cache_control") for tool in tools]
    return body


def prepared_embedding(body: Any) -> Any:
    """Return the body of an embedding without `encoding_format`: a reply holds its vectors in both forms."""
    if not isinstance(body, dict):
        return body
    given = body.get("encoding_format", "float")
    if given not in ("float", "base64"):
        raise refused("encoding_format", "must be 'float' or 'base64'; a reply has its vectors in both forms")
    return {name: value for name, value in body.items() if name not in ("encoding_format", *_NO_EFFECT)}


def prepared_message(message: Any) -> Any:
    """Return a message without what an answer may have empty, and with a refusal as the text that it is."""
    if not isinstance(message, dict):
        return message
    message = dict(message)
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if message.get("content") is None and isinstance(message.get("refusal"), str):
        message["content"] = message["refusal"]
    if isinstance(parts := message.get("content"), list):
        message["content"] = [_as_text(part) for part in parts]
    return message


def known_effort(effort: str) -> str:
    """Return the effort that servers and chat templates know: OpenAI's higher ones are `high`."""
    return _EFFORTS.get(effort, effort)


def refused(name: str, reason: str) -> ValidationError:
    """Return the error of one field of an object, for a validator of that object to raise."""
    fault = InitErrorDetails(type=PydanticCustomError("unsupported", reason), loc=(name,), input=None)
    return ValidationError.from_exception_data("body", [fault])


def _without_effect(body: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in body.items():
        harmless, way_out = _NO_EFFECT_IF.get(name, ((), ""))
        if name in _NO_EFFECT or any(type(value) is type(each) and value == each for each in harmless):
            continue
        if way_out and value is not None:
            raise refused(name, f"is not supported: {way_out}")
        kept[name] = value
    return kept


def _as_text(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


def _without(value: Any, name: str) -> Any:
    return {key: part for key, part in value.items() if key != name} if isinstance(value, dict) else value
