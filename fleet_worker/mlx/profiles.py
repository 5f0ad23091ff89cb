"""What differs between MLX servers: quirks, request bodies, and how their failures are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fleet_worker.errors import (
    ProviderError,
)

_COMMON = frozenset({"messages", "max_tokens", "temperature", "top_p", "stop", "tools"})
_MLX_LM = _COMMON | {
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "chat_template_kwargs",
}
_VLLM = _COMMON | {
    "top_k",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "tool_choice",
    "response_format",
    "chat_template_kwargs",
}
_OPENAI = _COMMON | {
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "reasoning_effort",
}


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """One kind of server."""

    fields: frozenset[str]
    """What its chat endpoint knows; anything else is not sent."""
    says_done: bool = True
    """A whole stream ends with `[DONE]`."""
    hides_length: int | None = None
    """It says "stop" when it was cut by max_tokens; the number is how many tokens it then falls short."""
    base64_vectors: bool = False
    lists_models: bool = False
    """`/v1/models` names all it serves. (mlx_lm.server names what is on the disk.)"""
    continues: Literal["flags", "partial", "always", "template"] | None = None
    """How it is told that the last message is the beginning of its answer, and no turn that is over: by flags of
    transformers' chat templates, by a mark on the message, not at all, or by a template that leaves the turn open."""


PROFILES: dict[str, ServerProfile] = {
    "mlx_lm": ServerProfile(fields=_MLX_LM, continues="template"),
    "vllm_mlx": ServerProfile(fields=_VLLM, lists_models=True, continues="flags"),
    "mlx_openai": ServerProfile(
        fields=_COMMON | {"top_k", "min_p", "seed", "tool_choice", "response_format", "chat_template_kwargs"},
        hides_length=0,
        base64_vectors=True,
        lists_models=True,
        continues="partial",
    ),
    "omni": ServerProfile(fields=_COMMON | {"response_format"}, hides_length=1, continues="always"),
    "openai": ServerProfile(fields=_OPENAI, says_done=False, base64_vectors=True),
}


def kind_of(http_version: str, headers: Mapping[str, str], health: Any) -> str:
    """Tell which server answered `GET /health`; `openai` for one that shows no mark of its own."""
    if http_version == "HTTP/1.0" and headers.get("server", "").startswith("BaseHTTP"):
        return "mlx_lm"
    if isinstance(health, dict):
        if "engine_type" in health:
            return "vllm_mlx"
        if "model_status" in health:
            return "mlx_openai"
    return "openai"


_FINISH = {
    "stop": "stop",
    "end_turn": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
}


def finish_reason(said: str, quirks: ServerProfile, *, completion_tokens: int | None, max_tokens: int) -> str:
    """Return OpenAI's word for why the answer ended: stop, length, tool_calls or content_filter.

    Raises:
        ProviderError: it is another reason (vLLM's "abort", "error"), and so the answer may not be whole; retryable.
    """
    reason = _FINISH.get(said)
    if reason is None:
        raise ProviderError("the MLX server gave its answer up before it was whole", retryable=True)
    if reason == "stop" and quirks.hides_length is not None and completion_tokens is not None:
        return "length" if completion_tokens >= max_tokens - quirks.hides_length else "stop"
    return reason
