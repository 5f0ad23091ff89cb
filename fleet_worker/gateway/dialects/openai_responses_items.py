"""The items of a response, as the events of a stream build them: each begins, goes on and ends."""

from __future__ import annotations

import json
from typing import Any, Final, Literal, NamedTuple

from fleet_worker.gateway.dialects.openai_responses_tools import Tool
from fleet_worker.gateway.json_text import compact, quoted

Status = Literal["in_progress", "completed", "incomplete"]


class Events:
    """Numbers the events of one stream from 0."""

    def __init__(self) -> None:
        self._sent = 0

    def of(self, name: str, fields: str) -> str:
        """Return an event. `fields` is the inside of a JSON object."""
        number = self._sent
        self._sent += 1
        return f'event: {name}\ndata: {{"type":"{name}","sequence_number":{number},{fields}}}\n\n'


class TextForm(NamedTuple):
    """What the events of a kind of text are called."""

    kind: str
    prefix: str
    place: str
    part: str
    text: str


MESSAGE: Final = TextForm("message", "msg", "content_index", "response.content_part", "response.output_text")
THOUGHTS: Final = TextForm(
    "reasoning", "rs", "summary_index", "response.reasoning_summary_part", "response.reasoning_summary_text"
)
"""A model's thoughts are sent as their summary. That is what clients show, and the Open Responses specification and
OpenAI call its events by the same names, which those of raw thoughts have not."""


class TextItem:
    """A message, or thoughts."""

    def __init__(self, events: Events, form: TextForm, response_id: str, index: int) -> None:
        self.form = form
        self.index = index
        self._events = events
        self._id = f"{form.prefix}_{response_id}{index:02x}"
        self._place = f'"output_index":{index}'
        self._part = f'"item_id":"{self._id}",{self._place},"{form.place}":0'
        self._logprobs = ',"logprobs":[]' if form is MESSAGE else ""
        self._before_delta = f'{self._part}{self._logprobs},"delta":'
        self._delta = f"{form.text}.delta"
        self._texts: list[str] = []

    def begin(self) -> str:
        item = self._item("in_progress", [])
        return self._events.of("response.output_item.added", f'{self._place},"item":{compact(item)}') + self._events.of(
            f"{self.form.part}.added", f'{self._part},"part":{compact(self._content(""))}'
        )

    def go_on(self, text: str) -> str:
        self._texts.append(text)
        return self._events.of(self._delta, self._before_delta + quoted(text))

    def end(self, status: Status) -> str:
        text, events = "".join(self._texts), self._events
        done = events.of(f"{self.form.text}.done", f'{self._part}{self._logprobs},"text":{quoted(text)}')
        done += events.of(f"{self.form.part}.done", f'{self._part},"part":{compact(self._content(text))}')
        return done + events.of("response.output_item.done", f'{self._place},"item":{self.json(status)}')

    def json(self, status: Status) -> str:
        """Return the item as it is now."""
        return compact(self._item(status, [self._content("".join(self._texts))]))

    def _item(self, status: Status, contents: list[dict[str, Any]]) -> dict[str, Any]:
        item: dict[str, Any] = {"type": self.form.kind, "id": self._id, "status": status}
        if self.form is MESSAGE:
            return {**item, "role": "assistant", "content": contents}
        return {**item, "summary": contents, "encrypted_content": None}

    def _content(self, text: str) -> dict[str, Any]:
        if self.form is MESSAGE:
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "summary_text", "text": text}


class CallItem:
    """A call of a tool. Only the arguments of a function are sent piece by piece: those of other tools are decoded."""

    def __init__(self, events: Events, tool: Tool, call_id: str, response_id: str, index: int) -> None:
        self.index = index
        self._events = events
        self._tool = tool
        self._call_id = call_id
        self._id = f"{tool.prefix}_{response_id}{index:02x}"
        self._place = f'"output_index":{index}'
        self._item_place = f'"item_id":"{self._id}",{self._place}'
        self._arguments: list[str] = []

    def begin(self) -> str:
        return self._events.of("response.output_item.added", f'{self._place},"item":{self.json("in_progress")}')

    def go_on(self, arguments: str) -> str:
        self._arguments.append(arguments)
        if self._tool.kind != "function" or not arguments:
            return ""
        fields = f'{self._item_place},"delta":{quoted(arguments)}'
        return self._events.of("response.function_call_arguments.delta", fields)

    def end(self, status: Status) -> str:
        # Clients parse the arguments: also those of a function that takes none are an object.
        last = self.go_on("{}") if status == "completed" and not self._text else ""
        last += self._input_done()
        return last + self._events.of("response.output_item.done", f'{self._place},"item":{self.json(status)}')

    def json(self, status: Status) -> str:
        """Return the item as it is now."""
        return compact(self._tool.item(self._id, self._call_id, self._text, status))

    @property
    def is_whole(self) -> bool:
        """Whether its arguments are complete."""
        try:
            json.loads(self._text)
        except (ValueError, RecursionError):
            return False
        return True

    @property
    def _text(self) -> str:
        return "".join(self._arguments)

    def _input_done(self) -> str:
        if self._tool.kind == "function":
            fields = f'{self._item_place},"arguments":{quoted(self._text)}'
            return self._events.of("response.function_call_arguments.done", fields)
        if self._tool.kind == "local_shell":
            return ""
        told = quoted(self._tool.item("", "", self._text, "completed")["input"])
        return self._events.of("response.custom_tool_call_input.delta", f'{self._item_place},"delta":{told}') + (
            self._events.of("response.custom_tool_call_input.done", f'{self._item_place},"input":{told}')
        )
