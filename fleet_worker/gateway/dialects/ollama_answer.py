"""An answer as Ollama's clients read it: one JSON object, or a line of JSON for each piece."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from fleet_worker.gateway.dialects.tool_calls import Fragment, ToolCalls, arguments_of
from fleet_worker.gateway.json_text import compact, quoted
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta

Shape = Literal["message", "response"]
"""The field with the text: that of a chat, or that of a generation."""


class AnswerWriter:
    """Makes the answer to one request."""

    media_type = b"application/x-ndjson"

    def __init__(self, model: str, created: int, shape: Shape, *, thinks: bool) -> None:
        """`thinks`: whether thoughts are shown."""
        self._shape = shape
        self._thinks = thinks
        self._calls = ToolCalls()
        at = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._shared = f'{{"model":{quoted(model)},"created_at":"{at}",'
        is_chat = shape == "message"
        self._before = self._shared + ('"message":{"role":"assistant","content":' if is_chat else '"response":')
        self._after = ("}" if is_chat else "") + ',"done":false}\n'

    @property
    def heartbeat(self) -> bytes:
        """An empty piece: clients know no other line."""
        return self._piece(quoted("")).encode("ascii")

    def whole(self, response: ChatResponse) -> bytes:
        thinking = {"thinking": response.reasoning} if response.reasoning and self._thinks else {}
        said = self._said(response.content or "", **thinking, **self._called(response))
        return self._object({**said, **_ending(response)})

    def begin(self) -> bytes:
        return b""

    def deltas(self, deltas: list[Delta]) -> bytes:
        return "".join(map(self._of_delta, deltas)).encode("ascii")

    def end(self, response: ChatResponse) -> bytes:
        """Return the last lines. Calls of tools are here: clients of Ollama take only whole ones."""
        called = self._called(response)
        calls = self._object({**self._said("", **called), "done": False}) + b"\n" if called else b""
        return calls + self._object({**self._said(""), **_ending(response)}) + b"\n"

    def failed(self, problem: Problem) -> bytes:
        return problem_body(problem, "") + b"\n"

    def loaded(self, reason: Literal["load", "unload"]) -> bytes:
        """Return the answer to a request that only wants the model in memory, or out of it."""
        return self._object({**self._said(""), "done": True, "done_reason": reason})

    def _of_delta(self, delta: Delta) -> str:
        pieces = ""
        if delta.reasoning and self._thinks:
            pieces += self._piece(f'"","thinking":{quoted(delta.reasoning)}')
        if delta.content:
            pieces += self._piece(quoted(delta.content))
        return pieces

    def _piece(self, text: str) -> str:
        return f"{self._before}{text}{self._after}"

    def _said(self, text: str, **more: Any) -> dict[str, Any]:
        if self._shape == "message":
            return {"message": {"role": "assistant", "content": text, **more}}
        return {"response": text, **more}

    def _called(self, response: ChatResponse) -> dict[str, Any]:
        calls = [_call(call) for call in self._calls.whole(response.tool_calls)]
        return {"tool_calls": calls} if calls else {}

    def _object(self, rest: dict[str, Any]) -> bytes:
        return f"{self._shared}{compact(rest)[1:]}".encode("ascii")


def problem_body(problem: Problem, request_id: str) -> bytes:
    return compact({"error": problem.message}).encode("ascii")


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _ending(response: ChatResponse) -> dict[str, Any]:
    """Return how it ended. The time to load the model is that until a node took the request."""
    timings, usage = response.timings, response.usage
    prompt = timings.ttft or 0.0
    return {
        "done": True,
        "done_reason": "length" if response.finish_reason == "length" else "stop",
        "total_duration": nanoseconds(timings.queue_wait + timings.duration),
        "load_duration": nanoseconds(timings.queue_wait),
        "prompt_eval_count": usage.prompt_tokens or 0,
        "prompt_eval_duration": nanoseconds(prompt),
        "eval_count": usage.completion_tokens or 0,
        "eval_duration": max(1, nanoseconds(timings.duration - prompt)),  # clients divide by it
    }


def _call(call: Fragment) -> dict[str, Any]:
    return {"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": arguments_of(call)}}
