"""What differs between MLX servers: quirks, request bodies, and how their failures are told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fleet_worker.errors import ProviderError
from fleet_worker.mlx.chat_templates import left_open
from fleet_worker.mlx.offering import Offering
from fleet_worker.protocol.openai import ChatParams, Message

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


def chat_body(params: ChatParams, offering: Offering, quirks: ServerProfile) -> dict[str, Any]:
    """The body for one server: always streaming (only a stream can be stopped), always with explicit limits."""
    given = params.model_dump(exclude={"messages"}, exclude_none=True)
    given["messages"] = [_message(message) for message in params.messages]
    given["max_tokens"] = params.max_tokens or params.max_completion_tokens or offering.settings.max_output_tokens
    given.setdefault("temperature", offering.settings.temperature)
    if params.reasoning_effort and "reasoning_effort" not in quirks.fields:
        given["chat_template_kwargs"] = {
            "reasoning_effort": params.reasoning_effort,
            **given.get("chat_template_kwargs", {}),
        }
    if params.tool_choice == "none" and "tool_choice" not in quirks.fields:
        given.pop("tools", None)
    body = {name: value for name, value in given.items() if name in quirks.fields}
    return {**body, "model": offering.backend, "stream": True, "stream_options": {"include_usage": True}}


def continued_body(
    body: dict[str, Any], partial: str, offering: Offering, quirks: ServerProfile, *, exact: bool
) -> dict[str, Any] | None:
    """The body by which a server goes on with `partial`, the beginning of its answer to `body`; None if none does.

    mlx_lm.server needs the model's own chat template for it: it refuses the flags that others take, with a 404.
    And it dies of a prompt that it has cached to its end: an earlier answer to the same request that `max_tokens` ended
    where `partial` ends. Unless the text has to be `exact`, a space in front of it makes another prompt.
    """
    turn = {"role": "assistant", "content": partial}
    longer = {**body, "messages": [*body["messages"], turn]}
    match quirks.continues:
        case "flags":
            return _with_template_kwargs(longer, add_generation_prompt=False, continue_final_message=True)
        case "partial" if not offering.features["vision"].value:  # started for images, it begins a new turn
            return {**longer, "messages": [*body["messages"], {**turn, "partial": True}]}
        case "always":
            return {**body, "messages": _with_more_of_the_last_turn(body["messages"], partial)}
        case "template" if offering.template:
            template = offering.template.tool_use if "tools" in body else offering.template.default
            # The prompt ends inside of an open tag; what was delivered is visible text.
            closing = "\n</think>\n\n" if offering.settings.starts_in_reasoning else ""
            before = closing if exact else f"{closing} "
            return _with_template_kwargs(longer, chat_template=left_open(template, before=before))
    return None


def lacks_template(offering: Offering, quirks: ServerProfile) -> bool:
    """Would it take the model's chat template to go on with a stream of it here, and is that not found?"""
    return quirks.continues == "template" and "stream_chat" in offering.capabilities and not offering.template


def _with_template_kwargs(body: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    return {**body, "chat_template_kwargs": {**body.get("chat_template_kwargs", {}), **kwargs}}


def _with_more_of_the_last_turn(messages: list[dict[str, Any]], partial: str) -> list[dict[str, Any]]:
    """It went on with a caller's own last turn, if that is an assistant's, as it goes on with ours."""
    *before, last = messages
    if last["role"] == "assistant" and isinstance(last["content"], str):
        return [*before, {**last, "content": last["content"] + partial}]
    return [*messages, {"role": "assistant", "content": partial}]


def _message(message: Message) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    plain.setdefault("content", "")
    # OpenAI's newer name for it: mlx-openai-server answers 422, and templates do not know it.
    plain["role"] = plain["role"].replace("developer", "system")
    return plain
