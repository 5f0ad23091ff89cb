"""Streams of `/v1/responses`, read as strictly as they are specified: each event by the models of openai-python and by
those of the Open Responses specification, and all of them together as what builds the response."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, get_args

import openresponses_types.types as specified
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

Event = dict[str, Any]

EXTENDED = {"frequency_penalty", "presence_penalty", "store", "status"}
"""Fields that openai-python does not know, and the specification does."""
_CHANGING = ("status", "output", "usage", "completed_at", "error", "incomplete_details")


def read_events(stream: bytes) -> list[Event]:
    """Return the events of a whole stream. It ends with [DONE]."""
    *blocks, done, rest = stream.decode("ascii").split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events = []
    for block in blocks:
        named, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert named == f"event: {event['type']}"
        events.append(event)
    return events


def check_events(events: Sequence[Event], *, openai_only: bool = False) -> Event:
    """Check a whole stream; return the response that ends it."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    for event in events:
        known = _openai_models()[event["type"]].model_validate(event)
        assert unknown_fields(known) <= EXTENDED, event["type"]
        if not openai_only:
            _specified_models()[event["type"]].model_validate(event)
    last = events[-1]["response"]
    if events[-1]["type"] != "response.failed":
        assert built(events) == last["output"]
    first = events[0]["response"]
    changing = {"status", "output", "usage", "completed_at", "error", "incomplete_details"}
    assert {name: first[name] for name in first.keys() - changing} == {
        name: last[name] for name in first.keys() - changing
    }
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    return last


def check_response(response: Event, *, openai_only: bool = False) -> Event:
    """Check a response that is not streamed, and return it."""
    assert unknown_fields(Response.model_validate(response)) <= EXTENDED
    if not openai_only:
        specified.ResponseResource.model_validate(_without_schema(response))
    return response


def built(events: Sequence[Event]) -> list[Event]:
    """Return the output items as the deltas build them, and check that each `done` event says the same."""
    items: dict[int, Event] = {}
    ended: set[int] = set()
    for event in events:
        kind, index = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert index == len(items)
            assert event["item"].get("status", "in_progress") == "in_progress"
            items[index] = copy.deepcopy(event["item"])
        elif index is not None:
            assert index not in ended, "an item goes on after its end"
            assert "item_id" not in event or event["item_id"] == items[index]["id"]
            _BUILDERS[kind](items[index], event)
            if kind == "response.output_item.done":
                ended.add(index)
    assert ended == set(items), "an item has no end"
    return [items[index] for index in sorted(items)]


def unknown_fields(value: Any) -> set[str]:
    """Return the names of all fields, at any depth, that the models of openai-python do not know."""
    if isinstance(value, BaseModel):
        parts = [getattr(value, name) for name in type(value).model_fields]
        return set(value.model_extra or ()).union(*map(unknown_fields, parts))
    return set().union(*map(unknown_fields, value)) if isinstance(value, list) else set()


# --- how an item goes on ----------------------------------------------------------------------------------------------


def _part_added(item: Event, event: Event) -> None:
    parts = item[_parts(event)]
    assert len(parts) == _place(event)
    parts.append(copy.deepcopy(event["part"]))


def _part_done(item: Event, event: Event) -> None:
    assert item[_parts(event)][_place(event)] == event["part"]


def _text_delta(item: Event, event: Event) -> None:
    assert event["delta"]
    item[_parts(event)][_place(event)]["text"] += event["delta"]


def _text_done(item: Event, event: Event) -> None:
    assert item[_parts(event)][_place(event)]["text"] == event["text"]


def _arguments_delta(item: Event, event: Event) -> None:
    item["arguments"] += event["delta"]


def _arguments_done(item: Event, event: Event) -> None:
    assert item["arguments"] == event["arguments"]


def _input_delta(item: Event, event: Event) -> None:
    item["input"] += event["delta"]


def _input_done(item: Event, event: Event) -> None:
    assert item["input"] == event["input"]


def _item_done(item: Event, event: Event) -> None:
    assert event["item"]["status"] in ("completed", "incomplete")
    item["status"] = event["item"]["status"]
    if item["type"] == "local_shell_call":  # it has no deltas
        item["action"] = event["item"]["action"]
    assert item == event["item"]


_BUILDERS = {
    "response.content_part.added": _part_added,
    "response.content_part.done": _part_done,
    "response.output_text.delta": _text_delta,
    "response.output_text.done": _text_done,
    "response.reasoning_summary_part.added": _part_added,
    "response.reasoning_summary_part.done": _part_done,
    "response.reasoning_summary_text.delta": _text_delta,
    "response.reasoning_summary_text.done": _text_done,
    "response.function_call_arguments.delta": _arguments_delta,
    "response.function_call_arguments.done": _arguments_done,
    "response.custom_tool_call_input.delta": _input_delta,
    "response.custom_tool_call_input.done": _input_done,
    "response.output_item.done": _item_done,
}


def _parts(event: Event) -> str:
    return "summary" if "summary_index" in event else "content"


def _place(event: Event) -> int:
    return int(event["summary_index"] if "summary_index" in event else event["content_index"])


# --- models -----------------------------------------------------------------------------------------------------------


@cache
def _openai_models() -> dict[str, type[BaseModel]]:
    """The models of openai-python by the type of their events."""
    models = get_args(get_args(ResponseStreamEvent)[0])
    return {get_args(model.model_fields["type"].annotation)[0]: model for model in models}


@cache
def _specified_models() -> dict[str, type[BaseModel]]:
    """The models of the specification by the type of their events."""
    models = [model for name, model in vars(specified).items() if name.endswith("StreamingEvent")]
    return {str(kind): model for model in models for kind in model.model_fields["type"].annotation}


def _without_schema(response: Event) -> Event:
    """Return the response without the schema of its format, which the specification has as null by mistake."""
    form = response["text"]["format"]
    if "schema" not in form:
        return response
    return {**response, "text": {**response["text"], "format": {**form, "schema": None}}}
