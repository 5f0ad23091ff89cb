"""`/api/generate`: Ollama's answers to one prompt. It is sent as a chat with one message."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.chat_fields import NO_SUFFIX
from fleet_worker.gateway.dialects.client_body import read
from fleet_worker.gateway.dialects.dialect import ChatAsked, LoadAsked, refused
from fleet_worker.gateway.dialects.ollama_answer import AnswerWriter, problem_body
from fleet_worker.gateway.dialects.ollama_fields import content, fields, unloads
from fleet_worker.gateway.dialects.ollama_request import WAYS_OUT, GenerateRequest

__all__ = ["asked", "problem_body"]

_REFUSED = {
    "suffix": NO_SUFFIX,
    "template": "the chat template of the model is used: leave it out",
    "context": "token ids have another meaning for each model: send the conversation to /api/chat",
    "raw": "the chat template of the model is always used: leave it out",
}
"""Refused, unless they are empty."""


def asked(body: dict[str, Any], request_id: str, created: int) -> ChatAsked | LoadAsked:
    given = read(GenerateRequest, body, WAYS_OUT)
    for name, way_out in _REFUSED.items():
        if getattr(given, name):
            raise refused(name, way_out)
    writer = AnswerWriter(given.model, created, "response", thinks=given.think is not False)
    if not given.prompt and not given.images:
        return LoadAsked(given.model, writer.loaded("unload" if unloads(given) else "load"))
    system = [{"role": "system", "content": given.system}] if given.system else []
    messages = [*system, {"role": "user", "content": content(given.prompt, given.images)}]
    return ChatAsked(given.model, {"messages": messages, **fields(given)}, given.stream, writer)
