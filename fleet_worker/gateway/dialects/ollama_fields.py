"""What chats and generations of Ollama have in common, as OpenAI writes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fleet_worker.gateway.dialects.chat_fields import NO_LOGPROBS, schema_format, thinking_switch
from fleet_worker.gateway.dialects.dialect import refused
from fleet_worker.gateway.dialects.ollama_request import Generation, Options

_NAMES = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""Options that OpenAI and MLX servers call otherwise."""


def fields(given: Generation) -> dict[str, Any]:
    """Return all but the messages and tools."""
    if given.logprobs:
        raise refused("logprobs", NO_LOGPROBS)
    return {**_sampling(given.options), **_format(given.format), **_thinking(given.think)}


def content(text: str, images: Sequence[str]) -> str | list[dict[str, Any]]:
    """Return the content of a message. `images` are data URLs."""
    if not images:
        return text
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"type": "text", "text": text}, *shown] if text else shown


def unloads(given: Generation) -> bool:
    """Tell whether the client wants the model out of memory. Here its operator decides that."""
    return given.keep_alive in (0, "0", "0s")


def _sampling(options: Options) -> dict[str, Any]:
    given = options.model_dump(exclude_none=True)
    if not given.get("stop"):
        given.pop("stop", None)
    return {_NAMES.get(name, name): value for name, value in given.items()}


def _format(given: str | dict[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    if isinstance(given, str):
        return {"response_format": {"type": "json_object"}}
    return schema_format(given)


def _thinking(think: bool | str | None) -> dict[str, Any]:
    if isinstance(think, str):
        return {"reasoning_effort": think}
    return {} if think is None else thinking_switch(think)
