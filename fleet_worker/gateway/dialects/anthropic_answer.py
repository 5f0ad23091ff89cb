"""An answer as Anthropic's clients read it: a message of blocks, whole or as a stream of named events."""

from __future__ import annotations

from typing import Any

from fleet_worker.gateway.dialects.anthropic_tools import tool_use_id
from fleet_worker.gateway.dialects.dialect import EVENT_STREAM, finish_reason
from fleet_worker.gateway.dialects.tool_calls import Fragment, ToolCalls, arguments_of
from fleet_worker.gateway.json_text import compact, quoted, server_sent
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta, Usage

_ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""By status. Others are `invalid_request_error` below 500, and else `api_error`."""
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ALWAYS_USED = {
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
    "service_tier": "standard",
}
"""The rest of the usage: clients with strict types miss it."""
_SIGNATURE = "ZmxlZXQtd29ya2Vy"
"""Of all thoughts. Clients send them back only with one, and nothing here reads it."""
_FIELDS_OF_DELTA = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessageWriter:
    """Makes the answer to one request.

    Of a stream, one block is open at a time, in the order in which the model writes: thoughts, text, calls of tools. A
    rest of thoughts that a server sends after a call is not shown: no such block may follow one.
    """

    heartbeat = server_sent({"type": "ping"}, "ping")
    media_type = EVENT_STREAM

    def __init__(self, model: str, request_id: str, *, input_tokens: int, thinking: bool | None) -> None:
        """`input_tokens` is told at the beginning of a stream, when nobody has counted them yet. `thinking`: whether
        thoughts are shown; None shows that there were some."""
        self._model = model
        self._request_id = request_id
        self._input_tokens = input_tokens
        self._thinking = thinking
        self._calls = ToolCalls()
        self._blocks = 0
        """Number of blocks begun."""
        self._open: str | None = None
        """The type of the last block, until it ends."""
        self._before = ""
        """What each delta of the open block begins with."""
        self._blank = ""
        """White space before a text, which may never come: models write some between thoughts and calls."""
        self._block_of_call: dict[int, int] = {}

    def whole(self, response: ChatResponse) -> bytes:
        content: list[dict[str, Any]] = []
        if response.reasoning and self._thinking is not False:
            shown = response.reasoning if self._thinking else ""
            content.append({"type": "thinking", "thinking": shown, "signature": _SIGNATURE})
        if response.content and not response.content.isspace():
            content.append({"type": "text", "text": response.content})
        content += [_tool_use(call, arguments_of(call)) for call in self._calls.whole(response.tool_calls)]
        return compact({**self._message(content, self._usage(response.usage)), **_stop(response)}).encode("ascii")

    def begin(self) -> bytes:
        usage = _usage(self._input_tokens, cached=0, output=0)
        message = {**self._message([], usage), "stop_reason": None, "stop_sequence": None}
        return server_sent({"type": "message_start", "message": message}, "message_start") + self.heartbeat

    def deltas(self, deltas: list[Delta]) -> bytes:
        return "".join(map(self._of_delta, deltas)).encode("ascii")

    def end(self, response: ChatResponse) -> bytes:
        ending = {"type": "message_delta", "delta": _stop(response), "usage": self._usage(response.usage)}
        last = server_sent(ending, "message_delta") + server_sent({"type": "message_stop"}, "message_stop")
        return self._closed().encode("ascii") + last

    def failed(self, problem: Problem) -> bytes:
        return server_sent(error_object(problem, self._request_id), "error")

    def _of_delta(self, delta: Delta) -> str:
        events = ""
        if delta.reasoning and self._thinking is not False and not self._calls:
            events += self._thought(delta.reasoning)
        if delta.content:
            events += self._text(delta.content)
        if delta.tool_calls:
            events += "".join(map(self._call, self._calls.read(delta.tool_calls)))
        return events

    def _thought(self, text: str) -> str:
        begun = "" if self._open == "thinking" else self._begun({"type": "thinking", "thinking": "", "signature": ""})
        return begun + (self._piece(text) if self._thinking else "")

    def _text(self, text: str) -> str:
        if self._open == "text":
            return self._piece(text)
        text = self._blank + text
        if text.isspace():
            self._blank = text
            return ""
        return self._begun({"type": "text", "text": ""}) + self._piece(text)

    def _call(self, piece: Fragment) -> str:
        """Return the events of one fragment. A server that goes on with a call after the next one began is understood:
        clients put pieces together by the number of the block."""
        begun = ""
        if piece.begins:
            self._block_of_call[piece.index] = self._blocks
            begun = self._begun(_tool_use(piece, {}))
        delta = f'{{"type":"input_json_delta","partial_json":{quoted(piece.arguments)}}}'
        at = self._block_of_call[piece.index]
        data = f'{{"type":"content_block_delta","index":{at},"delta":{delta}}}'
        return f"{begun}event: content_block_delta\ndata: {data}\n\n"

    def _piece(self, text: str) -> str:
        return f"{self._before}{quoted(text)}}}}}\n\n"

    def _begun(self, block: dict[str, Any]) -> str:
        """Return the events that end the open block and begin this one."""
        closed, at, kind = self._closed(), self._blocks, block["type"]
        self._open, self._blocks, self._blank = kind, at + 1, ""
        if kind in _FIELDS_OF_DELTA:
            delta, field = _FIELDS_OF_DELTA[kind]
            start = f'"type":"content_block_delta","index":{at},"delta":{{"type":"{delta}","{field}":'
            self._before = f"event: content_block_delta\ndata: {{{start}"
        return closed + _event({"type": "content_block_start", "index": at, "content_block": block})

    def _closed(self) -> str:
        if self._open is None:
            return ""
        at, signed = self._blocks - 1, ""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            signed = _event({"type": "content_block_delta", "index": at, "delta": delta})
        self._open = None
        return signed + _event({"type": "content_block_stop", "index": at})

    def _message(self, content: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._request_id.replace('-', '')}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "usage": {**usage, **_ALWAYS_USED},
        }

    def _usage(self, usage: Usage) -> dict[str, int]:
        """Return the counts of the whole answer. Anthropic counts what was read from the cache apart."""
        prompt = self._input_tokens if usage.prompt_tokens is None else usage.prompt_tokens
        return _usage(prompt, cached=usage.cached_tokens or 0, output=usage.completion_tokens or 0)


def error_object(problem: Problem, request_id: str) -> dict[str, Any]:
    """Return the error as Anthropic writes it, early and late."""
    kind = _ERRORS.get(problem.status) or ("invalid_request_error" if problem.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": problem.message}, "request_id": request_id}


def _usage(prompt: int, *, cached: int, output: int) -> dict[str, int]:
    return {
        "input_tokens": max(0, prompt - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    }


def _stop(response: ChatResponse) -> dict[str, Any]:
    if response.finish_reason == "content_filter":
        details = {"type": "refusal", "category": None, "explanation": None}
        return {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}
    reason = _STOP_REASONS[finish_reason(response)]
    if reason == "end_turn" and response.stop_string:
        return {"stop_reason": "stop_sequence", "stop_sequence": response.stop_string, "stop_details": None}
    return {"stop_reason": reason, "stop_sequence": None, "stop_details": None}


def _tool_use(call: Fragment, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": tool_use_id(call.id), "name": call.name, "input": arguments}


def _event(value: dict[str, Any]) -> str:
    return server_sent(value, value["type"]).decode("ascii")
