"""The answer to a Responses request: events, and the response that they build."""

from __future__ import annotations

import time
from typing import Any, Final

from fleet_worker.gateway.dialects.dialect import EVENT_STREAM
from fleet_worker.gateway.dialects.openai_common import DONE, HEARTBEAT
from fleet_worker.gateway.dialects.openai_responses_items import (
    MESSAGE,
    THOUGHTS,
    CallItem,
    Events,
    Status,
    TextForm,
    TextItem,
)
from fleet_worker.gateway.dialects.openai_responses_tools import Tools
from fleet_worker.gateway.dialects.tool_calls import Fragment, ToolCalls
from fleet_worker.gateway.json_text import compact
from fleet_worker.gateway.problems import Problem
from fleet_worker.protocol.reply import ChatResponse, Delta, Usage

_INCOMPLETE: Final = {"length": "max_output_tokens", "content_filter": "content_filter"}
_CODES: Final = {"context_length_exceeded", "insufficient_quota", "rate_limit_exceeded"}
"""Codes that clients know. Codex sends a request that failed with any other but `invalid_prompt` again."""


class ResponsesWriter:
    """Makes the answer to one request. `echo` is what a response repeats of it.

    A stream ends with `DONE`, as the Open Responses specification wants it. OpenAI sends none; its SDKs skip it.
    """

    heartbeat = HEARTBEAT
    media_type = EVENT_STREAM

    def __init__(self, request_id: str, created: int, echo: dict[str, Any], tools: Tools) -> None:
        self._id = request_id.replace("-", "")
        self._constant = f'"id":"resp_{self._id}","object":"response","created_at":{created},{compact(echo)[1:-1]}'
        self._tools = tools
        self._calls = ToolCalls()
        self._events = Events()
        self._count = 0
        """Items that have begun."""
        self._text: TextItem | None = None
        """The one that goes on."""
        self._open: dict[int, CallItem] = {}
        """Calls that go on, by their number among all calls."""
        self._ended: dict[int, str] = {}
        """JSON of the items that have ended, by index."""
        self._blank: dict[TextForm, str] = {}
        """White space that a text would begin with: many models write some between two calls, and nothing else."""

    def whole(self, response: ChatResponse) -> bytes:
        calls = [{**call, "index": index} for index, call in enumerate(response.tool_calls)]
        self._of_delta(Delta(content=response.content, reasoning=response.reasoning, tool_calls=calls or None))
        status, _ = self._end(response)
        return self._resource(status, response).encode("ascii")

    def begin(self) -> bytes:
        fields = f'"response":{self._resource("in_progress")}'
        created = self._events.of("response.created", fields)
        return (created + self._events.of("response.in_progress", fields)).encode("ascii")

    def deltas(self, deltas: list[Delta]) -> bytes:
        return "".join(map(self._of_delta, deltas)).encode("ascii")

    def end(self, response: ChatResponse) -> bytes:
        status, last = self._end(response)
        fields = f'"response":{self._resource(status, response)}'
        return (last + self._events.of(f"response.{status}", fields)).encode("ascii") + DONE

    def failed(self, problem: Problem) -> bytes:
        for item in self._going_on():
            self._ended[item.index] = item.json("incomplete")
        fields = f'"response":{self._resource("failed", error=_error(problem))}'
        return self._events.of("response.failed", fields).encode("ascii") + DONE

    # --- items

    def _of_delta(self, delta: Delta) -> str:
        if delta.reasoning is None and delta.tool_calls is None:
            return self._say(MESSAGE, delta.content) if delta.content else ""
        events = self._say(THOUGHTS, delta.reasoning) if delta.reasoning else ""
        events += self._say(MESSAGE, delta.content) if delta.content else ""
        return events + "".join(map(self._call, self._calls.read(delta.tool_calls or ())))

    def _say(self, form: TextForm, text: str) -> str:
        if self._text and self._text.form is form:
            return self._text.go_on(text)
        text = self._blank.pop(form, "") + text
        if text.isspace():
            self._blank[form] = text
            return ""
        return self._end_finished() + self._begin_text(form, text)

    def _begin_text(self, form: TextForm, text: str) -> str:
        self._text = TextItem(self._events, form, self._id, self._next_index())
        return self._text.begin() + self._text.go_on(text)

    def _call(self, piece: Fragment) -> str:
        if not piece.begins:
            call = self._open.get(piece.index)
            return call.go_on(piece.arguments) if call else ""
        events = self._end_finished()
        tool = self._tools.named(piece.name)
        call = CallItem(self._events, tool, piece.id, self._id, self._next_index())
        self._open[piece.index] = call
        return events + call.begin() + call.go_on(piece.arguments)

    def _next_index(self) -> int:
        self._count += 1
        return self._count - 1

    def _end_finished(self) -> str:
        """End what another item follows: a text, and calls that are whole. Some servers write two calls at once."""
        return "".join(
            self._end_item(item, "completed")
            for item in self._going_on()
            if isinstance(item, TextItem) or item.is_whole
        )

    def _end_item(self, item: TextItem | CallItem, status: Status) -> str:
        events = item.end(status)
        self._ended[item.index] = item.json(status)
        if item is self._text:
            self._text = None
        self._open = {number: call for number, call in self._open.items() if call is not item}
        return events

    def _going_on(self) -> list[TextItem | CallItem]:
        items: list[TextItem | CallItem] = [*self._open.values()]
        if self._text:
            items.append(self._text)
        return sorted(items, key=lambda item: item.index)

    # --- the response

    def _end(self, response: ChatResponse) -> tuple[Status, str]:
        """End all items; return the status of the response, and the events."""
        status: Status = "incomplete" if response.finish_reason in _INCOMPLETE else "completed"
        blank = "" if self._count else self._blank.get(MESSAGE)
        events = self._begin_text(MESSAGE, blank) if blank else ""
        events += "".join(
            self._end_item(item, status if item.index == self._count - 1 else "completed") for item in self._going_on()
        )
        return status, events

    def _resource(self, status: str, response: ChatResponse | None = None, error: str = "null") -> str:
        """Return the response as it is now."""
        reason = _INCOMPLETE.get(response.finish_reason) if response and status == "incomplete" else None
        details = f'{{"reason":"{reason}"}}' if reason else "null"
        usage = compact(_usage(response.usage)) if response else "null"
        completed = str(int(time.time())) if status == "completed" else "null"
        output = ",".join(self._ended[index] for index in sorted(self._ended))
        return (
            f'{{{self._constant},"status":"{status}","completed_at":{completed},"error":{error},'
            f'"incomplete_details":{details},"output":[{output}],"usage":{usage}}}'
        )


def _usage(usage: Usage) -> dict[str, Any]:
    """Return the token counts. What the server does not report is 0: no server tells how many tokens are thoughts."""
    told, written = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "input_tokens": told,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens or told + written,
    }


def _error(problem: Problem) -> str:
    code, message = "server_error", problem.message
    if problem.code in _CODES:
        code = problem.code
    elif problem.status < 429:
        code = "invalid_prompt"
    if code == "rate_limit_exceeded" and problem.retry_after is not None:
        message += f" Try again in {problem.retry_after:.1f}s."  # Codex reads it in these words
    return compact({"code": code, "message": message})
