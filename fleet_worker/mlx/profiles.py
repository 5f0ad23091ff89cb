"""How MLX servers differ: what each of them is sent, and how its answers are recognised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fleet_worker.errors import ProviderError
from fleet_worker.mlx.chat_templates import with_open_last_turn
from fleet_worker.mlx.offering import Offering
from fleet_worker.mlx.parameters import check_parameters, sent_fields, treatment
from fleet_worker.protocol.openai import ChatParams, Message


@dataclass(frozen=True, slots=True)
class ServerProfile:
    """One kind of MLX server."""

    kind: str
    """Its name in the settings, and in the table of parameters."""
    sends_done: bool = True
    """A complete stream ends with `[DONE]`."""
    length_shortfall: int | None = None
    """It reports the finish_reason "stop" when max_tokens cut the answer, which is then this many tokens shorter than
    max_tokens. None if it reports "length"."""
    base64_vectors: bool = False
    """It sends embeddings as base64 on request."""
    lists_models: bool = False
    """`/v1/models` lists all that it serves. (mlx_lm.server lists what is in the disk cache.)"""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What every request to it must say. (mlx-vlm's server would summarise a long conversation before it answers;
    mlx-openai-server would tell its chat template that no tool may be called.)"""
    continues_by: Literal["flags", "partial", "always", "template"] | None = None
    """How it is told to continue the last message instead of answering it: by flags of transformers' chat templates, by
    `partial` in the message, not at all since it always does, or by a chat template that leaves the turn open. None if
    it begins a new turn whatever it is told."""
    health_waits_for: frozenset[str] = frozenset({"/v1/chat/completions", "/v1/embeddings"})
    """The requests of which one blocks `/health`, and all streams, until it has its first content."""
    forgets_on_swap: bool = False
    """Its prompt cache belongs to the model that it has loaded. (mlx_lm.server keeps that of each model.)"""
    keeps_models: bool = False
    """It may have several models in its memory. All others load one in place of the other."""
    tells_progress: bool = False
    """A comment in a stream means that it has read more of a prompt, not only that it lives."""
    unready_is_dead: bool = False
    """`/health` answers 503 only when its generation thread has died."""
    fails_when_busy: bool = False
    """With a single slot, a stream that finds it busy gets an error 500."""

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a chat request that may be sent to it, `messages` apart."""
        return sent_fields(self.kind)


PROFILES: dict[str, ServerProfile] = {
    profile.kind: profile
    for profile in (
        ServerProfile(
            kind="mlx_lm",
            continues_by="template",
            health_waits_for=frozenset(),
            tells_progress=True,
            unready_is_dead=True,
        ),
        ServerProfile(
            kind="vllm_mlx",
            keeps_models=True,
            fails_when_busy=True,
            lists_models=True,
            continues_by="flags",
            health_waits_for=frozenset({"/v1/embeddings"}),
        ),
        ServerProfile(
            kind="mlx_openai",
            keeps_models=True,
            length_shortfall=0,
            base64_vectors=True,
            lists_models=True,
            constants={"tool_choice": "auto"},
            continues_by="partial",
            health_waits_for=frozenset(),
        ),
        ServerProfile(kind="omni", length_shortfall=1, continues_by="always", forgets_on_swap=True),
        ServerProfile(
            kind="rapid_mlx",
            base64_vectors=True,
            lists_models=True,
            health_waits_for=frozenset({"/v1/embeddings"}),
        ),
        ServerProfile(
            kind="mlx_vlm",
            constants={"context_management": []},
            forgets_on_swap=True,
            health_waits_for=frozenset({"/v1/embeddings"}),
        ),
        ServerProfile(kind="openai", sends_done=False, base64_vectors=True),
    )
}


def detect_server(http_version: str, headers: Mapping[str, str], report: dict[str, Any]) -> str:
    """Return which kind of server answered `GET /health` with this report; `openai` if it cannot be recognised."""
    server = headers.get("server", "")
    if http_version == "HTTP/1.0" and server.startswith("BaseHTTP"):
        return "mlx_lm"
    if server.startswith("mlx_vlm/"):
        return "mlx_vlm"
    if "engine_type" in report:
        if _RAPID_MLX & report.keys():
            return "rapid_mlx"
        return "vllm_mlx" if report["engine_type"] in _VLLM_MLX else "openai"
    return "mlx_openai" if "model_status" in report else "openai"


_VLLM_MLX = ("simple", "batched", "hybrid", "unknown")
"""Its engines; "unknown" until a model is loaded."""
_RAPID_MLX = {"ready", "state", "update_available", "model_lifecycle"}
"""Keys that rapid-mlx, which began as vllm-mlx, has added to that report."""


def chat_body(params: ChatParams, offering: Offering, profile: ServerProfile) -> dict[str, Any]:
    """Return the request body of a chat. It always streams (only a stream can be cancelled) and has explicit limits.

    Raises:
        UnsupportedParameter: the server cannot do what a parameter asks for, and the node cannot do it either.
    """
    given = params.model_dump(exclude={"messages"}, exclude_none=True)
    given.setdefault("temperature", offering.settings.temperature)
    check_parameters(params, profile.kind, given["temperature"])
    max_tokens = params.max_tokens or params.max_completion_tokens or offering.settings.max_output_tokens
    given["max_tokens"] = max_tokens + (profile.length_shortfall or 0)
    if params.tool_choice == "none" and "tool_choice" not in profile.fields:
        given.pop("tools", None)
    if not params.tools:  # OpenAI's own server refuses all of these then
        given.pop("tools", None)
        given.pop("parallel_tool_calls", None)
        if params.tool_choice in ("auto", "none"):
            given.pop("tool_choice")
    if offering.reasons:  # a server would find them in the reasoning, too
        given.pop("stop", None)
    given.pop("chat_template_kwargs", None)
    return {
        "messages": [_message(message) for message in params.messages],
        **{name: value for name, value in given.items() if name in profile.fields},
        **_renamed(params, profile),
        **profile.constants,
        "model": offering.backend,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _renamed(params: ChatParams, profile: ServerProfile) -> dict[str, Any]:
    """Return what is said to the chat template, in the fields of this server."""
    kwargs = params.chat_template_kwargs.model_dump(exclude_none=True) if params.chat_template_kwargs else {}
    if params.reasoning_effort and treatment("reasoning_effort", profile.kind) == "renamed":
        kwargs = {"reasoning_effort": params.reasoning_effort, **kwargs}
    if profile.kind == "mlx_vlm":
        return kwargs
    effort = kwargs.get("reasoning_effort")
    if profile.kind == "mlx_openai" and effort in ("none", "minimal"):  # it answers 422
        del kwargs["reasoning_effort"]
        kwargs = {**({"enable_thinking": False} if effort == "none" else {"reasoning_effort": "low"}), **kwargs}
    return {"chat_template_kwargs": kwargs} if kwargs else {}


def _message(message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    plain.setdefault("content", "")
    # OpenAI's newer name for the role: mlx-openai-server answers 422, and chat templates do not know it.
    plain["role"] = plain["role"].replace("developer", "system")
    return plain


def continued_body(
    body: dict[str, Any], partial: str, offering: Offering, profile: ServerProfile, *, front: str = " "
) -> dict[str, Any] | None:
    """Return the body with which a server continues `partial`, the beginning of its answer to `body`.

    None if this server cannot continue an answer. mlx_lm.server needs the model's chat template for it, since it
    answers 404 to the flags that others take. It also crashes if the whole prompt is in its cache, which happens if
    `max_tokens` ended an earlier answer to the same request exactly where `partial` ends: `front`, white space before
    the text, makes it another prompt. It must differ also between two continuations of which one is a token longer:
    mlx_lm.server 0.32 caches each prompt without its last token.
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
            kwargs = {"chat_template": with_open_last_turn(template, before_text=f"{closing_tag}{front}")}
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
