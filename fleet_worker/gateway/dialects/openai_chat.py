"""`/v1/chat/completions`: OpenAI's chat completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fleet_worker.gateway.dialects import openai_common
from fleet_worker.gateway.dialects.chat_fields import tool_call
from fleet_worker.gateway.dialects.dialect import EVENT_STREAM, ChatAsked, finish_reason, take_model, take_switch
from fleet_worker.gateway.dialects.openai_common import (
    DONE,
    HEARTBEAT,
    late_error,
    take_session,
    take_with_usage,
    usage_object,
)
from fleet_worker.gateway.dialects.tool_calls import Fragment, ToolCalls
from fleet_worker.gateway.json_text import compact, quoted
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta

ReasoningField = Literal["reasoning_content", "reasoning", "both"]


@dataclass(frozen=True, slots=True)
class OpenAIChat:
    """`reasoning_field`: where a model's thoughts are in an answer. OpenAI itself has no field for them."""

    reasoning_field: ReasoningField = "reasoning_content"

    def asked(self, body: dict[str, Any], request_id: str, created: int) -> ChatAsked:
        body = dict(body)
        model, stream = take_model(body), take_switch(body, "stream")
        session = take_session(body)
        writer = ChatWriter(model, request_id, created, self._fields, with_usage=take_with_usage(body))
        return ChatAsked(model, body, stream, writer, session)

    def problem_body(self, problem: Problem, request_id: str) -> bytes:
        return openai_common.problem_body(problem, request_id)

    @property
    def _fields(self) -> tuple[str, ...]:
        return ("reasoning_content", "reasoning") if self.reasoning_field == "both" else (self.reasoning_field,)


class ChatWriter:
    """Makes the answer to one chat completion."""

    heartbeat = HEARTBEAT
    media_type = EVENT_STREAM

    def __init__(
        self, model: str, request_id: str, created: int, reasoning: tuple[str, ...], *, with_usage: bool
    ) -> None:
        self._calls = ToolCalls()
        self._reasoning = reasoning
        self._with_usage = with_usage
        self._shared = f'"id":"chatcmpl-{request_id}","created":{created},"model":{quoted(model)}'
        self._before = f'data: {{{self._shared},"object":"chat.completion.chunk","choices":[{{"index":0,"delta":'
        self._after = ',"finish_reason":null}]' + (',"usage":null' if with_usage else "") + "}\n\n"

    def whole(self, response: ChatResponse) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": response.content, "refusal": None}
        if response.reasoning:
            message |= dict.fromkeys(self._reasoning, response.reasoning)
        if response.tool_calls:
            message["tool_calls"] = [_whole_call(call) for call in self._calls.whole(response.tool_calls)]
        else:
            message["content"] = response.content or ""
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(response)}
        rest = compact({"choices": [choice], "usage": usage_object(response.usage)})
        return f'{{{self._shared},"object":"chat.completion",{rest[1:]}'.encode("ascii")

    def begin(self) -> bytes:
        return self._chunk('{"role":"assistant","content":""}')

    def deltas(self, deltas: list[Delta]) -> bytes:
        return b"".join(map(self._of_delta, deltas))

    def end(self, response: ChatResponse) -> bytes:
        usage = ',"usage":null' if self._with_usage else ""
        last = f'{self._before}{{}},"finish_reason":"{finish_reason(response)}"}}]{usage}}}\n\n'
        if self._with_usage:
            counted = compact(usage_object(response.usage))
            last += f'data: {{{self._shared},"object":"chat.completion.chunk","choices":[],"usage":{counted}}}\n\n'
        return last.encode("ascii") + DONE

    def failed(self, problem: Problem) -> bytes:
        return late_error(problem)

    def _of_delta(self, delta: Delta) -> bytes:
        chunks = []
        if delta.reasoning:
            fields = ",".join(f'"{name}":{quoted(delta.reasoning)}' for name in self._reasoning)
            chunks.append(self._chunk(f"{{{fields}}}"))
        if delta.content:
            chunks.append(self._chunk(f'{{"content":{quoted(delta.content)}}}'))
        if delta.tool_calls:
            pieces = [_piece(each) for each in self._calls.read(delta.tool_calls)]
            chunks += [self._chunk(compact({"tool_calls": [piece]})) for piece in pieces]
        return b"".join(chunks)

    def _chunk(self, delta: str) -> bytes:
        return f"{self._before}{delta}{self._after}".encode("ascii")


def _piece(piece: Fragment) -> dict[str, Any]:
    if not piece.begins:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, **_whole_call(piece)}


def _whole_call(call: Fragment) -> dict[str, Any]:
    return tool_call(call.id, call.name, call.arguments)
