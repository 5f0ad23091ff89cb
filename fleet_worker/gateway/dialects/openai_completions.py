"""`/v1/completions`: OpenAI's legacy completions. The prompt is sent as a chat with one message, since MLX servers
have the chat templates that their models need."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.chat_fields import NO_LOGPROBS, NO_SUFFIX
from fleet_worker.gateway.dialects.dialect import EVENT_STREAM, ChatAsked, given, refused, take_model, take_switch
from fleet_worker.gateway.dialects.openai_common import (
    DONE,
    HEARTBEAT,
    late_error,
    problem_body,
    take_session,
    take_with_usage,
    usage_object,
)
from fleet_worker.gateway.json_text import compact, quoted
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta

__all__ = ["asked", "problem_body"]

_REFUSED = {
    "echo": "the prompt is not part of the answer: leave it out",
    "logprobs": NO_LOGPROBS,
    "suffix": NO_SUFFIX,
    "messages": "this is a field of chats: send prompt, or send it to /v1/chat/completions",
    "tools": "this is a field of chats: send it to /v1/chat/completions",
    "tool_choice": "this is a field of chats: send it to /v1/chat/completions",
}
"""Refused, unless they ask for nothing."""
_ONE_TEXT = "must be one text: send a request for each of several; token ids have another meaning for each model"


def asked(body: dict[str, Any], request_id: str, created: int) -> ChatAsked:
    body = {name: value for name, value in body.items() if value is not None}
    model, stream = take_model(body), take_switch(body, "stream")
    for name, way_out in _REFUSED.items():
        value = body.pop(name, None)
        if value or (value == 0 and value is not False):
            raise refused(name, way_out)
    for name in ("n", "best_of"):
        if body.pop(name, 1) != 1:
            raise refused(name, "send the request once for each answer")
    writer = CompletionWriter(model, request_id, created, with_usage=take_with_usage(body))
    given(body, "prompt_cache_key", str)
    session = take_session(body)
    body["messages"] = [{"role": "user", "content": _prompt(body.pop("prompt", None))}]
    return ChatAsked(model, body, stream, writer, session)


class CompletionWriter:
    """Makes the answer to one completion. The thoughts of a model are no part of it: there is no field for them."""

    heartbeat = HEARTBEAT
    media_type = EVENT_STREAM

    def __init__(self, model: str, request_id: str, created: int, *, with_usage: bool) -> None:
        self._shared = (
            f'"id":"cmpl-{request_id}","object":"text_completion","created":{created},"model":{quoted(model)}'
        )
        self._with_usage = with_usage
        self._before = f'data: {{{self._shared},"choices":[{{"index":0,"logprobs":null,"text":'
        self._usage = ',"usage":null' if with_usage else ""
        self._after = f',"finish_reason":null}}]{self._usage}}}\n\n'

    def whole(self, response: ChatResponse) -> bytes:
        choice = {"index": 0, "text": response.content or "", "logprobs": None, "finish_reason": _reason(response)}
        rest = compact({"choices": [choice], "usage": usage_object(response.usage)})
        return f"{{{self._shared},{rest[1:]}".encode("ascii")

    def begin(self) -> bytes:
        return b""

    def deltas(self, deltas: list[Delta]) -> bytes:
        texts = (delta.content for delta in deltas if delta.content)
        return "".join(f"{self._before}{quoted(text)}{self._after}" for text in texts).encode("ascii")

    def end(self, response: ChatResponse) -> bytes:
        last = f'{self._before}"","finish_reason":"{_reason(response)}"}}]{self._usage}}}\n\n'
        if self._with_usage:
            last += f'data: {{{self._shared},"choices":[],"usage":{compact(usage_object(response.usage))}}}\n\n'
        return last.encode("ascii") + DONE

    def failed(self, problem: Problem) -> bytes:
        return late_error(problem)


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise refused("prompt", _ONE_TEXT)
    return prompt


def _reason(response: ChatResponse) -> str:
    """Return why the answer ended. OpenAI knows no other reasons here."""
    return response.finish_reason if response.finish_reason in ("length", "content_filter") else "stop"
