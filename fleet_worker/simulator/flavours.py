"""What differs between the MLX servers: one `Flavour` each, in one table.

The facts are of mlx_lm.server 0.32, vllm-mlx 0.6, mlx-openai-server 1.8 and mlx-omni-server 0.5, as seen on the wire.
`openai` is none of them: a plain, well-behaved server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_worker.simulator.answers import (
    Answer,
    answer,
    crashed,
    mlx_openai_error,
    mlx_openai_unknown,
    openai_error,
    unprocessable,
)
from fleet_worker.simulator.refusals import (
    Body,
    fastapi_refuses,
    has_known_roles,
    has_model,
    has_only_text,
    has_positive_max_tokens,
    has_stop_list,
    mlx_lm_refuses,
    openai_refuses,
)
from fleet_worker.simulator.texts import CHAT_TEMPLATE

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
    cached_tokens: bool = False
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


# --- continuing a partial reply -------------------------------------------------------------------------------------


def ends_with_assistant(body: Body) -> bool:
    return bool(body["messages"]) and body["messages"][-1]["role"] == "assistant"


def mlx_lm_continues(body: Body) -> bool:
    """Whether the request brings the chat template of the model, changed so that it leaves the last turn open."""
    template = (body.get("chat_template_kwargs") or {}).get("chat_template", "")
    before, own, after = template.partition(CHAT_TEMPLATE)
    return bool(ends_with_assistant(body) and own and "[:-1]" in before and '[-1]["content"]' in after)


def mlx_lm_opening(body: Body) -> str:
    """Return the partial reply, after the text that the chat template of the request puts before it."""
    template = (body.get("chat_template_kwargs") or {}).get("chat_template", "")
    before = re.search(r'\{\{ ("(?:[^"\\]|\\.)*") \+ ', template)
    return (json.loads(before[1]) if before else "") + str(body["messages"][-1]["content"])


def vllm_continues(body: Body) -> bool:
    wish = body.get("chat_template_kwargs") or {}
    open_end = wish.get("continue_final_message") is True and wish.get("add_generation_prompt") is False
    return open_end and ends_with_assistant(body)


def mlx_openai_continues(body: Body) -> bool:
    return ends_with_assistant(body) and body["messages"][-1].get("partial") is True


# --- the table ------------------------------------------------------------------------------------------------------


def vllm_health(engine: str) -> Callable[[Sequence[str]], object]:
    def health(models: Sequence[str]) -> object:
        names = {"model_name": models[0], "available_models": list(models)}
        return {"status": "healthy", "model_loaded": True, **names, "model_type": "llm", "engine_type": engine}

    return health


def vllm(name: str, *, slots: int, rejects: bool, stops_whole: bool, keeps_space: bool) -> Flavour:
    """vllm-mlx 0.6: the Simple engine has one slot and refuses; the batched one queues."""
    return Flavour(
        name=name,
        slots=slots,
        rejects=rejects,
        stops_whole=stops_whole,
        heartbeats=True,
        nulls=("usage", "generation_metadata"),
        content_on_finish=True,
        usage_on_finish=True,
        limits=("max_tokens",),
        default_max_tokens=32_768,
        health=vllm_health("simple" if rejects else "batched"),
        unknown_model=lambda model: answer(404, {"detail": f"The model `{model}` does not exist."}),
        unknown_embedder=lambda model: answer(400, {"detail": f"Embedding model `{model}` is not available."}),
        no_input=lambda: answer(400, {"detail": "Input must not be empty"}),
        refuses=fastapi_refuses(has_model, has_positive_max_tokens, has_stop_list),
        continues=vllm_continues,
        keeps_space=keeps_space,
    )


MLX_LM = Flavour(
    name="mlx_lm",
    http10=True,
    ascii=True,
    embeddings=False,
    swaps=True,
    batches_by_model=True,
    notices_leaving=False,
    prefill_comments=True,
    fingerprint=True,
    opening=False,
    role_in_deltas=True,
    reasoning="reasoning",
    tool_calls="whole",
    usage_object="chat.completion",
    cached_tokens=True,
    after_error="nothing",
    aliases=("/chat/completions",),
    default_max_tokens=512,
    error=lambda status, message: answer(status, {"error": message}),
    not_json=lambda message: answer(400, {"error": message}),
    unknown_model=lambda model: answer(404, {"error": NO_SNAPSHOT}),
    no_messages=lambda: answer(404, {"error": "Cannot apply chat template to an empty conversation."}),
    refuses=mlx_lm_refuses,
    continues=mlx_lm_continues,
    trims_partial=False,
)

MLX_OPENAI = Flavour(
    name="mlx_openai",
    ascii=True,
    base64=True,
    embedding_usage=False,
    role_in_deltas=True,
    null_finish=False,
    tool_calls="whole",
    says_length=False,
    usage_on_finish=True,
    usage_chunk=None,
    cached_tokens=True,
    after_error="finish",
    limits=("max_tokens", "max_completion_tokens"),
    default_max_tokens=1_000_000,
    health=lambda models: {"status": "ok", "model_id": ", ".join(models), "model_status": "initialized"},
    error=mlx_openai_error,
    unknown_model=mlx_openai_unknown,
    no_messages=lambda: mlx_openai_error(500, "list index out of range"),
    no_input=lambda: mlx_openai_error(500, "list index out of range"),
    refuses=fastapi_refuses(has_stop_list, has_known_roles),
    continues=mlx_openai_continues,
)

OMNI = Flavour(
    name="omni",
    slots=1,
    ascii=True,
    freezes=True,
    swaps=True,
    opening=False,
    role_in_deltas=True,
    null_finish=False,
    reasoning=None,
    tool_calls="last",
    says_length=False,
    drops_last=True,
    usage_chunk="finish",
    after_error="nothing",
    aliases=("/chat/completions", "/embeddings", "/models"),
    has_health=False,
    refuses=fastapi_refuses(has_model, has_only_text),
    continues=ends_with_assistant,
)

OPENAI = Flavour(
    name="openai",
    stops_whole=True,
    base64=True,
    error=openai_error,
    not_json=lambda message: openai_error(400, message),
    unknown_model=lambda model: openai_error(404, f"The model '{model}' does not exist"),
    no_messages=lambda: openai_error(400, "messages must not be empty"),
    no_input=lambda: openai_error(400, "input must not be empty"),
    refuses=openai_refuses,
)

FLAVOURS: Mapping[str, Flavour] = {
    flavour.name: flavour
    for flavour in (
        MLX_LM,
        vllm("vllm_simple", slots=1, rejects=True, stops_whole=False, keeps_space=False),
        vllm("vllm_batched", slots=32, rejects=False, stops_whole=True, keeps_space=True),
        MLX_OPENAI,
        OMNI,
        OPENAI,
    )
}
