"""One `Flavour` for each MLX server, in one table.

The facts are of mlx_lm.server 0.32, vllm-mlx 0.6, mlx-openai-server 1.8, mlx-omni-server 0.5, rapid-mlx 0.16 and
mlx-vlm 0.7, as seen on the wire. `openai` is none of them: a plain, well-behaved server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from fleet_worker.simulator.answers import answer, mlx_openai_error, mlx_openai_unknown, openai_error, rapid_unknown
from fleet_worker.simulator.flavours import NO_SNAPSHOT, Flavour
from fleet_worker.simulator.refusals import (
    Body,
    fastapi_refuses,
    has_known_roles,
    has_model,
    has_no_nulls,
    has_only_text,
    has_positive_max_tokens,
    has_stop_list,
    mlx_lm_refuses,
    openai_refuses,
    rapid_refuses,
)
from fleet_worker.simulator.texts import CHAT_TEMPLATE

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
    server="BaseHTTP/0.6 Python/3.12.11",
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
    stop="cut",
    json_formats=(),
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
    stop="tokens",
    json_formats=("json_schema",),
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
    stop="ignored",
    json_formats=("json_schema",),
    aliases=("/chat/completions", "/embeddings", "/models"),
    has_health=False,
    refuses=fastapi_refuses(has_model, has_only_text),
    continues=ends_with_assistant,
)

RAPID_MLX = Flavour(
    name="rapid_mlx",
    base64=True,
    heartbeats=True,
    null_finish=False,
    content_on_finish=True,
    aliases=("/chat/completions",),
    default_max_tokens=32_768,
    health=lambda models: {
        "latest_version": None,
        "update_available": False,
        "status": "healthy",
        "ready": True,
        "state": "ready",
        "model_loaded": True,
        "model_name": models[0],
        "model_type": "llm",
        "engine_type": "batched",
        "mcp": None,
        "model_lifecycle": None,
    },
    error=openai_error,
    not_json=lambda message: openai_error(400, f"Invalid request body: {message}"),
    unknown_model=rapid_unknown,
    no_messages=lambda: openai_error(400, "Invalid request body: messages: List should have at least 1 item"),
    no_input=lambda: openai_error(400, "input: must not be empty"),
    refuses=rapid_refuses,
)

MLX_VLM = Flavour(
    name="mlx_vlm",
    server="mlx_vlm/0.7.10",
    swaps=True,
    opening=False,
    role_in_deltas=True,
    nulls=("usage", "timings"),
    tool_calls="last",
    caches=False,
    cached_tokens=True,
    after_error="nothing",
    aliases=("/chat/completions", "/embeddings", "/models"),
    limits=("max_tokens",),
    stop="ignored",
    health=lambda models: {
        "status": "healthy",
        "loaded_model": models[0],
        "loaded_adapter": None,
        "loaded_context_size": None,
        "continuous_batching_enabled": True,
        "apc_enabled": False,
    },
    unknown_model=lambda model: answer(400, {"detail": f"Failed to load model: {NO_SNAPSHOT}"}),
    no_messages=lambda: answer(500, {"detail": "An unexpected error occurred: Cannot apply chat template to an empty"}),
    no_input=lambda: answer(400, {"detail": "input must not be empty"}),
    refuses=fastapi_refuses(has_model, has_no_nulls),
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
        RAPID_MLX,
        MLX_VLM,
        OPENAI,
    )
}
