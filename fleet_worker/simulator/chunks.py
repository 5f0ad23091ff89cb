"""The JSON of a simulated chat reply, chunk by chunk or whole, in the shape of each flavour."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fleet_worker.simulator.answers import Answer
from fleet_worker.simulator.flavours import Flavour
from fleet_worker.simulator.refusals import Body

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "0.32.2-0.32.4-macOS-15.6-arm64-arm-64bit-applegpu_g16g"
MARK = "\ue000text\ue000"  # private-use characters: no model name contains them


class Chunks:
    """The events of one streamed chat reply, as bytes. A token costs two concatenations."""

    def __init__(self, flavour: Flavour, model: str) -> None:
        self.flavour = flavour
        self._common = identity(flavour, "chat.completion.chunk", model)
        self._content = self._halves("content")
        self._reasoning = self._halves(flavour.reasoning) if flavour.reasoning else self._content

    def _halves(self, field: str) -> tuple[bytes, bytes]:
        before, after = self.delta({field: MARK}).split(_quoted(MARK, self.flavour.ascii))
        return before, after

    def opening(self) -> bytes:
        """The chunk that carries only the role."""
        return self._chunk([self._choice({"role": "assistant"}, None)])

    def tokens(self, tokens: Sequence[str], thinking: int) -> list[bytes]:
        """An event a token; the first `thinking` of them are reasoning."""
        if thinking > 0:
            return self._texts(self._reasoning, tokens[:thinking]) + self._texts(self._content, tokens[thinking:])
        return self._texts(self._content, tokens)

    def _texts(self, halves: tuple[bytes, bytes], tokens: Sequence[str]) -> list[bytes]:
        (before, after), ascii_only = halves, self.flavour.ascii
        return [before + _quoted(token, ascii_only) + after for token in tokens]

    def delta(self, delta: Body, finish: str | None = None, **extra: object) -> bytes:
        """A chunk with this delta, and the role if this server repeats it."""
        role = {"role": "assistant"} if self.flavour.role_in_deltas else {}
        return self._chunk([self._choice({**role, **delta}, finish)], **extra)

    def calls(self, calls: Sequence[Body]) -> list[bytes]:
        """The tool calls in the pieces this server sends them in, before the finish chunk."""
        if self.flavour.tool_calls == "whole":
            return [self.delta({"tool_calls": [call]}) for call in calls]
        if self.flavour.tool_calls == "fragments":
            return [self.delta({"tool_calls": [part]}) for call in calls for part in fragments(call)]
        return []

    def finish(self, reason: str, usage: Body, *, asked: bool, last: Body) -> list[bytes]:
        """The finish chunk with a last delta, and the usage chunk where this server sends one."""
        flavour = self.flavour
        events = [self.delta(last, reason, **({"usage": usage} if flavour.usage_on_finish else {}))]
        if asked and flavour.usage_chunk:
            choices = [self._choice({"role": "assistant"}, reason)] if flavour.usage_chunk == "finish" else []
            events.append(self._chunk(choices, object=flavour.usage_object, usage=usage))
        return events

    def error(self, message: str, code: object) -> list[bytes]:
        """An error inside a 200 stream, and what this server still sends after it."""
        error = {"error": {"message": message, "code": code}}
        events = [f"data: {self.flavour.dumps(error)}\n\n".encode()]
        if self.flavour.after_error == "finish":
            events.append(self.delta({}, "stop"))
        return events if self.flavour.after_error == "nothing" else [*events, DONE]

    def _choice(self, delta: Body, finish: str | None) -> dict[str, Any]:
        known = {"finish_reason": finish} if finish or self.flavour.null_finish else {}
        return {"index": 0, **known, "delta": delta}

    def _chunk(self, choices: Sequence[Body], **extra: object) -> bytes:
        chunk = {**self._common, "choices": choices, **dict.fromkeys(self.flavour.nulls), **extra}
        return f"data: {self.flavour.dumps(chunk)}\n\n".encode()


@lru_cache(maxsize=8192)
def _quoted(text: str, ascii_only: bool) -> bytes:
    return json.dumps(text, ensure_ascii=ascii_only).encode()


def tool_call(call: Body, index: int) -> dict[str, Any]:
    """A tool call in OpenAI's shape, from a name and an object of arguments."""
    function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}
    return {"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def fragments(call: Body) -> list[dict[str, Any]]:
    """The name first, then the arguments a few characters at a time."""
    name, text = call["function"]["name"], call["function"]["arguments"]
    first = {**call, "function": {"name": name, "arguments": ""}}
    rest = [{"index": call["index"], "function": {"arguments": text[at : at + 8]}} for at in range(0, len(text), 8)]
    return [first, *rest]


def identity(flavour: Flavour, kind: str, model: str) -> dict[str, Any]:
    """The keys that every chunk of one reply repeats."""
    fingerprint = {"system_fingerprint": FINGERPRINT} if flavour.fingerprint else {}
    names = {"object": kind, "model": model, "created": int(time.time())}
    return {"id": f"chatcmpl-{uuid.uuid4()}", **fingerprint, **names}


def completion(flavour: Flavour, model: str, message: Body, finish: str, usage: Body) -> Answer:
    """A chat reply that is not streamed."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}
    reply = {**identity(flavour, "chat.completion", model), "choices": [choice], "usage": usage}
    return Answer(200, json.dumps(reply, ensure_ascii=flavour.http10).encode())
