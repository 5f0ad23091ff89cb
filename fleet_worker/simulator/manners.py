"""Odd manners: each changes what a server sends, so that it is not by the book, or barely.

A manner is a small function in one of three tables: in `EVENTS` of the events that are sent together and whether they
are the first of the stream, in `ENDINGS` of the last events, in `VECTORS` of the vectors of one answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fleet_worker.simulator.chunks import DONE

Events = Sequence[bytes]
Chunk = dict[str, Any]


def of_chunks(change: Callable[[Chunk], Sequence[Chunk | bytes]]) -> Callable[[Events, bool], list[bytes]]:
    """The manner that sends other chunks, or events, in the place of each chunk."""

    def manner(events: Events, first: bool) -> list[bytes]:
        sent: list[bytes] = []
        for event in events:
            if not event.startswith(b"data: {"):
                sent.append(event)
                continue
            changed = change(json.loads(event.removeprefix(b"data: ")))
            sent += [each if isinstance(each, bytes) else event_of(each) for each in changed]
        return sent

    return manner


def event_of(chunk: Chunk) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def of_choices(change: Callable[[Chunk], Chunk]) -> Callable[[Events, bool], list[bytes]]:
    """The manner that changes each choice."""
    return of_chunks(lambda chunk: [{**chunk, "choices": [change(choice) for choice in chunk.get("choices", ())]}])


def of_calls(change: Callable[[Chunk], Sequence[Chunk]]) -> Callable[[Events, bool], list[bytes]]:
    """The manner that sends other fragments of tool calls in the place of each."""

    def changed(choice: Chunk) -> Chunk:
        delta = choice["delta"]
        calls = [changed for call in delta.get("tool_calls") or () for changed in change(call)]
        return {**choice, "delta": {**delta, "tool_calls": calls} if calls else delta}

    return of_choices(changed)


def without(value: Chunk, *keys: str) -> Chunk:
    return {key: each for key, each in value.items() if key not in keys}


# --- events -----------------------------------------------------------------------------------------------------------


def empty_data(events: Events, first: bool) -> list[bytes]:
    """Heartbeats that are events without data."""
    return [part for event in events for part in (b"data:\n\n", b"data: \n\n", event)]


def pings(events: Events, first: bool) -> list[bytes]:
    """Heartbeats that are events with a type, and with data that is no chunk."""
    return [part for event in events for part in (b"event: ping\ndata: {}\n\n", b"data: ping\n\n", event)]


def bom(events: Events, first: bool) -> list[bytes]:
    """A byte order mark before the stream."""
    return [b"\xef\xbb\xbf", *events] if first else list(events)


def done_twice(events: Events, first: bool) -> list[bytes]:
    """And an error after it."""
    late = (DONE, DONE, b'data: {"error": "late"}\n\n')
    return [part for event in events for part in (late if event == DONE else (event,))]


def halves(chunk: Chunk) -> list[bytes]:
    """A character beyond the first 65,536 in two chunks: a half of its surrogate pair in each."""
    at = next((at for at, letter in enumerate(text_of(chunk)) if letter > "\uffff"), None)
    if at is None:
        return [event_of(chunk)]
    text = text_of(chunk)
    pair = json.dumps(text[at]).strip('"')
    texts = (json.dumps(text[:at])[1:-1] + pair[:6], pair[6:] + json.dumps(text[at + 1 :])[1:-1])
    return [saying(chunk, part.encode()) for part in texts]


def cut_utf8(chunk: Chunk) -> list[bytes]:
    """A character of several bytes in two chunks."""
    text = text_of(chunk).encode()
    at = next((at for at, byte in enumerate(text) if byte & 0xC0 == 0x80), None)
    return [event_of(chunk)] if at is None else [saying(chunk, text[:at]), saying(chunk, text[at:])]


def text_of(chunk: Chunk) -> str:
    return str((chunk.get("choices") or [{"delta": {}}])[0]["delta"].get("content") or "")


def saying(chunk: Chunk, text: bytes) -> bytes:
    """The event of this chunk with these bytes as its text."""
    choice = chunk["choices"][0]
    marked = {**chunk, "choices": [{**choice, "delta": {**choice["delta"], "content": "\ue000"}}]}
    return event_of(marked).replace("\ue000".encode(), text)


def tokenless(chunk: Chunk) -> list[Chunk]:
    """A whole stream, and nothing in it."""
    choices = [{**choice, "delta": {"role": "assistant", "content": ""}} for choice in chunk["choices"]]
    return [{**chunk, "choices": choices, "usage": None}]


def two_choices(chunk: Chunk) -> list[Chunk]:
    other = {"index": 1, "finish_reason": None, "delta": {"content": "another answer"}}
    return [{**chunk, "choices": [other, *chunk["choices"]]}, {**chunk, "choices": [other], "usage": None}]


def nulls(chunk: Chunk) -> list[Chunk]:
    """Between the chunks, others in which everything is null."""
    empty = {"index": 0, "delta": {"role": None, "content": None, "tool_calls": None}, "finish_reason": None}
    choices: Sequence[Any] = ([{**empty, "delta": None}], [empty], [], None)
    return [*({"choices": each, "usage": None} for each in choices), {"usage": None}, chunk]


def odd_usage(chunk: Chunk) -> list[Chunk]:
    counts = {"prompt_tokens": float("nan"), "completion_tokens": 10**400, "total_tokens": -1}
    return [{**chunk, "usage": counts}]


def named_twice(call: Chunk) -> list[Chunk]:
    """The name of a tool call once more, after it."""
    name = call["function"].get("name")
    return [call, {"index": call["index"], "function": {"name": name, "arguments": ""}}] if name else [call]


def with_object(call: Chunk) -> list[Chunk]:
    """Arguments that are an object, where they come whole."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except ValueError:
        return [call]
    return [{**call, "function": {**call["function"], "arguments": arguments}}]


EVENTS: Mapping[str, Callable[[Events, bool], list[bytes]]] = {
    "empty_data": empty_data,
    "pings": pings,
    "bom": bom,
    "done_twice": done_twice,
    "halves": of_chunks(halves),
    "cut_utf8": of_chunks(cut_utf8),
    "messages": of_choices(lambda choice: {**without(choice, "delta"), "message": choice["delta"]}),
    "texts": of_choices(lambda choice: {**without(choice, "delta"), "text": choice["delta"].get("content")}),
    "parts": of_choices(
        lambda choice: {
            **choice,
            "delta": {**choice["delta"], "content": [{"type": "text", "text": choice["delta"].get("content") or ""}]},
        }
    ),
    "nulls": of_chunks(nulls),
    "two_choices": of_chunks(two_choices),
    "renumbered": of_choices(lambda choice: {**choice, "index": 7}),
    "odd_usage": of_chunks(odd_usage),
    "shouted_finish": of_choices(lambda choice: {**choice, "finish_reason": str(choice.get("finish_reason")).upper()}),
    "tokenless": of_chunks(tokenless),
    "calls_of_one_index": of_calls(lambda call: [{**call, "index": 0}]),
    "calls_without_index": of_calls(lambda call: [without(call, "index")]),
    "calls_with_null_index": of_calls(lambda call: [{**call, "index": None}]),
    "calls_without_id": of_calls(lambda call: [without(call, "id")]),
    "calls_with_objects": of_calls(with_object),
    "calls_named_twice": of_calls(named_twice),
}

# --- the last events --------------------------------------------------------------------------------------------------


def runs_on(finish: list[bytes]) -> list[bytes]:
    """Text after the end of the answer, and more of it."""
    return [*finish, *[b'data: {"choices": [{"index": 0, "delta": {"content": " and so on"}}]}\n\n'] * 1000]


ENDINGS: Mapping[str, Callable[[list[bytes]], list[bytes]]] = {
    "done_without_finish": lambda finish: [DONE],  # vllm-mlx 0.4 ends a failed stream so
    "finish_without_done": lambda finish: finish,
    "runs_on": runs_on,
}

# --- the vectors ------------------------------------------------------------------------------------------------------

VECTORS: Mapping[str, Callable[[list[list[float]]], list[list[float]]]] = {
    "wrong_count": lambda vectors: vectors[:-1],
    "wrong_dimension": lambda vectors: [*vectors[:-1], vectors[-1][:-1]],
    "nan": lambda vectors: [*vectors[:-1], [float("nan"), *vectors[-1][1:]]],
    "no_vector": lambda vectors: [*vectors[:-1], []],
}
