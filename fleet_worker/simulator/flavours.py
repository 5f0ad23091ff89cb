"""What may differ between MLX servers, and how it is used. The servers themselves are in `servers`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_worker.simulator.answers import Answer, answer, crashed, unprocessable
from fleet_worker.simulator.refusals import Body

ROUTES = {
    "/v1/chat/completions": ("POST", "chat"),
    "/v1/embeddings": ("POST", "embed"),
    "/v1/models": ("GET", "models"),
    "/health": ("GET", "health"),
}
NO_SNAPSHOT = (
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and outgoing "
    "traffic has been disabled. To enable repo look-ups and downloads online, pass 'local_files_only=False' as input."
)
NOT_FOUND = Answer(404, b"Not Found")  # labelled as JSON
UNSUPPORTED_METHOD = Answer(501, b"<!DOCTYPE HTML>\n<html>Error response</html>\n", "text/html;charset=utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """How one kind of MLX server behaves over HTTP, where it differs from the others."""

    name: str
    slots: int = 32
    server: str = "uvicorn"  # its name in a header
    http10: bool = False  # a connection a request, streams and errors end by EOF, paths match exactly
    ascii: bool = False  # streams are ASCII-escaped JSON; else raw UTF-8, U+2028 included
    embeddings: bool = True
    base64: bool = False  # embeddings can be asked for as base64
    embedding_usage: bool = True
    rejects: bool = False  # no queue: refuses when all slots are taken
    freezes: bool = False  # a reply that is not streamed stops the whole server
    swaps: bool = False  # any model string is loaded, in place of the resident one
    batches_by_model: bool = False  # a seed, or another model string, is served alone
    notices_leaving: bool = True  # else only a failed write tells that the client left
    stops_whole: bool = False  # stops a reply that is not streamed when its client leaves
    prefill_comments: bool = False
    heartbeats: bool = False
    fingerprint: bool = False  # system_fingerprint in every chunk
    opening: bool = True  # a chunk with only the role, at once
    role_in_deltas: bool = False
    nulls: tuple[str, ...] = ()  # keys sent as null in every chunk
    null_finish: bool = True  # finish_reason is null until the end; else the key is missing
    reasoning: str | None = "reasoning_content"  # None: merged into the streamed content
    tool_calls: str = "fragments"  # "whole": a delta each; "last": all on the finish chunk
    says_length: bool = True
    drops_last: bool = False  # a reply cut by max_tokens is one token short
    content_on_finish: bool = False  # the last token rides on the finish chunk
    usage_on_finish: bool = False
    usage_chunk: str | None = "empty"  # if asked: its choices are empty, or a second finish choice; None: no such chunk
    usage_object: str = "chat.completion.chunk"
    caches: bool = True  # prompts
    cached_tokens: bool = False  # in usage
    after_error: str = "done"  # what follows an error event: "finish" and done, "done", or "nothing"
    aliases: tuple[str, ...] = ()  # paths that also work without /v1
    limits: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
    default_max_tokens: int = 4096
    has_health: bool = True
    health: Callable[[Sequence[str]], object] = lambda models: {"status": "ok"}
    error: Callable[[int, str], Answer] = lambda status, message: answer(status, {"detail": message})
    not_json: Callable[[str], Answer] = lambda message: unprocessable("", message)
    unknown_model: Callable[[str], Answer] = crashed
    unknown_embedder: Callable[[str], Answer] | None = None  # None: as for a chat
    no_messages: Callable[[], Answer] = crashed
    no_input: Callable[[], Answer] = crashed
    refuses: Callable[[Body], Answer | None]
    continues: Callable[[Body], bool] = lambda body: False  # whether the last message is a partial reply to continue
    # What a stop string does: it "ends" the reply; it ends it if it is made of whole tokens, and is else "cut" out of
    # the text, or without effect ("tokens"); or it is "ignored".
    stop: str = "ends"
    json_formats: tuple[str, ...] = ("json_object", "json_schema")  # the types of response_format that it follows
    keeps_space: bool = False  # a continued reply keeps its leading space
    trims_partial: bool = True  # the chat template, which trims messages, renders the partial reply too

    def route(self, method: str, path: str) -> str | Answer:
        """Return chat, embed, models or health; or the response to a request that has no route."""
        if self.http10:
            path = "/v1/models" if method == "GET" and path.startswith("/v1/models") else path
        else:
            path = path.partition("?")[0]
        wanted, operation = ROUTES.get(f"/v1{path}" if path in self.aliases else path, ("", ""))
        offered = {"embed": self.embeddings, "health": self.has_health}.get(operation, bool(operation))
        if offered and method == wanted:
            return operation
        if self.http10 and method == "OPTIONS":
            return Answer(204)
        if self.http10:
            return NOT_FOUND if method in ("GET", "POST") else UNSUPPORTED_METHOD
        return answer(405, {"detail": "Method Not Allowed"}) if offered else answer(404, {"detail": "Not Found"})

    def refuses_texts(self, models: Sequence[str], body: Body) -> Answer | None:
        """Every server takes a text or a list of texts to embed; token ids are refused."""
        texts = body.get("input")
        if not isinstance(texts, str | list) or not all(isinstance(text, str) for text in texts):
            return unprocessable("input", "Input should be a valid string")
        if self.base64 and body.get("encoding_format", "float") not in ("float", "base64"):
            return unprocessable("encoding_format", "Input should be 'float' or 'base64'")
        if body.get("model") not in models:
            return (self.unknown_embedder or self.unknown_model)(str(body.get("model")))
        return None if texts else self.no_input()

    def dumps(self, value: object) -> str:
        """The JSON of a stream: mlx_lm, mlx-openai and omni use json.dumps, vllm-mlx pydantic's."""
        return json.dumps(value) if self.ascii else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def limit(self, body: Body) -> int:
        """The number of tokens this request may generate."""
        return max(1, next((body[key] for key in self.limits if body.get(key) is not None), self.default_max_tokens))

    def usage(self, prompt: int, completion: int, cached: int) -> dict[str, Any]:
        """The usage object of a chat reply."""
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**usage, "prompt_tokens_details": {"cached_tokens": cached}} if self.cached_tokens else usage
