"""Parts of an OpenAI chat into which several dialects translate, and why some of theirs are refused."""

from __future__ import annotations

from typing import Any

NO_LOGPROBS = "answers come without log probabilities: leave it out"
NO_SUFFIX = "models here write on, they do not fill gaps: put prefix and suffix into the prompt"


def tool_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return a call of a function. `arguments` are JSON, as the model wrote them."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the field with which an answer follows a JSON schema."""
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def thinking_switch(enabled: bool) -> dict[str, Any]:
    """Return the field that turns a model's thoughts on or off."""
    return {"chat_template_kwargs": {"enable_thinking": enabled}}
