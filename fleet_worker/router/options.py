"""The keyword options of the public methods of `Router`, typed: an editor completes them, mypy refuses a wrong one.

The values are checked at run time by `ChatParams` and `EmbedParams`, whose fields these are.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from fleet_worker.protocol.request import Priority
from fleet_worker.router.attempts import OnInterrupt

IfAbsent = Literal["wait", "refuse"]
"""Whether a request waits, or is refused at once, while no node that could take it is ready."""
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class RequestOptions(TypedDict, total=False):
    """How a request is treated; described at `Router`."""

    timeout: float | None
    queue_timeout: float | None
    max_wait: float | None
    if_absent: IfAbsent
    priority: Priority
    instance: str
    node: str | None
    caller: dict[str, Any] | None
    message_context: dict[str, Any] | None
    trace_context: dict[str, Any] | None
    request_id: str | None
    idempotency_key: str | None
    on_interrupt: OnInterrupt
    session: str | None
    cache_scope: str | None
    keep_warm: bool


class ChatTemplateOptions(TypedDict, total=False):
    enable_thinking: bool | None
    thinking_budget: int | None
    reasoning_effort: ReasoningEffort | None


class ChatOptions(RequestOptions, total=False):
    """And the body of an OpenAI chat completion."""

    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | list[str] | None
    tools: list[dict[str, Any]] | None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None
    parallel_tool_calls: bool | None
    response_format: dict[str, Any] | None
    logit_bias: dict[str, float] | None
    reasoning_effort: ReasoningEffort | None
    chat_template_kwargs: ChatTemplateOptions | None
    n: Literal[1] | None
    user: str | None


class EmbedOptions(RequestOptions, total=False):
    """And the body of an OpenAI embedding."""

    dimensions: int | None
    user: str | None
