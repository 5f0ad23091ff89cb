"""How MLX servers differ: what each of them is sent, and how its answers are recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fleet_worker.errors import ProviderError
from fleet_worker.mlx.chat_templates import with_open_last_turn
from fleet_worker.mlx.offering import Offering
from fleet_worker.protocol.openai import ChatParams, Message

_COMMON = frozenset({"messages", "max_tokens", "temperature", "top_p", "stop", "tools"})
_SAMPLING = frozenset({"top_k", "min_p", "presence_penalty", "repetition_penalty", "chat_template_kwargs"})
_OPENAI_PENALTIES = frozenset({"presence_penalty", "frequency_penalty", "logit_bias", "seed"})


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """One kind of MLX server."""

    fields: frozenset[str]
    """The fields of a chat request that it knows. No others are sent."""
    sends_done: bool = True
    """A complete stream ends with `[DONE]`."""
    length_shortfall: int | None = None
    """It reports the finish_reason "stop" when max_tokens cut the answer, which is then this many tokens shorter than
    max_tokens. None if it reports "length"."""
    base64_vectors: bool = False
    """It sends embeddings as base64 on request."""
    lists_models: bool = False
    """`/v1/models` lists all that it serves. (mlx_lm.server lists what is in the disk cache.)"""
    continues_by: Literal["flags", "partial", "always", "template"] | None = None
    """How it is told to continue the last message instead of answering it: by flags of transformers' chat templates, by
    `partial` in the message, not at all since it always does, or by a chat template that leaves the turn open."""
    health_waits_for: frozenset[str] = frozenset({"/v1/chat/completions", "/v1/embeddings"})
    """The requests of which one blocks `/health`, and all streams, until it has its first content."""


PROFILES: dict[str, ServerProfile] = {
    "mlx_lm": ServerProfile(
        fields=_COMMON | _SAMPLING | _OPENAI_PENALTIES, continues_by="template", health_waits_for=frozenset()
    ),
    "vllm_mlx": ServerProfile(
        fields=_COMMON | _SAMPLING | {"tool_choice", "response_format"},
        lists_models=True,
        continues_by="flags",
        health_waits_for=frozenset({"/v1/embeddings"}),
    ),
    "mlx_openai": ServerProfile(
        fields=_COMMON | {"top_k", "min_p", "seed", "tool_choice", "response_format", "chat_template_kwargs"},
        length_shortfall=0,
        base64_vectors=True,
        lists_models=True,
        continues_by="partial",
        health_waits_for=frozenset(),
    ),
    "omni": ServerProfile(fields=_COMMON | {"response_format"}, length_shortfall=1, continues_by="always"),
    "openai": ServerProfile(
        fields=_COMMON
        | _OPENAI_PENALTIES
        | {"tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort"},
        sends_done=False,
        base64_vectors=True,
    ),
}


def detect_server(http_version: str, headers: Mapping[str, str], report: dict[str, Any]) -> str:
    """Return which kind of server answered `GET /health` with this report; `openai` if it cannot be recognised."""
    if http_version == "HTTP/1.0" and headers.get("server", "").startswith("BaseHTTP"):
        return "mlx_lm"
    if "engine_type" in report:
        return "vllm_mlx"
    return "mlx_openai" if "model_status" in report else "openai"


def chat_body(params: ChatParams, offering: Offering, profile: ServerProfile) -> dict[str, Any]:
    """Return the request body of a chat. It always streams (only a stream can be cancelled) and has explicit limits."""
    given = params.model_dump(exclude={"messages"}, exclude_none=True)
    given["messages"] = [_message(message) for message in params.messages]
    given["max_tokens"] = params.max_tokens or params.max_completion_tokens or offering.settings.max_output_tokens
    given.setdefault("temperature", offering.settings.temperature)
    if params.reasoning_effort and "reasoning_effort" not in profile.fields:
        kwargs = given.get("chat_template_kwargs", {})
        given["chat_template_kwargs"] = {"reasoning_effort": params.reasoning_effort, **kwargs}
    if params.tool_choice == "none" and "tool_choice" not in profile.fields:
        given.pop("tools", None)
    body = {name: value for name, value in given.items() if name in profile.fields}
    return {**body, "model": offering.backend, "stream": True, "stream_options": {"include_usage": True}}


def _message(message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    plain.setdefault("content", "")
    # OpenAI's newer name for the role: mlx-openai-server answers 422, and chat templates do not know it.
    plain["role"] = plain["role"].replace("developer", "system")
    return plain


def continued_body(
    body: dict[str, Any], partial: str, offering: Offering, profile: ServerProfile, *, exact: bool
) -> dict[str, Any] | None:
    """Return the body with which a server continues `partial`, the beginning of its answer to `body`.

    None if this server cannot continue an answer. mlx_lm.server needs the model's chat template for it, since it
    answers 404 to the flags that others take. It also crashes if the whole prompt is in its cache, which happens if
    `max_tokens` ended an earlier answer to the same request exactly where `partial` ends. A space before the text makes
    it another prompt; it is left out only if the text has to be `exact`.
    """
    messages: list[dict[str, Any]] = [*body["messages"], {"role": "assistant", "content": partial}]
    kwargs: dict[str, Any] = {}
    match profile.continues_by:
        case "flags":
            kwargs = {"add_generation_prompt": False, "continue_final_message": True}
        case "partial" if not offering.features["vision"].value:  # with images, the server begins a new turn
            messages[-1]["partial"] = True
        case "always":
            *before, last = body["messages"]
            if last["role"] == "assistant" and isinstance(last["content"], str):  # the server continued the caller's
                messages = [*before, {**last, "content": last["content"] + partial}]
        case "template" if offering.template:
            template = offering.template.tool_use if "tools" in body else offering.template.default
            # The prompt then ends inside an open tag, but what was delivered is visible text.
            closing_tag = "\n</think>\n\n" if offering.settings.starts_in_reasoning else ""
            before_text = closing_tag if exact else f"{closing_tag} "
            kwargs = {"chat_template": with_open_last_turn(template, before_text=before_text)}
        case _:
            return None
    continued = {**body, "messages": messages}
    if kwargs:
        continued["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **kwargs}
    return continued


def lacks_template(offering: Offering, profile: ServerProfile) -> bool:
    """Return True if streams cannot be continued here because the model's chat template was not found."""
    return profile.continues_by == "template" and "stream_chat" in offering.capabilities and not offering.template


_FINISH_REASONS = {
    "stop": ("stop", "end_turn", "eos", "eos_token", "stop_sequence"),
    "tool_calls": ("tool_calls", "tool_use", "function_call"),
    "length": ("length", "max_tokens"),
    "content_filter": ("content_filter",),
}


def normalised_finish_reason(reported: str, profile: ServerProfile, *, tokens: int | None, max_tokens: int) -> str:
    """Return OpenAI's name of a finish_reason: stop, length, tool_calls or content_filter. `tokens` is the number of
    completion tokens, if the server reports it.

    Raises:
        ProviderError: another reason (vLLM's "abort", "error"): the answer may be incomplete. Retryable.
    """
    reason = next((name for name, aliases in _FINISH_REASONS.items() if reported in aliases), None)
    if reason is None:
        raise ProviderError("the MLX server ended its answer before it was complete", retryable=True)
    if reason == "stop" and profile.length_shortfall is not None and tokens is not None:
        return "length" if tokens >= max_tokens - profile.length_shortfall else "stop"
    return reason
